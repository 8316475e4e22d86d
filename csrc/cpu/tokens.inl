// A row of tokens and the row of a table that is added to it.

template <typename A, typename B, typename Out>
static void add_row_as(const void* a, const void* b, void* out, int64_t width) {
  const A* x = static_cast<const A*>(a);
  const B* y = static_cast<const B*>(b);
  Out* sum = static_cast<Out*>(out);
  // `out` may be `a` or `b` itself
  if constexpr (sizeof(A) == 2 || sizeof(B) == 2 || sizeof(Out) == 2) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sum[i] = narrow<Out>(widen(x[i]) + widen(y[i]));
  } else {
    by_vectors(width, [&](int, int64_t i, auto lanes)
                          FASTMIM_STEP { lanes.put(sum + i, lanes.get(x + i) + lanes.get(y + i)); });
  }
}

template <typename A, typename B>
static void add_row_to(const void* a, const void* b, Type out_type, void* out, int64_t width) {
  if (out_type == Type::f32) return add_row_as<A, B, float>(a, b, out, width);
  if (out_type == Type::bf16) return add_row_as<A, B, Bf16>(a, b, out, width);
  add_row_as<A, B, F16>(a, b, out, width);
}

template <typename A>
static void add_row_of(const void* a, Type b_type, const void* b, Type out_type, void* out, int64_t width) {
  if (b_type == Type::f32) return add_row_to<A, float>(a, b, out_type, out, width);
  if (b_type == Type::bf16) return add_row_to<A, Bf16>(a, b, out_type, out, width);
  add_row_to<A, F16>(a, b, out_type, out, width);
}

static void add_row(Type a_type, const void* a, Type b_type, const void* b, Type out_type, void* out, int64_t width) {
  if (a_type == Type::f32) return add_row_of<float>(a, b_type, b, out_type, out, width);
  if (a_type == Type::bf16) return add_row_of<Bf16>(a, b_type, b, out_type, out, width);
  add_row_of<F16>(a, b_type, b, out_type, out, width);
}

// rows first.. of `out` from a row each and one of a table
static void add_rows(const RowSum* sums, int64_t count, Type table_type, const View& out, int64_t first,
                     int64_t width) {
  constexpr int64_t kPiece = 512;
  alignas(64) float sum[kPiece];
  const auto size = [](Type type) { return type == Type::f32 ? 4 : 2; };
  for (int64_t row = 0; row < count; ++row) {
    const RowSum& of = sums[row];
    void* to = at(out, (first + row) * out.stride[0]);
    if (!out.streamed) {
      add_row(of.type, of.value, table_type, of.table, out.type, to, width);
      continue;
    }
    for (int64_t start = 0; start < width; start += kPiece) {
      const int64_t piece = width - start < kPiece ? width - start : kPiece;
      add_row(of.type, static_cast<const char*>(of.value) + start * size(of.type), table_type,
              static_cast<const char*>(of.table) + start * size(table_type), Type::f32, sum, piece);
      stream_row(static_cast<float*>(to) + start, sum, piece);
    }
  }
  finish_streams();
}

static void copy_row(Type a_type, const void* a, Type out_type, void* out, int64_t width) {
  constexpr int64_t kPiece = 256;
  alignas(64) float x[kPiece];
  const auto size = [](Type type) { return type == Type::f32 ? 4 : 2; };
  for (int64_t start = 0; start < width; start += kPiece) {
    const int64_t count = width - start < kPiece ? width - start : kPiece;
    load_row(a_type, static_cast<const char*>(a) + start * size(a_type), 1, x, count);
    store_row(out_type, static_cast<char*>(out) + start * size(out_type), 1, x, count);
  }
}
