// Attention in floats.

struct FloatItem : AttentionItem {
  float *k, *v, *kt, *vt, *q, *g;

  FloatItem(const Attention& a, bool backward) : AttentionItem(a, backward) {
    k = memory.take(keys * dim);
    v = memory.take(keys * dim);
    kt = memory.take(dim * keys);
    q = memory.take(kRows * dim);
    g = backward ? memory.take(kRows * dim) : nullptr;
    vt = backward ? memory.take(dim * keys) : nullptr;
  }

  void open(int64_t item, int64_t end) {
    turn_to(item, end);
    read(args.k, 0, args.keys, keys, k, dim, true);
    read(args.v, 0, args.keys, keys, v, dim, true);
    transpose(k, dim, kt, keys, keys, dim);
  }

  // p = e^(scores - row maximum) of queries start..start+rows, and each row's sum
  void scores(int64_t start, int64_t rows, float* sums) {
    read(args.q, start, rows, rows, q, dim, false);
    for (int64_t i = 0; i < rows * dim; ++i) q[i] *= args.scale;
    matmul(rows, keys, args.dim, q, dim, 1, kt, keys, p, keys, false);
    for (int64_t i = 0; i < rows; ++i) sums[i] = divisor_of(exponentials(start + i, p + i * keys));
  }

  void forward(int64_t item, int64_t end) {
    open(item, end);
    float sums[kRows];
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t rows = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, rows, sums);
      matmul(rows, dim, args.keys, p, keys, 1, v, dim, out, dim, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; ++d) out[i * dim + d] /= sums[i];
      write(args.out, start, rows, out);
    }
  }

  void backward(int64_t item, int64_t end) {
    open(item, end);
    transpose(v, dim, vt, keys, keys, dim);
    float sums[kRows];
    if (args.queries == 0) {
      for (int64_t i = 0; i < keys * dim; ++i) dk[i] = dv[i] = 0;
    }
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t rows = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, rows, sums);
      read(args.grad, start, rows, rows, g, dim, false);
      matmul(rows, keys, args.dim, g, dim, 1, vt, keys, dp, keys, false);
      for (int64_t i = 0; i < rows; ++i) slopes(p + i * keys, dp + i * keys, sums[i]);
      keep_slopes(start, rows);
      // q holds scale Q already
      matmul(args.keys, dim, rows, dp, 1, keys, q, dim, dk, dim, start > 0);
      matmul(args.keys, dim, rows, p, 1, keys, g, dim, dv, dim, start > 0);
      matmul(rows, dim, args.keys, dp, keys, 1, k, dim, out, dim, false);
      for (int64_t i = 0; i < rows * dim; ++i) out[i] *= args.scale;
      write_gradient(0, args.dq, start, rows, out);
    }
    write_gradient(1, args.dk, 0, args.keys, dk);
    write_gradient(2, args.dv, 0, args.keys, dv);
  }
};

static void attention(const Attention& args, int64_t begin, int64_t end) {
  FloatItem item(args, false);
  for (int64_t i = begin; i < end; ++i) item.forward(i, end);
}

static void attention_backward(const Attention& args, int64_t begin, int64_t end) {
  FloatItem item(args, true);
  for (int64_t i = begin; i < end; ++i) item.backward(i, end);
}
