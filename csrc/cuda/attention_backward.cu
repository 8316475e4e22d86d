// Attention over short sequences, backward, in one kernel that reads neither the result nor statistics of the softmax.
//
//   p = softmax(scale q kᵀ), recomputed, dp = dout vᵀ, ds = p (dp - rowsum(p dp))
//   dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dout
//
// Division of work: an item is a (sequence, head); a block holds all of q, dout, k and v of one item, or of several
// where they are short. First a warp takes 16 queries (TILES times 16 in the longest form): it computes p and ds for
// BLOCK keys in registers, adds to dq there, and writes p and ds to shared memory. After a barrier a warp takes 16 keys
// and one of dk and dv, which it sums over all queries, in order: no atomics.
// Up to BLOCK keys there is one round and every product is made once (5). Beyond, LONG: a first pass finds each row's
// maximum, sum and rowsum(p dp) (2 more products), then there is a round for each BLOCK keys.
// float16 can't hold every ds: it is divided by a factor of its item, at least its largest value / 2^15, where that is
// over 1. Finding the factors takes one more barrier.
// Shared memory in order; rows of T (2 bytes) as in attention.h, Sq and Sk padded to multiples of 16:
//   q          items x Sq rows of D + 8 values; dq at the end
//   dout       items x Sq rows
//   k          items x Sk rows; dk once their round is over
//   v          items x Sk rows; dv likewise
//   p          items x Sq rows of BLOCK + 8 values
//   ds         items x Sq rows of BLOCK + 8 values
//   largest    a float of each 16 queries: their largest ds
//   attended   a byte of each key
// Per item: (3 Sq + 4 Sk) D values of memory, 10 Sq Sk D FLOPs (14 where LONG), Sq Sk exponentials (twice where LONG).
// ViT-L's encoder at 75% masking (batch 256, 16 heads, S = 50, D = 64): 184 MB and 6.6 GFLOP a call, 4096 blocks of 54
// KiB; its decoder (S = 197, D = 32, LONG): 361 MB and 71 GFLOP, 4096 blocks of 124 KiB, one to a multiprocessor.
#include "attention.h"

namespace fastmim::cuda {

namespace {

constexpr int kShort = 64, kMostRows = 256;

struct Plan {
  Attention args;
  int items, tiles, queries, keys;  // of a block: items, tiles of 16 queries of each, padded queries and keys of each
};

template <typename T, int D, int BLOCK>
struct Shared {
  static constexpr int kWeights = BLOCK + 8;
  T *q, *grad, *k, *v, *p, *ds;
  float* largest;
  uint8_t* attends;

  FASTMIM_DEVICE explicit Shared(const Plan& plan) {
    const int queries = plan.items * plan.queries, keys = plan.items * plan.keys;
    q = reinterpret_cast<T*>(shared_memory());
    grad = q + queries * kPitch<D>;
    k = grad + queries * kPitch<D>;
    v = k + keys * kPitch<D>;
    p = v + keys * kPitch<D>;
    ds = p + queries * kWeights;
    largest = reinterpret_cast<float*>(ds + queries * kWeights);
    attends = reinterpret_cast<uint8_t*>(largest + queries / kTile);
  }

