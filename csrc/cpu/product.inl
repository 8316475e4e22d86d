// Products and transposes of small matrices in cache, of floats or of any type that `add_product` takes.

constexpr int kTileRows = FASTMIM_VL >= 8 ? 6 : 4;
constexpr int kTileVecs = FASTMIM_VL == 16 ? 4 : 2;
// terms that are summed before they are added to those before them: long chains of floats lose digits
constexpr int64_t kTerms = 64;

FASTMIM_HD Vec add_product(Vec sum, Vec left, Vec right) {
  return sum + left * right;
}

// C (M, N) = A (M, K) B (K, N), or += where `add`; A by strides, rows of B and C aligned, N a multiple of VL.
// A small C leaves registers for several partial sums of each value: short chains of additions are more exact and have
// less latency. Their number depends only on the rows of the tile and on W, the width of the widest tile of C, so that
// all values of a row of C are summed in one order, and equal inputs give equal sums.
template <int MR, int NV, int W, typename T>
FASTMIM_HD void tile(int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, float* c, int64_t ldc,
                     bool add) {
  constexpr int kRoom = kTileRows * kTileVecs / (MR * W), kSums = kRoom < 8 ? kRoom : 8;
  Vec acc[kSums][MR][NV] = {};
  const auto step = [&](int64_t k, int s) __attribute__((always_inline)) {
    decltype(load(b)) row[NV];
    for (int n = 0; n < NV; ++n) row[n] = load(b + k * ldb + n * VL);
    for (int m = 0; m < MR; ++m) {
      const auto left = splat(a[m * am + k * ak]);
      for (int n = 0; n < NV; ++n) acc[s][m][n] = add_product(acc[s][m][n], left, row[n]);
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
template <int MR, int NV, int W, typename T>
FASTMIM_HD void remainder(int64_t rows, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb,
                          float* c, int64_t ldc, bool add) {
  if (rows == MR) {
    tile<MR, NV, W>(K, a, am, ak, b, ldb, c, ldc, add);
  } else if constexpr (MR > 1) {
    remainder<MR - 1, NV, W>(rows, K, a, am, ak, b, ldb, c, ldc, add);
  }
}

template <int NV, int W, typename T>
static void panel(int64_t M, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, float* c,
                  int64_t ldc, bool add) {
  const int64_t pieces = K > kTerms ? (K + kTerms - 1) / kTerms : 1;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = piece * K / pieces, terms = (piece + 1) * K / pieces - from;
    const T *left = a + from * ak, *right = b + from * ldb;
    const bool more = add || piece > 0;
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows)
      tile<kTileRows, NV, W>(terms, left + m * am, am, ak, right, ldb, c + m * ldc, ldc, more);
    remainder<kTileRows - 1, NV, W>(M - m, terms, left + m * am, am, ak, right, ldb, c + m * ldc, ldc, more);
  }
}

template <int W, typename T>
static void panels(int64_t M, int64_t N, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb,
                   float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + W * VL <= N; n += W * VL) panel<W, W>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
  if constexpr (W == 4) {
    for (; n + 2 * VL <= N; n += 2 * VL) panel<2, W>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
  }
  if constexpr (W > 1) {
    for (; n < N; n += VL) panel<1, W>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
  }
}

template <typename T>
static void matmul(int64_t M, int64_t N, int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb,
                   float* c, int64_t ldc, bool add) {
  if (N >= kTileVecs * VL) {
    panels<kTileVecs>(M, N, K, a, am, ak, b, ldb, c, ldc, add);
  } else if (N >= 2 * VL) {
    panels<2>(M, N, K, a, am, ak, b, ldb, c, ldc, add);
  } else {
    panels<1>(M, N, K, a, am, ak, b, ldb, c, ldc, add);
  }
}

template <int S, typename V, int... C>
FASTMIM_HD void exchange(V& low, V& high, std::integer_sequence<int, C...>) {
  const V a = low, b = high;
  low = __builtin_shufflevector(a, b, (C & S ? VL + C - S : C)...);
  high = __builtin_shufflevector(a, b, (C & S ? VL + C : C + S)...);
}

template <int S, typename V>
FASTMIM_HD void exchange_all(V (&rows)[VL]) {
  for (int i = 0; i < VL; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, VL>{});
  if constexpr (2 * S < VL) exchange_all<2 * S>(rows);
}

// to (columns, padded rows) from rows of `ld` values; both counts are padded to VL in memory
template <typename T>
static void transpose(const T* from, int64_t ld, T* to, int64_t ldt, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += VL) {
    for (int64_t c = 0; c < columns; c += VL) {
      decltype(load(from)) block[VL];
      for (int i = 0; i < VL; ++i) block[i] = load(from + (r + i) * ld + c);
      exchange_all<1>(block);
      for (int i = 0; i < VL; ++i) store(to + (c + i) * ldt + r, block[i]);
    }
  }
}
