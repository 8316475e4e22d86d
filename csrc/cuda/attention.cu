// Attention over short sequences, forward.
//
//   out[i] = sum_j p[i, j] v[j],  p[i, :] = softmax over the attended keys j of scale q[i] . k[j];  0 without any key
//
// Division of work: an item is a (sequence, head). A block of four warps holds the keys and values of one item, or of
// several where they are short; a warp computes 16 queries of one item: their scores for BLOCK keys, in registers, and
// their result. Longer sequences go BLOCK keys at a time, with a running maximum and sum, and 16 queries at a time.
// In a fragment a lane holds parts of two rows, g and g + 8 with g = lane / 4, which it shares with three lanes.
// Steps: all threads send keys and values to shared memory, each warp its queries; barrier; a warp multiplies its
// queries by BLOCK keys, turns scores into weights, and adds the weights times the values to its result; the result
// goes through the queries' place in shared memory, so that it is written in whole 16-byte words.
// Shared memory in order; rows of T (2 bytes) lie D + 8 apart (attention.h), Sk is padded to a multiple of 16:
//   keys       items x Sk rows
//   values     items x Sk rows
//   queries    16 rows of each warp; later its results
//   attended   a byte of each key
// Per item: (2 Sq + 2 Sk) D values of memory, 4 Sq Sk D FLOPs, Sq Sk exponentials. ViT-L's encoder at 75% masking
// (batch 256, 16 heads, S = 50, D = 64): 105 MB and 2.6 GFLOP a call, 4.3 with the padding; 4096 blocks of 27 KiB.
// Registers: 64 keys and D = 64 take 32 of scores, 32 of results and 16 of queries, so that several blocks share a
// multiprocessor.
#include "attention.h"

namespace fastmim::cuda {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;

struct Plan {
  Attention args;
  int items, tiles, keys;  // of a block: items, tiles of 16 queries of each, its keys padded to tiles
};

template <typename T, int D>
struct Shared {
  T *keys, *values, *queries;
  uint8_t* attends;

  FASTMIM_DEVICE explicit Shared(const Plan& plan) {
    const int rows = plan.items * plan.keys;
    keys = reinterpret_cast<T*>(shared_memory());
    values = keys + rows * kPitch<D>;
    queries = values + rows * kPitch<D>;
    attends = reinterpret_cast<uint8_t*>(queries + kWarps * kTile * kPitch<D>);
  }

