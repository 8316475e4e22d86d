// Rows of any storage type, read and written as floats, and scratch memory.

// call(a value of the storage type)
template <typename Call>
FASTMIM_HD void in_type(Type type, const Call& call) {
  if (type == Type::f32) return call(float());
  if (type == Type::bf16) return call(Bf16());
  call(F16());
}

// 2 VL values of a row in sequence. Both halves of a line of 64 bytes are written one after the other.
struct VecPair {
  Vec a, b;
};
FASTMIM_HD VecPair operator+(VecPair x, VecPair y) {
  return {x.a + y.a, x.b + y.b};
}
FASTMIM_HD VecPair operator-(VecPair x, VecPair y) {
  return {x.a - y.a, x.b - y.b};
}
FASTMIM_HD VecPair operator*(VecPair x, VecPair y) {
  return {x.a * y.a, x.b * y.b};
}
FASTMIM_HD VecPair operator-(VecPair x, float y) {
  return {x.a - y, x.b - y};
}
FASTMIM_HD VecPair operator*(VecPair x, float y) {
  return {x.a * y, x.b * y};
}

// as Whole
struct WholePair {
  template <typename T>
  static FASTMIM_HD VecPair get(const T* from) {
    return {load(from), load(from + VL)};
  }
  template <typename T>
  static FASTMIM_HD void put(T* to, VecPair values) {
    store(to, values.a), store(to + VL, values.b);
  }
};

// as by_vectors, for each VecPair and then for the vectors that are left
template <typename Step>
FASTMIM_HD void by_vec_pairs(int64_t count, const Step& step) {
  int64_t i = 0;
  for (; i + 2 * VL <= count; i += 2 * VL) step(i, WholePair{});
  if (i + VL <= count) step(i, Whole{}), i += VL;
  if (i < count) step(i, Rest{count - i});
}

// lanes.put, past the caches if STREAMED: then `to` lies at a multiple of the vector's size
template <bool STREAMED, typename Lanes, typename T, typename Values>
FASTMIM_HD void put(Lanes lanes, T* to, Values values) {
  if constexpr (STREAMED && std::is_same_v<Lanes, WholePair> && std::is_same_v<T, float>) {
    stream(to, values.a), stream(to + VL, values.b);
  } else {
    lanes.put(to, values);
  }
}

template <typename T>
FASTMIM_HD void load_row_as(const void* from, int64_t stride, float* to, int64_t count) {
  const T* source = static_cast<const T*>(from);
  if (stride == 1) {
    by_vectors(count, [&](int, int64_t i, auto lanes) FASTMIM_STEP { lanes.put(to + i, lanes.get(source + i)); });
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(source[i * stride]);
  }
}

template <typename T>
FASTMIM_HD void store_row_as(void* to, int64_t stride, const float* from, int64_t count) {
  T* target = static_cast<T*>(to);
  if (stride == 1) {
    by_vectors(count, [&](int, int64_t i, auto lanes) FASTMIM_STEP { lanes.put(target + i, lanes.get(from + i)); });
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * stride] = narrow<T>(from[i]);
  }
}

static void load_row(Type type, const void* from, int64_t stride, float* to, int64_t count) {
  in_type(type, [&](auto stored) { load_row_as<decltype(stored)>(from, stride, to, count); });
}

static void store_row(Type type, void* to, int64_t stride, const float* from, int64_t count) {
  in_type(type, [&](auto stored) { store_row_as<decltype(stored)>(to, stride, from, count); });
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

// Asks for a contiguous row ahead of its use. One past the end of memory is not read.
FASTMIM_HD void fetch_row(const View& view, int64_t row, int64_t width) {
  const int64_t size = view.type == Type::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(view.data) + row * width * size;
  for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(from + i, 0, 2);
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
