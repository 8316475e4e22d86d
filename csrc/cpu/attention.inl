// Attention on one (sequence, head) after another, all of it in cache.
//
//   forward    P = softmax(scale Q Kᵀ + bias)    O = P V
//   backward   dP = dO Vᵀ    dS = P (dP - rowsum(P dP))    dQ = scale dS K    dK = scale dSᵀ Q    dV = Pᵀ dO
//
// Neither O nor the softmax's statistics are needed by the backward pass. Queries are taken kRows at a time; K and V
// stay in scratch as floats, transposed where a product wants them so.

constexpr int64_t kRows = 66;

constexpr int kTileRows = FASTMIM_VL == 16 ? 6 : 4;
constexpr int kTileVecs = FASTMIM_VL == 16 ? 4 : 2;
// terms that are summed before they are added to those before them: long chains of floats lose digits
constexpr int64_t kTerms = 64;

// C (M, N) = A (M, K) B (K, N), or += where `add`; A by strides, rows of B and C aligned, N a multiple of VL.
// A narrow C leaves registers for several sums of each of its values.
template <int MR, int NV>
FASTMIM_HD void tile(int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                     int64_t ldc, bool add) {
  constexpr int kSums = kTileVecs / NV;
  Vec acc[kSums][MR][NV] = {};
  const auto step = [&](int64_t k, int s) {
    Vec row[NV];
    for (int n = 0; n < NV; ++n) row[n] = load(b + k * ldb + n * VL);
    for (int m = 0; m < MR; ++m) {
      const Vec left = splat(a[m * am + k * ak]);
      for (int n = 0; n < NV; ++n) acc[s][m][n] += left * row[n];
    }
  };
  int64_t k = 0;
  for (; k + kSums <= K; k += kSums)
    for (int s = 0; s < kSums; ++s) step(k + s, s);
  for (; k < K; ++k) step(k, 0);
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      Vec sum = acc[0][m][n];
      for (int s = 1; s < kSums; ++s) sum += acc[s][m][n];
      float* to = c + m * ldc + n * VL;
      store(to, add ? load(to) + sum : sum);
    }
  }
}

// the last rows of a panel, fewer than kTileRows
template <int MR, int NV>
FASTMIM_HD void remainder(int64_t rows, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                          float* c, int64_t ldc, bool add) {
  if (rows == MR) {
    tile<MR, NV>(K, a, am, ak, b, ldb, c, ldc, add);
  } else if constexpr (MR > 1) {
    remainder<MR - 1, NV>(rows, K, a, am, ak, b, ldb, c, ldc, add);
  }
}

template <int NV>
static void panel(int64_t M, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                  int64_t ldc, bool add) {
  const int64_t pieces = K > kTerms ? (K + kTerms - 1) / kTerms : 1;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = piece * K / pieces, terms = (piece + 1) * K / pieces - from;
    const float *left = a + from * ak, *right = b + from * ldb;
    const bool more = add || piece > 0;
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows)
      tile<kTileRows, NV>(terms, left + m * am, am, ak, right, ldb, c + m * ldc, ldc, more);
    remainder<kTileRows - 1, NV>(M - m, terms, left + m * am, am, ak, right, ldb, c + m * ldc, ldc, more);
  }
}

static void matmul(int64_t M, int64_t N, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + kTileVecs * VL <= N; n += kTileVecs * VL) panel<kTileVecs>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
  if constexpr (kTileVecs == 4) {
    for (; n + 2 * VL <= N; n += 2 * VL) panel<2>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
  }
  for (; n < N; n += VL) panel<1>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
}

template <int S, int... C>
FASTMIM_HD void exchange(Vec& low, Vec& high, std::integer_sequence<int, C...>) {
  const Vec a = low, b = high;
  low = __builtin_shufflevector(a, b, (C & S ? VL + C - S : C)...);
  high = __builtin_shufflevector(a, b, (C & S ? VL + C : C + S)...);
}

template <int S>
FASTMIM_HD void exchange_all(Vec (&rows)[VL]) {
  for (int i = 0; i < VL; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, VL>{});
  if constexpr (2 * S < VL) exchange_all<2 * S>(rows);
}

// to (columns, padded rows) from rows of `ld` floats; both counts are padded to VL in memory
static void transpose(const float* from, int64_t ld, float* to, int64_t ldt, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += VL) {
    for (int64_t c = 0; c < columns; c += VL) {
      Vec block[VL];
      for (int i = 0; i < VL; ++i) block[i] = load(from + (r + i) * ld + c);
      exchange_all<1>(block);
      for (int i = 0; i < VL; ++i) store(to + (c + i) * ldt + r, block[i]);
    }
  }
}

// Scratch of one thread, and what is loaded into it for one (sequence, head).
struct AttentionItem {
  const Attention& args;
  const int64_t dim = padded(args.dim), keys = padded(args.keys);
  Scratch memory;
  float *k, *v, *kt, *vt, *q, *g, *p, *dp, *dq, *dk, *dv, *key_bias;
  int64_t sequence = 0, head = 0;