  static int64_t bytes(const Plan& plan) {
    const int64_t rows = int64_t{plan.items} * plan.keys;
    return (2 * rows + kWarps * kTile) * kPitch<D> * static_cast<int64_t>(sizeof(T)) + rows;
  }
};

template <typename T, int D>
FASTMIM_DEVICE void fetch_keys(const Plan& plan, const Shared<T, D>& shared) {
  const Attention& args = plan.args;
  for (int item = 0; item < plan.items; ++item) {
    const auto [b, h] = item_of(args, plan.items, item);
    for (int i = thread(); i < plan.keys * (D / 8); i += kThreads) {
      const int key = i / (D / 8), word = i % (D / 8), row = item * plan.keys + key;
      const bool attended = attends_to(args, b < args.batch, b, key);
      // masked keys are never read
      const int64_t from_b = attended ? b : 0, from_key = attended ? key : 0;
      fetch_word(shared.keys + row * kPitch<D>, row_of<T>(args.k, from_b, h, from_key), word, args.dim, attended);
      fetch_word(shared.values + row * kPitch<D>, row_of<T>(args.v, from_b, h, from_key), word, args.dim, attended);
      if (word == 0) store(shared.attends + row, static_cast<uint8_t>(attended));
    }
  }
}

template <typename T, int D>
FASTMIM_DEVICE void fetch_queries(const Plan& plan, T* tile, int64_t b, int64_t h, int first) {
  const Attention& args = plan.args;
  for (int i = lane(); i < kTile * (D / 8); i += kLanes) {
    const int row = i / (D / 8), word = i % (D / 8);
    const bool valid = b < args.batch && first + row < args.queries;
    fetch_word(tile + row * kPitch<D>, row_of<T>(args.q, valid ? b : 0, h, valid ? first + row : 0), word, args.dim,
               valid);
  }
}

template <typename T, int D, int BLOCK>
FASTMIM_KERNEL(kThreads, 3)
attention_kernel(Plan plan) {
  const Attention& args = plan.args;
  const Shared<T, D> shared(plan);
  T* tile = shared.queries + warp() * kTile * kPitch<D>;
  const int jobs = plan.items * plan.tiles;

  const auto fetch = [&](int job) {
    const auto [b, h] = item_of(args, plan.items, job / plan.tiles);
    fetch_queries<T, D>(plan, tile, b, h, job % plan.tiles * kTile);
  };
  fetch_keys(plan, shared);
  if (warp() < jobs) fetch(warp());
  wait_for_copies();
  sync_block();
  for (int job = warp(); job < jobs; job += kWarps) {
    const auto [b, h] = item_of(args, plan.items, job / plan.tiles);
    const int first = job % plan.tiles * kTile, key0 = job / plan.tiles * plan.keys;
    if (job != warp()) {
      sync_warp();
      fetch(job);
      wait_for_copies();
      sync_warp();
    }
    uint32_t queries[D / 16][4];
    load_rows<T, D>(queries, tile);
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int from = 0; from < plan.keys; from += BLOCK) {
      const int count = plan.keys - from < BLOCK ? plan.keys - from : BLOCK;
      float scores[BLOCK / 8][4];
      multiply_by_rows<T, D, BLOCK>(scores, queries, shared.keys + (key0 + from) * kPitch<D>, count);
      mask_scores<BLOCK>(scores, shared.attends + key0 + from, count, args.scale * kLog2e);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float highest = fmaxf(top[half], largest_of_row<BLOCK>(scores, half));
        // a row without any key yet has only zeros to scale
        const float shift = highest == -INFINITY ? 0 : highest, factor = exp2_of(top[half] - shift);
        top[half] = highest;
        sum[half] = sum[half] * factor + exponentiate_row<BLOCK>(scores, half, shift);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= factor, out[n][2 * half + 1] *= factor;
      }
      multiply_weights<T, D, BLOCK>(out, scores, shared.values + (key0 + from) * kPitch<D>, count);
    }
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_of_lanes<4>(sum[half]);
      inverse[half] = total == 0 ? 0 : 1 / total;
    }
    sync_warp();
    write_tile<T, D>(tile, kPitch<D>, out, inverse[0], inverse[1]);
    if (b < args.batch) store_rows<T, D>(args.out, b, h, first, args.queries, args.dim, tile);
  }
}

Plan plan_of(const Attention& args) {
  const int tiles = round_up(args.queries, kTile) / kTile;
  return {args, tiles < kWarps ? kWarps / tiles : 1, tiles, round_up(args.keys, kTile)};
}

template <typename Chosen>
void with_plan(const Attention& args, const Chosen& chosen) {
  const Plan plan = plan_of(args);
  const int64_t blocks = (args.batch * args.heads + plan.items - 1) / plan.items;
  with_head(args, [&](auto zero, auto dim) {
    using T = decltype(zero);
    constexpr int D = decltype(dim)::value;
    const Shape shape{blocks, kThreads, Shared<T, D>::bytes(plan)};
    if (plan.keys <= kTile) return chosen(plan, shape, attention_kernel<T, D, kTile>);
    return chosen(plan, shape, attention_kernel<T, D, 64>);
  });
}

}  // namespace

const char* refuses_attention(const Attention& args) {
  if (const char* reason = refuses_heads(args)) return reason;
  const char* reason = nullptr;
  with_plan(args, [&](const Plan&, const Shape& shape, auto) {
    if (shape.shared > shared_limit()) reason = "the keys and values of a sequence exceed this device's shared memory";
  });
  return reason;
}

void launch_attention(const Attention& args, Stream stream) {
  with_plan(args, [&](const Plan& plan, const Shape& shape, auto kernel) {
    launch("attention", kernel, shape, stream, plan);
  });
}

}  // namespace fastmim::cuda
