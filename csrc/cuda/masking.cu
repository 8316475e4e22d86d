// Random masks without a sort.
//
//   rank[b, j] = how many noises of row b are smaller than that of token j, ties by index
//   ids_restore[b, j] = rank;  ids_keep[b, rank] = j for rank < K;  ids_predict[b, rank - K] = j for the next M ranks
//
// Work: a thread owns a token; the warps of a block are shared out among several images (196 patches: 7 of 8
// warps to one image, 49 patches: 2 to each of 4). Each round the image's threads write up to kKeys keys of their row
// to shared memory, four at a time where they are drawn (one Philox counter gives four words), and every thread counts
// the keys below its own; all lanes of a warp read the same key, which is one broadcast. No floating point but the
// noise.
// Shared memory:
//   keys       images of the block (and one for warps left over) x kKeys numbers of 8 bytes: order of the noise, token
// Per row: 8 L bytes of float32 noise (read twice; none where it is drawn) and 8 (L + K + M) of ids; L^2 comparisons of
// 64 bits, which for L = 196 take longer than the bytes do: about 1500 instructions of a warp for each of 7 warps. A
// call of 256 rows of 196: 1.2 MB, 9.8 million comparisons, 256 blocks of 4 KiB.
#include "../common/philox.h"
#include "device.h"
#include "kernels.h"

namespace fastmim::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes, kKeys = 256;

struct Plan {
  Masking args;
  int images, warps, token_blocks;  // of a block: images, warps of each; blocks that an image takes
};

// integers in the order of floating noise: both zeros are one, NaN comes last
FASTMIM_DEVICE uint32_t order_of(float noise) {
  const uint32_t bits = bits_of(noise == 0 ? 0.0f : noise);
  if (noise != noise) return 0xffffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FASTMIM_DEVICE float noise_of(const Masking& args, int64_t b, int64_t token) {
  const int64_t at = b * args.noise_stride[0] + token * args.noise_stride[1];
  if (args.type == Type::f32) return load(static_cast<const float*>(args.noise) + at);
  if (args.type == Type::bf16) return widen(load(static_cast<const Bf16*>(args.noise) + at));
  return widen(load(static_cast<const F16*>(args.noise) + at));
}

FASTMIM_DEVICE uint64_t key_of(uint32_t order, int64_t token) {
  return uint64_t{order} << 32 | static_cast<uint32_t>(token);
}

// writes the keys of tokens first .. first + kKeys - 1 of image b; those past the row are larger than all others
FASTMIM_DEVICE void write_keys(const Masking& args, int64_t b, int64_t first, uint64_t* keys, int own, int threads) {
  for (int i = 4 * own; i < kKeys; i += 4 * threads) {
    uint32_t order[4];
    if (args.noise == nullptr) {
      const auto seed = static_cast<uint64_t>(load(args.seeds + b * args.seeds_stride));
      philox(seed, static_cast<uint32_t>((first + i) / 4), order);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t token = first + i + w;
      const bool inside = token < args.num_patches;
      if (args.noise != nullptr) order[w] = inside ? order_of(noise_of(args, b, token)) : 0;
      store(keys + i + w, inside ? key_of(order[w], token) : ~uint64_t{0});
    }
  }
}

FASTMIM_KERNEL(kThreads, 4) random_masking_kernel(Plan plan) {
  const Masking& args = plan.args;
  auto* keys = reinterpret_cast<uint64_t*>(shared_memory());
  const int image = warp() / plan.warps, threads = plan.warps * kLanes, own = thread() - image * threads;
  const int64_t b = block() / plan.token_blocks * plan.images + image;
  const int64_t token = block() % plan.token_blocks * threads + own;
  const bool works = image < plan.images && b < args.batch, ranks = works && token < args.num_patches;
  keys += image * kKeys;

  uint64_t key = 0;
  if (ranks && args.noise != nullptr) key = key_of(order_of(noise_of(args, b, token)), token);
  if (ranks && args.noise == nullptr) {
    uint32_t word[4];
    philox(static_cast<uint64_t>(load(args.seeds + b * args.seeds_stride)), static_cast<uint32_t>(token / 4), word);
    const int w = token % 4;
    key = key_of(w == 0 ? word[0] : w == 1 ? word[1] : w == 2 ? word[2] : word[3], token);
  }
  int64_t rank = 0;
  for (int64_t first = 0; first < args.num_patches; first += kKeys) {
    if (first > 0) sync_block();
    if (works) write_keys(args, b, first, keys, own, threads);
    sync_block();
    if (works) {
      const int64_t left = args.num_patches - first;
      const int count = left < kKeys ? static_cast<int>(left) : kKeys;
      int below = 0;
#pragma unroll 8
      for (int i = 0; i < count; ++i) below += load(keys + i) < key;
      rank += below;
    }
  }
  if (!ranks) return;
  store(args.ids_restore + b * args.num_patches + token, rank);
  if (rank < args.len_keep) store(args.ids_keep + b * args.len_keep + rank, token);
  const int64_t place = rank - args.len_keep;
  if (place >= 0 && place < args.len_predict) store(args.ids_predict + b * args.len_predict + place, token);
}

}  // namespace

void launch_random_masking(const Masking& args, Stream stream) {
  const int64_t warps_of_row = (args.num_patches + kLanes - 1) / kLanes;
  const int warps = warps_of_row < kWarps ? static_cast<int>(warps_of_row) : kWarps, images = kWarps / warps;
  const int64_t token_blocks = (args.num_patches + warps * kLanes - 1) / (warps * kLanes);
  const Plan plan{args, images, warps, static_cast<int>(token_blocks)};
  // warps that are left over are given an image too, which they don't rank
  const int64_t slots = (kWarps + warps - 1) / warps;
  const Shape shape{(args.batch + images - 1) / images * token_blocks, kThreads,
                    slots * kKeys * static_cast<int64_t>(sizeof(uint64_t))};
  launch("random_masking", random_masking_kernel, shape, stream, plan);
}

}  // namespace fastmim::cuda
