// Attention of bf16 by products of pairs of values, which are adjacent along the axis that a product sums over: values
// of Q, K, V and dO as they lie in memory where it sums over the head dimension, two interleaved rows where it sums
// over keys or queries. Products are exact; of the intermediate values, P and dS are rounded to bf16, all others are
// floats.

static_assert(kRows % 2 == 0);

struct PairItem : AttentionItem {
  // words of a row along the head dimension: in use, and with their padding
  const int64_t words = (args.dim + 1) / 2, width = padded(words);
  // a tensor's rows, those of a block of queries, P or dS of the block
  Bf16 *rows, *q, *g, *weights;
  // K and V along the head dimension; V, in the backward pass K, along keys; what a product along queries takes
  Pair *kt, *vt, *zipped, *left, *right;

  PairItem(const Attention& a, bool backward) : AttentionItem(a, backward) {
    rows = &pairs(keys * width)->first;
    q = &pairs(kRows * width)->first;
    weights = &pairs(kRows * keys / 2)->first;
    kt = pairs(width * keys);
    zipped = pairs(keys / 2 * dim);
    g = nullptr;
    vt = left = right = nullptr;
    if (backward) {
      g = &pairs(kRows * width)->first;
      vt = pairs(width * keys);
      left = pairs(kRows / 2 * keys);
      right = pairs(kRows / 2 * dim);
    }
  }

  Pair* pairs(int64_t count) { return reinterpret_cast<Pair*>(memory.take(count)); }
  static const Pair* along(const Bf16* values) { return reinterpret_cast<const Pair*>(values); }

  void read_keys(const View& view) const { read(view, 0, args.keys, keys, rows, 2 * width, true); }
  void read_queries(const View& view, int64_t start, int64_t count, Bf16* to) const {
    read(view, start, count, count + count % 2, to, 2 * width, false);
  }

  // to (count, keys) of floats: rows of queries by those of keys
  void by_keys(int64_t count, const Bf16* queries, const Pair* transposed, float* to) const {
    matmul(count, keys, words, along(queries), width, 1, transposed, keys, to, keys, false);
  }

  // out (count, dim): weights by rows of keys
  void by_weights(int64_t count) const {
    matmul(count, dim, (args.keys + 1) / 2, along(weights), keys / 2, 1, zipped, dim, out, dim, false);
  }

  // to (keys, dim) += weights (count, keys) transposed by rows of queries
  void by_queries(int64_t start, int64_t count, float* by, const Bf16* queries, float* to) const {
    const int64_t even = count + count % 2;
    for (int64_t j = count * keys; j < even * keys; ++j) by[j] = 0;
    zip(by, keys, even, keys, left);
    zip(queries, 2 * width, even, dim, right);
    matmul(args.keys, dim, even / 2, left, 1, keys, right, dim, to, dim, start > 0);
  }

  // p = e^(scores - row maximum) of a block, and each row's sum
  void scores(int64_t start, int64_t count, float* sums) const {
    read_queries(args.q, start, count, q);
    by_keys(count, q, kt, p);
    for (int64_t i = 0; i < count; ++i) {
      float* line = p + i * keys;
      for (int64_t j = 0; j < keys; ++j) line[j] *= args.scale;
      sums[i] = divisor_of(exponentials(start + i, line));
    }
  }

  void round(int64_t count, const float* from) const {
    for (int64_t i = 0; i < count * keys; ++i) weights[i] = narrow<Bf16>(from[i]);
  }

  void forward(int64_t item, int64_t end) {
    turn_to(item, end);
    read_keys(args.k);
    transpose(along(rows), width, kt, keys, keys, width);
    read_keys(args.v);
    zip(rows, 2 * width, keys, dim, zipped);
    float sums[kRows];
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t count = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, count, sums);
      // before they are normalised: the largest, 1, is exact
      round(count, p);
      by_weights(count);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < dim; ++d) out[i * dim + d] /= sums[i];
      write(args.out, start, count, out);
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
    float sums[kRows];
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t count = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, count, sums);
      read_queries(args.grad, start, count, g);
      by_keys(count, g, vt, dp);
      for (int64_t i = 0; i < count; ++i) slopes(p + i * keys, dp + i * keys, sums[i]);
      keep_slopes(start, count);
      by_queries(start, count, dp, q, dk);
      by_queries(start, count, p, g, dv);
      round(count, dp);
      by_weights(count);
      for (int64_t i = 0; i < count * dim; ++i) out[i] *= args.scale;
      write_gradient(0, args.dq, start, count, out);
    }
    for (int64_t i = 0; i < keys * dim; ++i) dk[i] *= args.scale;
    write_gradient(1, args.dk, 0, args.keys, dk);
    write_gradient(2, args.dv, 0, args.keys, dv);
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
