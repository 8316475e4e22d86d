// Vectors of VL floats in the compiler's own vector extension, for whichever instruction set is being compiled.

constexpr int VL = FASTMIM_VL;

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef int32_t Int __attribute__((vector_size(VL * 4)));
typedef float Unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t UnalignedInt __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(VL * 4)));
typedef uint16_t Half __attribute__((vector_size(VL * 2)));
typedef uint8_t UnalignedBytes __attribute__((vector_size(VL), aligned(1), may_alias));
typedef uint16_t UnalignedHalf __attribute__((vector_size(VL * 2), aligned(2), may_alias));

FASTMIM_HD Vec load(const float* from) {
  return *reinterpret_cast<const Unaligned*>(from);
}
FASTMIM_HD void store(float* to, Vec value) {
  *reinterpret_cast<Unaligned*>(to) = value;
}
// as store, past the caches; `to` lies at a multiple of the vector's size
FASTMIM_HD void stream(float* to, Vec value) {
#if defined(FASTMIM_STREAM)
  FASTMIM_STREAM(to, value);
#else
  store(to, value);
#endif
}
// before other threads read what was streamed
FASTMIM_HD void finish_streams() {
#if defined(FASTMIM_STREAM)
  _mm_sfence();
#endif
}
FASTMIM_HD Int load(const int32_t* from) {
  return *reinterpret_cast<const UnalignedInt*>(from);
}
FASTMIM_HD void store(int32_t* to, Int value) {
  *reinterpret_cast<UnalignedInt*>(to) = value;
}
FASTMIM_HD Vec load(const uint8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const UnalignedBytes*>(from), Int), Vec);
}
FASTMIM_HD Vec load(const uint16_t* from) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const UnalignedHalf*>(from), Int), Vec);
}
FASTMIM_HD Vec load(const Bf16* from) {
  return (Vec)(__builtin_convertvector((Half) * reinterpret_cast<const UnalignedHalf*>(from), Bits) << 16);
}
// as narrow<Bf16>
FASTMIM_HD void store(Bf16* to, Vec value) {
  const Bits bits = (Bits)value, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits kept = ((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16;
  *reinterpret_cast<UnalignedHalf*>(to) = __builtin_convertvector(kept, Half);
}
FASTMIM_HD Vec splat(float value) {
  return value - Vec{};
}
FASTMIM_HD Vec larger(Vec a, Vec b) {
  return a > b ? a : b;
}

template <int S, int... C>
FASTMIM_HD Vec rotated(Vec v, std::integer_sequence<int, C...>) {
  return __builtin_shufflevector(v, v, ((C + S) % VL)...);
}

// a reduction over the lanes as a tree
template <int S = VL / 2, typename Op>
FASTMIM_HD float across(Vec v, const Op& op) {
  v = op(v, rotated<S>(v, std::make_integer_sequence<int, VL>{}));
  if constexpr (S > 1) {
    return across<S / 2>(v, op);
  } else {
    return v[0];
  }
}

FASTMIM_HD float sum_of(Vec v) {
  return across(v, [](Vec a, Vec b) { return a + b; });
}

FASTMIM_HD float largest_in(Vec v) {
  return across(v, [](Vec a, Vec b) { return larger(a, b); });
}

// a vector of a row
struct Whole {
  template <typename T>
  static FASTMIM_HD Vec get(const T* from) {
    return load(from);
  }
  template <typename T>
  static FASTMIM_HD void put(T* to, Vec value) {
    store(to, value);
  }
};

// its last vector, of `count` values; the other lanes are 0 and are not stored
struct Rest {
  int64_t count;
  template <typename T>
  FASTMIM_HD Vec get(const T* from) const {
    Vec value = {};
    for (int64_t i = 0; i < count; ++i) value[i] = widen(from[i]);
    return value;
  }
  template <typename T>
  FASTMIM_HD void put(T* to, Vec value) const {
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(value[i]);
  }
};

// Runs step(chain, i, lanes) for each vector of `count` values, `i` its first value. Sums in CHAINS vectors don't wait
// for each other.
template <int CHAINS = 1, typename Step>
FASTMIM_HD void by_vectors(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + CHAINS * VL <= count; i += CHAINS * VL) {
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; ++chain) step(chain, i + chain * VL, Whole{});
  }
  if constexpr (CHAINS > 1) {
    for (; i + VL <= count; i += VL) step(0, i, Whole{});
  }
  if (i < count) step(0, i, Rest{count - i});
}
// what a step of by_vectors is marked as
#define FASTMIM_STEP __attribute__((always_inline))