  static int64_t bytes(const Plan& plan) {
    const int64_t queries = int64_t{plan.items} * plan.queries, keys = int64_t{plan.items} * plan.keys;
    const int64_t values = 2 * (queries + keys) * kPitch<D> + 2 * queries * kWeights;
    return values * static_cast<int64_t>(sizeof(T)) + queries / kTile * static_cast<int64_t>(sizeof(float)) + keys;
  }
};

template <typename T, int D, int BLOCK, int WARPS>
FASTMIM_DEVICE void fetch(const Plan& plan, const Shared<T, D, BLOCK>& shared) {
  const Attention& args = plan.args;
  constexpr int kWords = D / 8, kThreads = WARPS * kLanes;
  for (int item = 0; item < plan.items; ++item) {
    const auto [b, h] = item_of(args, plan.items, item);
    for (int i = thread(); i < plan.keys * kWords; i += kThreads) {
      const int key = i / kWords, word = i % kWords, row = item * plan.keys + key;
      const bool attended = attends_to(args, b < args.batch, b, key);
      const int64_t from_b = attended ? b : 0, from_key = attended ? key : 0;
      fetch_word(shared.k + row * kPitch<D>, row_of<T>(args.k, from_b, h, from_key), word, args.dim, attended);
      fetch_word(shared.v + row * kPitch<D>, row_of<T>(args.v, from_b, h, from_key), word, args.dim, attended);
      if (word == 0) store(shared.attends + row, static_cast<uint8_t>(attended));
    }
    for (int i = thread(); i < plan.queries * kWords; i += kThreads) {
      const int query = i / kWords, word = i % kWords, row = item * plan.queries + query;
      const bool valid = b < args.batch && query < args.queries;
      const int64_t from_b = valid ? b : 0, from_query = valid ? query : 0;
      fetch_word(shared.q + row * kPitch<D>, row_of<T>(args.q, from_b, h, from_query), word, args.dim, valid);
      fetch_word(shared.grad + row * kPitch<D>, row_of<T>(args.grad, from_b, h, from_query), word, args.dim, valid);
    }
  }
}

// of the two rows of a lane: maximum of the scores, one over the sum of weights, sum of p dp
struct Statistics {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, mean[2] = {0, 0};
};

// scores and dp of 16 queries by BLOCK keys
template <typename T, int D, int BLOCK>
FASTMIM_DEVICE void make_scores(const Plan& plan, const Shared<T, D, BLOCK>& shared, int job, int from,
                                float (&scores)[BLOCK / 8][4], float (&slope)[BLOCK / 8][4]) {
  const int count = plan.keys - from < BLOCK ? plan.keys - from : BLOCK;
  const int key = job / plan.tiles * plan.keys + from;
  uint32_t rows[D / 16][4];
  load_rows<T, D>(rows, shared.q + job * kTile * kPitch<D>);
  multiply_by_rows<T, D, BLOCK>(scores, rows, shared.k + key * kPitch<D>, count);
  mask_scores<BLOCK>(scores, shared.attends + key, count, plan.args.scale * kLog2e);
  load_rows<T, D>(rows, shared.grad + job * kTile * kPitch<D>);
  multiply_by_rows<T, D, BLOCK>(slope, rows, shared.v + key * kPitch<D>, count);
}

// adds BLOCK keys to the statistics; scores become e^(score - top)
template <int BLOCK>
FASTMIM_DEVICE void add_statistics(Statistics& of, float (&scores)[BLOCK / 8][4], const float (&slope)[BLOCK / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float highest = fmaxf(of.top[half], largest_of_row<BLOCK>(scores, half));
    const float shift = highest == -INFINITY ? 0 : highest, factor = exp2_of(of.top[half] - shift);
    of.top[half] = highest;
    of.sum[half] = of.sum[half] * factor + exponentiate_row<BLOCK>(scores, half, shift);
    float mean = of.mean[half] * factor;
#pragma unroll
    for (int n = 0; n < BLOCK / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) mean += scores[n][i] == 0 ? 0 : scores[n][i] * slope[n][i];
    }
    of.mean[half] = mean;
  }
}

// sums over the lanes of a row; `sum` becomes one over itself
FASTMIM_DEVICE void finish_statistics(Statistics& of) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_of_lanes<4>(of.sum[half]);
    of.sum[half] = total == 0 ? 0 : 1 / total;
    of.mean[half] = sum_of_lanes<4>(of.mean[half]) * of.sum[half];
  }
}

// e^(score - top) become p, dp becomes ds
template <int BLOCK>
FASTMIM_DEVICE void make_slopes(const Statistics& of, float (&weights)[BLOCK / 8][4], float (&slope)[BLOCK / 8][4]) {
#pragma unroll
  for (int n = 0; n < BLOCK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool attended = weights[n][i] != 0;
      weights[n][i] = attended ? weights[n][i] * of.sum[i / 2] : 0;
      slope[n][i] = attended ? weights[n][i] * (slope[n][i] - of.mean[i / 2]) : 0;
    }
  }
}