  AttentionItem(const Attention& a, bool backward) : args(a) {
    k = memory.take(keys * dim);
    v = memory.take(keys * dim);
    kt = memory.take(dim * keys);
    q = memory.take(kRows * dim);
    p = memory.take(kRows * keys);
    key_bias = memory.take(keys);
    g = memory.take(kRows * dim);
    vt = dp = dq = dk = dv = nullptr;
    if (backward) {
      vt = memory.take(dim * keys);
      dp = memory.take(kRows * keys);
      dq = memory.take(kRows * dim);
      dk = memory.take(keys * dim);
      dv = memory.take(keys * dim);
    }
  }

  void* row(const View& view, int64_t position) const {
    return at(view, sequence * view.stride[0] + position * view.stride[1] + head * view.stride[2]);
  }

  bool attends(int64_t key) const {
    return args.key_mask == nullptr ||
           args.key_mask[sequence * args.key_mask_stride[0] + key * args.key_mask_stride[1]];
  }

  // rows start..start+count as floats, width padded with zeros; rows past the end of the padding too
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

  // asks for a row of the next item while this one is worked on: heads lie far apart for the hardware to guess
  void prefetch(const View& view, int64_t item, int64_t rows) const {
    const int64_t size = view.type == Type::f32 ? 4 : 2;
    for (int64_t i = 0; i < rows; ++i) {
      const char* line = static_cast<const char*>(
          at(view, item / args.heads * view.stride[0] + i * view.stride[1] + item % args.heads * view.stride[2]));
      for (int64_t byte = 0; byte < args.dim * size; byte += 64) __builtin_prefetch(line + byte);
    }
  }

  void open(int64_t item, int64_t end) {
    sequence = item / args.heads, head = item % args.heads;
    if (item + 1 < end) {
      prefetch(args.k, item + 1, args.keys);
      prefetch(args.v, item + 1, args.keys);
      prefetch(args.q, item + 1, args.queries);
      if (args.grad.data != nullptr) prefetch(args.grad, item + 1, args.queries);
    }
    read(args.k, 0, args.keys, keys, k, true);
    read(args.v, 0, args.keys, keys, v, true);
    transpose(k, dim, kt, keys, keys, dim);
    for (int64_t j = 0; j < keys; ++j) key_bias[j] = j < args.keys && attends(j) ? 0.0f : -__builtin_inff();
  }

  // p = e^(scores - row maximum) of queries start..start+rows, and one over each row's sum; 0 without any key
  void scores(int64_t start, int64_t rows, float* inverse) {
    read(args.q, start, rows, rows, q, false);
    for (int64_t i = 0; i < rows * dim; ++i) q[i] *= args.scale;
    matmul(rows, keys, args.dim, q, dim, 1, kt, keys, p, keys, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* line = p + i * keys;
      if (args.bias != nullptr) {
        const int64_t* stride = args.bias_stride;
        const float* bias = args.bias + sequence * stride[0] + head * stride[1] + (start + i) * stride[2];
        for (int64_t j = 0; j < args.keys; ++j) line[j] += bias[j * stride[3]];
      }
      Vec top = splat(-__builtin_inff());
      for (int64_t j = 0; j < keys; j += VL) {
        const Vec hidden = load(key_bias + j), score = hidden < 0.0f ? hidden : load(line + j);
        store(line + j, score);
        top = larger(score, top);
      }
      float highest = largest_in(top);
      if (highest == -__builtin_inff()) highest = 0;
      Vec total{};
      for (int64_t j = 0; j < keys; j += VL) {
        const Vec e = exponential(load(line + j) - highest);
        store(line + j, e);
        total += e;
      }
      const float sum = sum_of(total);
      inverse[i] = sum == 0 ? 0 : 1 / sum;
    }
  }

  void forward(int64_t item, int64_t end) {
    open(item, end);
    float inverse[kRows];
    for (int64_t start = 0; start < args.queries; start += kRows) {
      const int64_t rows = args.queries - start < kRows ? args.queries - start : kRows;
      scores(start, rows, inverse);
      matmul(rows, dim, args.keys, p, keys, 1, v, dim, g, dim, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; ++d) g[i * dim + d] *= inverse[i];
      write(args.out, start, rows, g);
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
      for (int64_t i = 0; i < rows; ++i) {
        float *line = p + i * keys, *slope = dp + i * keys;
        Vec mean{};
        for (int64_t j = 0; j < keys; j += VL) {
          const Vec probability = load(line + j) * inverse[i];
          store(line + j, probability);
          mean += probability * load(slope + j);
        }
        const float shift = sum_of(mean);
        for (int64_t j = 0; j < keys; j += VL) store(slope + j, load(line + j) * (load(slope + j) - shift));
      }
      // q holds scale Q already
      matmul(args.keys, dim, rows, dp, 1, keys, q, dim, dk, dim, start > 0);
      matmul(args.keys, dim, rows, p, 1, keys, g, dim, dv, dim, start > 0);
      matmul(rows, dim, args.keys, dp, keys, 1, k, dim, dq, dim, false);
      for (int64_t i = 0; i < rows * dim; ++i) dq[i] *= args.scale;
      write(args.dq, start, rows, dq);
    }
    write(args.dk, 0, args.keys, dk);
    write(args.dv, 0, args.keys, dv);
  }
};

static void attention(const Attention& args, int64_t begin, int64_t end) {
  AttentionItem item(args, false);
  for (int64_t i = begin; i < end; ++i) item.forward(i, end);
}

static void attention_backward(const Attention& args, int64_t begin, int64_t end) {
  AttentionItem item(args, true);
  for (int64_t i = begin; i < end; ++i) item.backward(i, end);
}