// Sums in VL lanes, however the compiler vectorises loops: one long chain of float additions would lose digits.
FASTMIM_HD float dot(const float* x, const float* y, int64_t count) {
  Vec total[4] = {};
  by_vectors<4>(count, [&](int chain, int64_t i, auto lanes)
                           FASTMIM_STEP { total[chain] += lanes.get(x + i) * lanes.get(y + i); });
  return sum_of((total[0] + total[1]) + (total[2] + total[3]));
}

FASTMIM_HD float total(const float* x, int64_t count) {
  Vec sums[4] = {};
  by_vectors<4>(count, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP { sums[chain] += lanes.get(x + i); });
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

FASTMIM_HD int64_t padded(int64_t count) {
  return (count + VL - 1) / VL * VL;
}

// e^x of a number between -87.33 and 88, to about one ulp; NaN for NaN
FASTMIM_HD Vec exponential_in_range(Vec clamped) {
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // rounds to the nearest integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Int power = ((Int)shifted << 23) + (127 << 23);
  return p * (Vec)power;
}

// e^x to about one ulp; 0 below the smallest normal number, NaN for NaN
FASTMIM_HD Vec exponential(Vec x) {
  const Vec value = exponential_in_range(x < -87.33f ? splat(-87.33f) : x > 88.0f ? splat(88.0f) : x);
  return x < -87.33f ? Vec{} : x > 88.0f ? splat(__builtin_inff()) : value;
}

// The normal distribution function Φ(u) and e^(-u²/2): through a polynomial for erfc(x) e^(x²) in 1 / (1 + x/2)
FASTMIM_HD Vec normal_distribution(Vec u, Vec& bell) {
  const Vec x = (u < 0.0f ? -u : u) * 0.707106781f;
  const Vec t = 1.0f / (1.0f + 0.5f * x);
  Vec p = splat(-0x1.e3e4a8p-5f);
  p = p * t + 0x1.2367acp-2f;
  p = p * t - 0x1.f2e4a8p-2f;
  p = p * t + 0x1.1cbdccp-2f;
  p = p * t - 0x1.b43e16p-6f;
  p = p * t + 0x1.9f1a68p-3f;
  p = p * t + 0x1.f1e05cp-3f;
  p = p * t + 0x1.2126fep-2f;
  p = p * t + 0x1.20db44p-2f;
  const Vec exponent = -0.5f * u * u;
  const Vec value = exponential_in_range(exponent < -87.33f ? splat(-87.33f) : exponent);
  bell = exponent < -87.33f ? Vec{} : value;
  const Vec tail = 0.5f * p * t * bell;
  return u < 0.0f ? tail : 1.0f - tail;
}

// ---- rows of any storage type ------------------------------------------------------------------------------------

template <typename T>
FASTMIM_HD void load_row_as(const void* from, int64_t stride, float* to, int64_t count) {
  const T* source = static_cast<const T*>(from);
  if (stride == 1) {
    if constexpr (std::is_same_v<T, F16>) {
      for (int64_t i = 0; i < count; ++i) to[i] = widen(source[i]);
    } else {
      by_vectors(count, [&](int, int64_t i, auto lanes) FASTMIM_STEP { lanes.put(to + i, lanes.get(source + i)); });
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(source[i * stride]);
  }
}

template <typename T>
FASTMIM_HD void store_row_as(void* to, int64_t stride, const float* from, int64_t count) {
  T* target = static_cast<T*>(to);
  if (stride == 1) {
    // a compiler packs 16-bit values of shorter vectors faster by itself
    if constexpr (std::is_same_v<T, F16> || (std::is_same_v<T, Bf16> && VL < 16)) {
      for (int64_t i = 0; i < count; ++i) target[i] = narrow<T>(from[i]);
    } else {
      by_vectors(count, [&](int, int64_t i, auto lanes) FASTMIM_STEP { lanes.put(target + i, lanes.get(from + i)); });
    }
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * stride] = narrow<T>(from[i]);
  }
}

static void load_row(Type type, const void* from, int64_t stride, float* to, int64_t count) {
  if (type == Type::f32) load_row_as<float>(from, stride, to, count);
  if (type == Type::bf16) load_row_as<Bf16>(from, stride, to, count);
  if (type == Type::f16) load_row_as<F16>(from, stride, to, count);
}

static void store_row(Type type, void* to, int64_t stride, const float* from, int64_t count) {
  if (type == Type::f32) store_row_as<float>(to, stride, from, count);
  if (type == Type::bf16) store_row_as<Bf16>(to, stride, from, count);
  if (type == Type::f16) store_row_as<F16>(to, stride, from, count);
}

// a row that lies at a multiple of the vector's size
static void stream_row(float* to, const float* from, int64_t count) {
  by_vectors(count, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
    if constexpr (std::is_same_v<decltype(lanes), Whole>) {
      stream(to + i, load(from + i));
    } else {
      lanes.put(to + i, lanes.get(from + i));
    }
  });
}

