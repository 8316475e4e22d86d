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

  // rows start..start+count and zeros up to `upto`, each padded with zeros
  void read(const View& view, int64_t start, int64_t count, int64_t upto, float* to, bool masked) const {
    for (int64_t i = 0; i < upto; ++i) {
      float* row_to = to + i * dim;
      const bool real = i < count && !(masked && !attends(start + i));
      if (real) load_row(view.type, row(view, start + i), view.stride[3], row_to, args.dim);
      for (int64_t d = real ? args.dim : 0; d < dim; ++d) row_to[d] = 0;
    }
  }

  void write(const View& view, int64_t start, int64_t count, const float* from) const {
    for (int64_t i = 0; i < count; ++i)
      store_row(view.type, row(view, start + i), view.stride[3], from + i * dim, args.dim);
  }

  // stores rows of dq (0), dk (1) or dv (2), and adds them to its sums
  void write_gradient(int64_t index, const View& view, int64_t start, int64_t count, const float* from) const {
    write(view, start, count, from);
    if (args.sums == nullptr) return;
    float* to = args.sums + ((sequence * 3 + index) * args.heads + head) * args.dim;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < args.dim; ++d) to[d] += from[i * dim + d];
  }

  void open(int64_t item, int64_t end) {
    turn_to(item, end);
    read(args.k, 0, args.keys, keys, k, true);
    read(args.v, 0, args.keys, keys, v, true);
    transpose(k, dim, kt, keys, keys, dim);
  }

  // in place of a query's scores, e^(score + bias - the largest); returns their sum, 1 without any key
  float exponentials(int64_t query, float* scores) const {
    add_bias(query, scores);
    const float largest = hide(scores);
    Vec total{};
    for (int64_t j = 0; j < keys; j += VL) {
      const Vec x = load(scores + j) - largest, e = x < -87.33f ? Vec{} : exponential_in_range(x);
      store(scores + j, e);
      total += e;
    }
    return divisor_of(sum_of(total));
  }

  // P of a query in place of its exponentials, dS in place of dP
  void differentiate(float* p_row, float* dp_row, float inverse) const {
    Vec mean{};
    for (int64_t j = 0; j < keys; j += VL) {
      const Vec probability = load(p_row + j) * inverse;
      store(p_row + j, probability);
      mean += probability * load(dp_row + j);
    }
    const float shift = refined(mean, p_row, dp_row);
    for (int64_t j = 0; j < keys; j += VL) store(dp_row + j, load(p_row + j) * (load(dp_row + j) - shift));
  }

  // p = e^(scores - row maximum) of queries start..start+rows, and the inverse of each row's sum
  void scores(int64_t start, int64_t rows, float* inverse) {
    read(args.q, start, rows, rows, q, false);
    for (int64_t i = 0; i < rows * dim; ++i) q[i] *= args.scale;
    matmul(rows, keys, args.dim, q, dim, 1, kt, keys, p, keys, false);
    for (int64_t i = 0; i < rows; ++i) inverse[i] = 1 / exponentials(start + i, p + i * keys);
  }

  void forward(int64_t item, int64_t end) {
    open(item, end);
    float inverse[kRows];
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t rows = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, rows, inverse);
      matmul(rows, dim, args.keys, p, keys, 1, v, dim, out, dim, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; ++d) out[i * dim + d] *= inverse[i];
      write(args.out, start, rows, out);
    }
  }

  void backward(int64_t item, int64_t end) {
    open(item, end);
    transpose(v, dim, vt, keys, keys, dim);
    float inverse[kRows];
    if (args.queries == 0) {
      for (int64_t i = 0; i < keys * dim; ++i) dk[i] = dv[i] = 0;
    }
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t rows = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, rows, inverse);
      read(args.grad, start, rows, rows, g, false);
      matmul(rows, keys, args.dim, g, dim, 1, vt, keys, dp, keys, false);
      for (int64_t i = 0; i < rows; ++i) differentiate(p + i * keys, dp + i * keys, inverse[i]);
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
