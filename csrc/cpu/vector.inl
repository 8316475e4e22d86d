// Vectors of VL floats in the compiler's own vector extension, for whichever instruction set is being compiled.

constexpr int VL = FASTMIM_VL;

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef int32_t Int __attribute__((vector_size(VL * 4)));
typedef float Unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t UnalignedInt __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(VL * 4)));
typedef uint32_t UnalignedBits __attribute__((vector_size(VL * 4), aligned(2), may_alias));
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
// VL values of 1 or 2 bytes in 32 bits each; GCC converts vectors of them in several steps
template <typename T>
FASTMIM_HD Int widened(const T* from) {
#if defined(FASTMIM_WIDEN_BYTES)
  if constexpr (sizeof(T) == 1) return (Int)FASTMIM_WIDEN_BYTES(from);
  return (Int)FASTMIM_WIDEN_HALVES(from);
#else
  if constexpr (sizeof(T) == 1) {
    const Half wider = __builtin_convertvector(*reinterpret_cast<const UnalignedBytes*>(from), Half);
    return __builtin_convertvector(wider, Int);
  }
  return __builtin_convertvector((Half) * reinterpret_cast<const UnalignedHalf*>(from), Int);
#endif
}
FASTMIM_HD Vec load(const uint8_t* from) {
  return __builtin_convertvector(widened(from), Vec);
}
FASTMIM_HD Vec load(const uint16_t* from) {
  return __builtin_convertvector(widened(from), Vec);
}
FASTMIM_HD Vec load(const Bf16* from) {
  return (Vec)((Bits)widened(from) << 16);
}
// as widen(F16)
FASTMIM_HD Vec load(const F16* from) {
  const Bits half = (Bits)widened(from);
  const Vec magnitude = (Vec)((half & 0x7fffu) << 13) * 0x1p112f;
  const Bits special = (half & 0x7c00u) == 0x7c00u ? Bits{} + 0x7f800000u : Bits{};
  return (Vec)((Bits)magnitude | special | (half & 0x8000u) << 16);
}
// the upper half of each lane
FASTMIM_HD Half upper(Bits bits) {
#if defined(FASTMIM_UPPER)
  return (Half)FASTMIM_UPPER(bits);
#else
  return __builtin_convertvector(bits >> 16, Half);
#endif
}
// narrow<Bf16> in the upper half of each lane; the lower half is of no meaning
FASTMIM_HD Bits rounded_to_bf16(Vec value) {
  const Bits bits = (Bits)value;
  return value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}
// as narrow<Bf16>
FASTMIM_HD void store(Bf16* to, Vec value) {
  *reinterpret_cast<UnalignedHalf*>(to) = upper(rounded_to_bf16(value));
}
// as narrow<F16>
FASTMIM_HD void store(F16* to, Vec value) {
  const Bits sign = ((Bits)value >> 16) & 0x8000u, bits = (Bits)value & 0x7fffffffu;
  const Bits subnormal = (Bits)((Vec)bits + 0.5f) - 0x3f000000u;
  const Bits normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const Bits special = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits magnitude = bits >= 0x47800000u ? special : bits < 0x38800000u ? subnormal : normal;
  *reinterpret_cast<UnalignedHalf*>(to) = __builtin_convertvector(sign | magnitude, Half);
}
// 2 VL values of bf16, those at even and those at odd places: cheaper to make and to store than vectors of neighbours
struct EvenOdd {
  Vec even, odd;
};
FASTMIM_HD EvenOdd load_even_odd(const Bf16* from) {
  const Bits words = *reinterpret_cast<const UnalignedBits*>(from);
  return {(Vec)(words << 16), (Vec)(words & 0xffff0000u)};
}
FASTMIM_HD void store(Bf16* to, EvenOdd values) {
  *reinterpret_cast<UnalignedBits*>(to) =
      rounded_to_bf16(values.even) >> 16 | (rounded_to_bf16(values.odd) & 0xffff0000u);
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

// VL neighbours of 2 VL values, from lane FIRST of each vector on
template <int FIRST, int... C>
FASTMIM_HD Vec neighbours(EvenOdd v, std::integer_sequence<int, C...>) {
  return __builtin_shufflevector(v.even, v.odd, (FIRST + C / 2 + C % 2 * VL)...);
}

// adds 2 VL values to those at `to`
FASTMIM_HD void add_to(float* to, EvenOdd values) {
  constexpr auto lanes = std::make_integer_sequence<int, VL>{};
  store(to, load(to) + neighbours<0>(values, lanes));
  store(to + VL, load(to + VL) + neighbours<VL / 2>(values, lanes));
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
