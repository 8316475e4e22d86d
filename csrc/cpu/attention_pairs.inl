// Attention of bf16 by products of pairs of values, which are adjacent along the axis that a product sums over: values
// of Q, K, V and dO as they lie in memory where it sums over the head dimension, two interleaved rows where it sums
// over keys or queries. Products are exact; of the intermediate values, P and dS are rounded to bf16, all others are
// floats.

static_assert(kRows % 2 == 0);

// 2^x of a number up to 0, to 3e-6 of the value; 0 below the smallest normal number, NaN for NaN
FASTMIM_HD Vec power_of_two(Vec x) {
  const __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = x - (Vec)whole;
  Vec p = splat(0.009570101f);
  p = p * r + 0.05591786f;
  p = p * r + 0.24024744f;
  p = p * r + 0.6931218f;
  p = p * r + 0.9999993f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLE_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, whole);
}

// step(j, whether there is a second vector) for the vectors at j and j + VL
template <typename Step>
FASTMIM_HD void by_two_vectors(int64_t count, const Step& step) {
  int64_t j = 0;
  for (; j + VL < count; j += 2 * VL) step(j, std::true_type{});
  if (j < count) step(j, std::false_type{});
}

struct PairItem : AttentionItem {
  // of a row along the head dimension, the words in use and with their padding; values of a row of P or dS
  const int64_t words = (args.dim + 1) / 2, width = padded(words), line = (keys + VL) / (2 * VL) * (2 * VL);
  // a tensor's rows, those of a block of queries, P and dS of the block
  Bf16 *rows, *q, *g, *weights, *slopes;
  // K and V along the head dimension; V, in the backward pass K, along keys; what a product along queries takes
  Pair *kt, *vt, *zipped, *left, *right;

  PairItem(const Attention& a, bool backward) : AttentionItem(a, backward) {
    rows = values(keys * 2 * width);
    q = values(kRows * 2 * width);
    weights = values(kRows * line);
    kt = pairs(width * keys);
    zipped = pairs(keys / 2 * dim);
    g = slopes = nullptr;
    vt = left = right = nullptr;
    if (backward) {
      g = values(kRows * 2 * width);
      slopes = values(kRows * line);
      vt = pairs(width * keys);
      left = pairs(kRows / 2 * keys);
      right = pairs(kRows / 2 * dim);
    }
  }

  Pair* pairs(int64_t count) { return reinterpret_cast<Pair*>(memory.take(count)); }
  Bf16* values(int64_t count) { return &pairs(count / 2)->first; }
  static const Pair* along(const Bf16* values) { return reinterpret_cast<const Pair*>(values); }
  static Pair* along(Bf16* values) { return reinterpret_cast<Pair*>(values); }

  // rows start..start+count and zeros up to `upto`, each padded with zeros
  void read(const View& view, int64_t start, int64_t count, int64_t upto, Bf16* to, bool masked) const {
    for (int64_t i = 0; i < upto; ++i, to += 2 * width) {
      const bool real = i < count && !(masked && !attends(start + i));
      const Bf16* from = static_cast<const Bf16*>(row(view, start + i));
      if (!real || view.stride[3] == 1) {
        for (int64_t d = 0; d < 2 * width; d += 2 * VL)
          store(along(to + d), real && d < args.dim ? load_first(from + d, args.dim - d) : Int{});
      } else {
        for (int64_t d = 0; d < 2 * width; ++d) to[d] = d < args.dim ? from[d * view.stride[3]] : Bf16{};
      }
    }
  }

  void read_keys(const View& view) const { read(view, 0, args.keys, keys, rows, true); }
  void read_queries(const View& view, int64_t start, int64_t count, Bf16* to) const {
    read(view, start, count, count + count % 2, to, false);
  }

  // stores rows, each times its factor, and adds them to `sums` where these are wanted
  template <typename Factor>
  void write(const View& view, int64_t start, int64_t count, const float* from, const Factor& factor,
             float* sums) const {
    for (int64_t d = 0; d < dim; d += 2 * VL) {
      Vec total[2] = {};
      const bool both = d + VL < dim;
      for (int64_t i = 0; i < count; ++i) {
        const float* at = from + i * dim + d;
        const Vec low = load(at) * factor(i), high = both ? load(at + VL) * factor(i) : Vec{};
        store_first(static_cast<Bf16*>(row(view, start + i)) + d, narrowed(low, high), args.dim - d);
        total[0] += low, total[1] += high;
      }
      if (sums == nullptr) continue;
      for (int64_t i = d; i < args.dim && i < d + 2 * VL; ++i) sums[i] += total[(i - d) / VL][i % VL];
    }
  }

  // stores rows of dq (0), dk (1) or dv (2), times a factor
  void write_gradient(int64_t index, const View& view, int64_t start, int64_t count, const float* from,
                      float factor) const {
    float* sums = args.sums ? args.sums + ((sequence * 3 + index) * args.heads + head) * args.dim : nullptr;
    write(view, start, count, from, [&](int64_t) { return factor; }, sums);
  }

  // to (count, keys) of floats: rows of queries by those of keys
  void by_keys(int64_t count, const Bf16* queries, const Pair* transposed, float* to) const {
    matmul(count, keys, words, along(queries), width, 1, transposed, keys, to, keys, false);
  }

  // out (count, dim): P or dS by rows of keys
  void by_weights(int64_t count, const Bf16* of) const {
    matmul(count, dim, (args.keys + 1) / 2, along(of), line / 2, 1, zipped, dim, out, dim, false);
  }