// the largest finite magnitude that a warp's lanes hold
template <int BLOCK>
FASTMIM_DEVICE float largest_size(const float (&value)[BLOCK / 8][4]) {
  float largest = 0;
#pragma unroll
  for (int n = 0; n < BLOCK / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float size = fabsf(value[n][i]);
      largest = fmaxf(largest, size < INFINITY ? size : 0);
    }
  }
  return largest_of_lanes(largest);
}

// writes a job's largest ds for the block; the caller adds the barrier
FASTMIM_DEVICE void write_largest(float* largest, int job, float value) {
  if (lane() == 0) store(largest + job, value);
}

// the factor that the ds of an item are divided by
template <typename T>
FASTMIM_DEVICE float factor_of(const float* largest, int tiles) {
  float factor = 1;
  if constexpr (std::is_same_v<T, F16>) {
    for (int tile = 0; tile < tiles; ++tile) factor = fmaxf(factor, load(largest + tile) * 0x1p-15f);
  }
  return factor;
}

// dv (which = 0) or dk of 16 keys, `key` of the item and `column` of the round, over all queries of the item
template <typename T, int D, int BLOCK>
FASTMIM_DEVICE void sum_over_queries(const Plan& plan, const Shared<T, D, BLOCK>& shared, int item, int key, int column,
                                     int which) {
  const int query = item * plan.queries;
  const T* weights = (which ? shared.ds : shared.p) + query * shared.kWeights;
  const T* rows = (which ? shared.q : shared.grad) + query * kPitch<D>;
  float sum[D / 8][4] = {};
  for (int from = 0; from < plan.queries; from += kTile) {
    uint32_t left[4];
    load_matrices_transposed(left, weights + columns_first<BLOCK + 8>(from, column));
    multiply_by_columns<T, D>(sum, left, rows + from * kPitch<D>);
  }
  const float scale = which ? plan.args.scale * factor_of<T>(shared.largest + item * plan.tiles, plan.tiles) : 1;
  // these keys are not read any more
  T* tile = (which ? shared.k : shared.v) + (item * plan.keys + key) * kPitch<D>;
  write_tile<T, D>(tile, kPitch<D>, sum, scale, scale);
  const auto [b, h] = item_of(plan.args, plan.items, item);
  if (b >= plan.args.batch) return;
  store_rows<T, D>(which ? plan.args.dk : plan.args.dv, b, h, key, plan.args.keys, plan.args.dim, tile);
}