FASTMIM_HD void* at(const View& view, int64_t offset) {
  return static_cast<char*>(view.data) + offset * (view.type == Type::f32 ? 4 : 2);
}

// the row as floats: in place if it holds floats, else converted in `scratch`
FASTMIM_HD const float* row_of(const View& view, int64_t row, int64_t width, float* scratch) {
  const void* from = at(view, row * view.stride[0]);
  if (view.type == Type::f32 && view.stride[1] == 1) return static_cast<const float*>(from);
  load_row(view.type, from, view.stride[1], scratch, width);
  return scratch;
}

FASTMIM_HD bool written_in_place(const View& view) {
  return view.type == Type::f32 && view.stride[1] == 1 && !view.streamed;
}

// the memory to write the row to: in place if it holds floats, else `scratch`, which `finish` then converts and stores
FASTMIM_HD float* target_of(const View& view, int64_t row, float* scratch) {
  return written_in_place(view) ? static_cast<float*>(at(view, row * view.stride[0])) : scratch;
}

FASTMIM_HD void finish(const View& view, int64_t row, int64_t width, const float* scratch) {
  if (written_in_place(view)) return;
  void* to = at(view, row * view.stride[0]);
  if (view.streamed) return stream_row(static_cast<float*>(to), scratch, width);
  store_row(view.type, to, view.stride[1], scratch, width);
}

// ---- pieces of rows, as whole vectors: in place if they are whole, else in `scratch` ------------------------------

FASTMIM_HD const float* whole_vectors(const float* from, int64_t count, float* scratch) {
  if (count % VL == 0) return from;
  load_row(Type::f32, from, 1, scratch, count);
  return scratch;
}

FASTMIM_HD const float* piece_of(const View& view, int64_t row, int64_t start, int64_t count, float* scratch) {
  const void* from = at(view, row * view.stride[0] + start * view.stride[1]);
  if (view.type == Type::f32 && view.stride[1] == 1)
    return whole_vectors(static_cast<const float*>(from), count, scratch);
  load_row(view.type, from, view.stride[1], scratch, count);
  return scratch;
}

FASTMIM_HD float* piece_target(const View& view, int64_t row, int64_t start, int64_t count, float* scratch) {
  const bool direct = view.type == Type::f32 && view.stride[1] == 1 && count % VL == 0;
  return direct ? static_cast<float*>(at(view, row * view.stride[0] + start)) : scratch;
}

FASTMIM_HD void finish_piece(const View& view, int64_t row, int64_t start, int64_t count, const float* target,
                             const float* scratch) {
  if (target != scratch) return;
  store_row(view.type, at(view, row * view.stride[0] + start * view.stride[1]), view.stride[1], scratch, count);
}

// Floats of scratch, aligned for vectors and freed at the end of the scope; each part a block of its own, so that a
// sanitizer sees where it ends.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (count_ > 0) free(parts_[--count_]);
  }
  float* take(int64_t count) {
    void* part = aligned_alloc(64, (count * 4 + 64) / 64 * 64);
    if (part == nullptr) throw std::bad_alloc();
    parts_[count_++] = part;
    return static_cast<float*>(part);
  }

 private:
  void* parts_[16];
  int count_ = 0;
};