  // to (keys, dim) += P or dS (count, keys) transposed by rows of queries
  void by_queries(int64_t start, int64_t count, Bf16* of, const Bf16* queries, float* to) const {
    const int64_t even = count + count % 2;
    for (int64_t j = count * line; j < even * line; ++j) of[j] = {};
    zip(of, line, even, keys, left);
    zip(queries, 2 * width, even, dim, right);
    matmul(args.keys, dim, even / 2, left, 1, keys, right, dim, to, dim, start > 0);
  }

  // e^(score - the largest) of a query, as floats or rounded; returns their sum
  template <bool kRounded>
  float exponentials(int64_t query, float* scores, Bf16* rounded) const {
    constexpr float kLog2 = 1.44269504f;
    // of a positive scale the largest product is the largest score
    const bool scaled = args.bias != nullptr || !(args.scale > 0 && args.scale < 1e30f);
    if (scaled)
      for (int64_t j = 0; j < keys; ++j) scores[j] *= args.scale;
    add_bias(query, scores);
    const float largest = hide(scores), factor = scaled ? kLog2 : args.scale * kLog2;
    Vec total{};
    by_two_vectors(keys, [&](int64_t j, auto both) FASTMIM_STEP {
      const Vec first = power_of_two((load(scores + j) - largest) * factor);
      const Vec second = both ? power_of_two((load(scores + j + VL) - largest) * factor) : Vec{};
      total += first + second;
      if constexpr (kRounded) {
        store(along(rounded + j), narrowed(first, second));
      } else {
        store(scores + j, first);
        if constexpr (both) store(scores + j + VL, second);
      }
    });
    return divisor_of(sum_of(total));
  }

  // P and dS of a query in place of its exponentials and dP, and both rounded
  void differentiate(float* p_row, float* dp_row, float inverse, Bf16* p_rounded, Bf16* ds_rounded) const {
    Vec mean{};
    by_two_vectors(keys, [&](int64_t j, auto both) FASTMIM_STEP {
      const Vec first = load(p_row + j) * inverse, second = both ? load(p_row + j + VL) * inverse : Vec{};
      store(p_row + j, first);
      mean += first * load(dp_row + j);
      if constexpr (both) {
        store(p_row + j + VL, second);
        mean += second * load(dp_row + j + VL);
      }
      store(along(p_rounded + j), narrowed(first, second));
    });
    const float shift = refined(mean, p_row, dp_row);
    by_two_vectors(keys, [&](int64_t j, auto both) FASTMIM_STEP {
      const Vec first = load(p_row + j) * (load(dp_row + j) - shift);
      const Vec second = both ? load(p_row + j + VL) * (load(dp_row + j + VL) - shift) : Vec{};
      store(dp_row + j, first);
      if constexpr (both) store(dp_row + j + VL, second);
      store(along(ds_rounded + j), narrowed(first, second));
    });
  }

  // a block's scores, which is left to exponentials
  void scores(int64_t start, int64_t count) const {
    read_queries(args.q, start, count, q);
    by_keys(count, q, kt, p);
  }

  void forward(int64_t item, int64_t end) {
    turn_to(item, end);
    read_keys(args.k);
    transpose(along(rows), width, kt, keys, keys, width);
    read_keys(args.v);
    zip(rows, 2 * width, keys, dim, zipped);
    float inverse[kRows];
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t count = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, count);
      // rounded before they are normalised: the largest, 1, is exact
      for (int64_t i = 0; i < count; ++i)
        inverse[i] = 1 / exponentials<true>(start + i, p + i * keys, weights + i * line);
      by_weights(count, weights);
      write(args.out, start, count, out, [&](int64_t i) { return inverse[i]; }, nullptr);
    }
  }

  void backward(int64_t item, int64_t end) {
    turn_to(item, end);
    read_keys(args.v);
    transpose(along(rows), width, vt, keys, keys, width);
    read_keys(args.k);
    transpose(along(rows), width, kt, keys, keys, width);
    zip(rows, 2 * width, keys, dim, zipped);
    if (args.queries == 0) {
      for (int64_t i = 0; i < keys * dim; ++i) dk[i] = dv[i] = 0;
    }
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t count = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, count);
      read_queries(args.grad, start, count, g);
      by_keys(count, g, vt, dp);
      for (int64_t i = 0; i < count; ++i) {
        float *p_row = p + i * keys, *dp_row = dp + i * keys;
        const float inverse = 1 / exponentials<false>(start + i, p_row, nullptr);
        differentiate(p_row, dp_row, inverse, weights + i * line, slopes + i * line);
      }
      keep_slopes(start, count);
      by_queries(start, count, slopes, q, dk);
      by_queries(start, count, weights, g, dv);
      by_weights(count, slopes);
      write_gradient(0, args.dq, start, count, out, args.scale);
    }
    write_gradient(1, args.dk, 0, args.keys, dk, args.scale);
    write_gradient(2, args.dv, 0, args.keys, dv, 1);
  }
};

// whether all of it is of bf16, as it is wherever the op makes it so
static bool of_bf16(const Attention& args) {
  return args.q.type == Type::bf16 && (args.grad.data == nullptr || args.grad.type == Type::bf16);
}

static void attention(const Attention& args, int64_t begin, int64_t end) {
  if (!of_bf16(args)) return avx512_kernels.attention(args, begin, end);
  PairItem item(args, false);
  for (int64_t i = begin; i < end; ++i) item.forward(i, end);
}

static void attention_backward(const Attention& args, int64_t begin, int64_t end) {
  if (!of_bf16(args)) return avx512_kernels.attention_backward(args, begin, end);
  PairItem item(args, true);
  for (int64_t i = begin; i < end; ++i) item.backward(i, end);
}