template <typename T, int D, int BLOCK, int WARPS, int TILES, bool LONG>
FASTMIM_KERNEL(WARPS* kLanes, LONG ? 1 : 2)
attention_backward_kernel(Plan plan) {
  const Attention& args = plan.args;
  const Shared<T, D, BLOCK> shared(plan);
  constexpr bool kNarrow = std::is_same_v<T, F16>;
  const int jobs = plan.items * plan.tiles;
  fetch<T, D, BLOCK, WARPS>(plan, shared);
  wait_for_copies();
  sync_block();

  float dq[TILES][D / 8][4] = {};
  Statistics statistics[TILES];
  float scores[BLOCK / 8][4], slope[BLOCK / 8][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int job = warp() + i * WARPS;
    if (job >= jobs) continue;
    float largest = 0;
    for (int from = 0; from < plan.keys; from += BLOCK) {
      make_scores<T, D, BLOCK>(plan, shared, job, from, scores, slope);
      if (LONG && kNarrow) largest = fmaxf(largest, 2 * largest_size<BLOCK>(slope));
      add_statistics<BLOCK>(statistics[i], scores, slope);
    }
    finish_statistics(statistics[i]);
    if (!LONG) make_slopes<BLOCK>(statistics[i], scores, slope);
    if (!LONG && kNarrow) largest = largest_size<BLOCK>(slope);
    if (kNarrow) write_largest(shared.largest, job, largest);
  }
  if (kNarrow) sync_block();

  for (int from = 0; from < plan.keys; from += BLOCK) {
    const int count = plan.keys - from < BLOCK ? plan.keys - from : BLOCK;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int job = warp() + i * WARPS;
      if (job >= jobs) continue;
      if constexpr (LONG) {
        make_scores<T, D, BLOCK>(plan, shared, job, from, scores, slope);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float top = statistics[i].top[half];
          exponentiate_row<BLOCK>(scores, half, top == -INFINITY ? 0 : top);
        }
        make_slopes<BLOCK>(statistics[i], scores, slope);
      }
      const int item = job / plan.tiles;
      const float inverse = 1 / factor_of<T>(shared.largest + item * plan.tiles, plan.tiles);
#pragma unroll
      for (int n = 0; n < BLOCK / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) slope[n][j] *= inverse;
      }
      write_tile<T, BLOCK>(shared.p + job * kTile * shared.kWeights, shared.kWeights, scores, 1, 1);
      write_tile<T, BLOCK>(shared.ds + job * kTile * shared.kWeights, shared.kWeights, slope, 1, 1);
      multiply_weights<T, D, BLOCK>(dq[i], slope, shared.k + (item * plan.keys + from) * kPitch<D>, count);
    }
    sync_block();
    const int tiles = count / kTile, work = plan.items * tiles * 2;
    for (int i = warp(); i < work; i += WARPS) {
      const int column = i / 2 % tiles * kTile;
      sum_over_queries<T, D, BLOCK>(plan, shared, i / 2 / tiles, from + column, column, i % 2);
    }
    sync_block();
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const int job = warp() + i * WARPS;
    if (job >= jobs) continue;
    const auto [b, h] = item_of(args, plan.items, job / plan.tiles);
    const float factor = args.scale * factor_of<T>(shared.largest + job / plan.tiles * plan.tiles, plan.tiles);
    // the queries' rows are free now
    T* tile = shared.q + job * kTile * kPitch<D>;
    write_tile<T, D>(tile, kPitch<D>, dq[i], factor, factor);
    if (b < args.batch) store_rows<T, D>(args.dq, b, h, job % plan.tiles * kTile, args.queries, args.dim, tile);
  }
}

// a form's plan, launch and kernel
template <typename T, int D, int BLOCK, int WARPS, int TILES, bool LONG, typename Chosen>
void with_form(const Attention& args, const Chosen& chosen) {
  const int tiles = round_up(args.queries, kTile) / kTile, items = !LONG && tiles < WARPS ? WARPS / tiles : 1;
  const Plan plan{args, items, tiles, tiles * kTile, round_up(args.keys, kTile)};
  const int64_t blocks = (args.batch * args.heads + items - 1) / items;
  const Shape shape{blocks, WARPS * kLanes, Shared<T, D, BLOCK>::bytes(plan)};
  chosen(plan, shape, attention_backward_kernel<T, D, BLOCK, WARPS, TILES, LONG>);
}

template <typename Chosen>
void with_plan(const Attention& args, const Chosen& chosen) {
  with_head(args, [&](auto zero, auto dim) {
    using T = decltype(zero);
    constexpr int D = decltype(dim)::value;
    if (args.queries > kShort || args.keys > kShort) {
      if (args.queries <= 128) return with_form<T, D, 64, 8, 1, true>(args, chosen);
      if constexpr (D <= 64) return with_form<T, D, 64, 8, 2, true>(args, chosen);
    }
    if (args.keys <= kTile) return with_form<T, D, kTile, 4, 1, false>(args, chosen);
    return with_form<T, D, 64, 4, 1, false>(args, chosen);
  });
}

}  // namespace

const char* refuses_attention_backward(const Attention& args) {
  if (const char* reason = refuses_heads(args)) return reason;
  if (args.keys > kMostRows || args.queries > kMostRows) return "gradients of up to 256 queries and keys are served";
  if (args.queries > 128 && args.dim > 64) return "gradients of over 128 queries are served up to head dimension 64";
  const char* reason = nullptr;
  with_plan(args, [&](const Plan&, const Shape& shape, auto) {
    if (shape.shared > shared_limit()) reason = "the rows of a sequence exceed this device's shared memory";
  });
  return reason;
}

void launch_attention_backward(const Attention& args, Stream stream) {
  with_plan(args, [&](const Plan& plan, const Shape& shape, auto kernel) {
    launch("attention_backward", kernel, shape, stream, plan);
  });
}

}  // namespace fastmim::cuda
