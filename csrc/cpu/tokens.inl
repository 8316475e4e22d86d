// A row of tokens and the row of a table that is added to it.

template <typename A, typename B, typename Out>
static void add_row_as(const void* a, const void* b, void* out, int64_t width) {
  const A* x = static_cast<const A*>(a);
  const B* y = static_cast<const B*>(b);
  Out* sum = static_cast<Out*>(out);
  // `out` may be `a` or `b` itself
  if constexpr (std::is_same_v<A, Bf16> && std::is_same_v<B, Bf16> && std::is_same_v<Out, Bf16>) {
    int64_t i = 0;
    for (; i + 2 * VL <= width; i += 2 * VL) {
      const EvenOdd left = load_even_odd(x + i), right = load_even_odd(y + i);
      store(sum + i, EvenOdd{left.even + right.even, left.odd + right.odd});
    }
    for (; i < width; ++i) sum[i] = narrow<Out>(widen(x[i]) + widen(y[i]));
  } else if constexpr (sizeof(A) == 2 || sizeof(B) == 2 || sizeof(Out) == 2) {
    // the compiler packs 16-bit values of two vectors at a time
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) sum[i] = narrow<Out>(widen(x[i]) + widen(y[i]));
  } else {
    by_vectors(width, [&](int, int64_t i, auto lanes)
                          FASTMIM_STEP { lanes.put(sum + i, lanes.get(x + i) + lanes.get(y + i)); });
  }
}

static void add_row(Type a_type, const void* a, Type b_type, const void* b, Type out_type, void* out, int64_t width) {
  in_type(a_type, [&](auto x) {
    in_type(b_type, [&](auto y) {
      in_type(out_type, [&](auto sum) { add_row_as<decltype(x), decltype(y), decltype(sum)>(a, b, out, width); });
    });
  });
}

static void stream_sum(Type a_type, const void* a, Type b_type, const void* b, float* out, int64_t width) {
  in_type(a_type, [&](auto x) {
    in_type(b_type, [&](auto y) {
      const auto* left = static_cast<const decltype(x)*>(a);
      const auto* right = static_cast<const decltype(y)*>(b);
      by_vec_pairs(width, [&](int64_t i, auto lanes)
                              FASTMIM_STEP { put<true>(lanes, out + i, lanes.get(left + i) + lanes.get(right + i)); });
    });
  });
}

// rows first.. of `out` from a row each and one of a table
static void add_rows(const RowSum* sums, int64_t count, Type table_type, const View& out, int64_t first,
                     int64_t width) {
  for (int64_t row = 0; row < count; ++row) {
    const RowSum& of = sums[row];
    void* to = at(out, (first + row) * out.stride[0]);
    if (out.streamed) {
      stream_sum(of.type, of.value, table_type, of.table, static_cast<float*>(to), width);
    } else {
      add_row(of.type, of.value, table_type, of.table, out.type, to, width);
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

// Adds rows begin..end of `x` to the sums, ROWS at a time: the sums are read and written once for all of them.
template <int ROWS, typename T>
static void sum_rows_as(const SumRows& args, float* sums, int64_t begin) {
  const T* row[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t b = (begin + r) / args.rows, k = (begin + r) % args.rows;
    row[r] = static_cast<const T*>(at(args.x, b * args.x.stride[0] + k * args.x.stride[1]));
  }
  int64_t done = 0;
  if constexpr (std::is_same_v<T, Bf16>) {
    for (; done + 2 * VL <= args.width; done += 2 * VL) {
      EvenOdd sum = load_even_odd(row[0] + done);
#pragma GCC unroll 8
      for (int r = 1; r < ROWS; ++r) {
        const EvenOdd values = load_even_odd(row[r] + done);
        sum.even += values.even, sum.odd += values.odd;
      }
      add_to(sums + done, sum);
    }
  }
  by_vectors(args.width - done, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
    i += done;
    Vec sum = lanes.get(row[0] + i);
#pragma GCC unroll 8
    for (int r = 1; r < ROWS; ++r) sum += lanes.get(row[r] + i);
    lanes.put(sums + i, lanes.get(sums + i) + sum);
  });
}

static void sum_rows(const SumRows& args, float* sums, int64_t begin, int64_t end) {
  constexpr int kRows = 8;
  in_type(args.x.type, [&](auto stored) {
    for (; begin + kRows <= end; begin += kRows) sum_rows_as<kRows, decltype(stored)>(args, sums, begin);
    for (; begin < end; ++begin) sum_rows_as<1, decltype(stored)>(args, sums, begin);
  });
}
