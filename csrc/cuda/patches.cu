// The chosen patches of images as rows, normalised on the way; the reverse; and embeddings with their positions.
//
//   gather:  out[b, k, (c, y, x)] = (image[b, c, Y + y, X + x] - mean[c]) / std[c], uint8 first divided by 255,
//           uint16 by 65535
//   scatter: image[b, c, Y + y, X + x] = grad[b, k, (c, y, x)] / std[c], with (Y, X) the corner of patch ids[b, k]
//   place:   out[b, n] = prefix[n];  out[b, N + k] = tokens[b, k] + positions[ids[b, k]]
//
// Work: in gather a thread owns a run of pixels (reader.h), adjacent threads own adjacent runs, so that a warp reads
// several patches (16x16 uint8: 48 runs where channels are planes, 16 of 48 bytes where they are interleaved) and
// writes rows of the result 16 bytes at a time. In scatter and place a thread owns kWide adjacent values, or one where
// rows aren't aligned. No shared memory: no value is used twice.
// Per value: a pixel read and a value of the row written (scatter: the other way; place: a token and a position read, a
// row written), 2 FLOPs. ViT-L at 75% masking (batch 256, 49 patches of 768 uint8, bfloat16 rows): 29 MB and 19 MFLOP a
// call of gather, 2352 blocks. An id that is out of range reads NaN and writes nothing.
#include "reader.h"

namespace fastmim::cuda {

namespace {

constexpr int kThreads = 256, kWide = 8;

int64_t blocks_for(int64_t threads) {
  return (threads + kThreads - 1) / kThreads;
}

template <typename T, Layout LAYOUT>
FASTMIM_KERNEL(kThreads, 2)
gather_patches_kernel(GatherPatches args) {
  constexpr int kPixels = kRun<T, LAYOUT>, kChannels = kChannelsOfRun<LAYOUT>;
  const Patches& p = args.from.patches;
  const int64_t runs = run_count<T, LAYOUT>(p), index = block() * kThreads + thread();
  const int64_t row = index / runs, run = index % runs;
  if (row >= args.from.rows) return;
  float value[kPixels * kChannels];
  read_run<T, LAYOUT>(p, row_start(args.from, row), run, value);
  const int64_t to = row * patch_values(p) + run * kPixels, area = patch_area(p);
#pragma unroll
  for (int channel = 0; channel < kChannels; ++channel) {
    float plane[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) plane[i] = value[i * kChannels + channel];
    if constexpr (LAYOUT == Layout::scalar) {
      store_value(args.out_type, args.out, to, plane[0]);
    } else {
      store_values(args.out_type, args.out, to + channel * area, plane);
    }
  }
}

template <bool WIDE>
FASTMIM_KERNEL(kThreads, 4)
scatter_patches_kernel(ScatterPatches args) {
  constexpr int kCount = WIDE ? kWide : 1;
  const Patches& p = args.to.patches;
  const int64_t values = patch_values(p), runs = values / kCount, index = block() * kThreads + thread();
  const int64_t row = index / runs, first = index % runs * kCount;
  if (row >= args.to.rows) return;
  const int64_t start = row_start(args.to, row);
  if (start < 0) return;
  const int64_t area = patch_area(p), width = p.patch[p.axes - 1], c = first / area, in_plane = first % area;
  const int64_t to = start + patch_line(p, c, in_plane / width) + in_plane % width;
  const float std = p.std == nullptr ? 1.0f : load(p.std + c);
  const int64_t from = row / args.to.per_image * args.grad_stride[0] + row % args.to.per_image * args.grad_stride[1];
  void* image = const_cast<void*>(p.images);
  if constexpr (WIDE) {
    float value[kWide];
    load_values(args.type, args.grad, from + first, value);
#pragma unroll
    for (int i = 0; i < kWide; ++i) value[i] /= std;
    store_values(p.type, image, to, value);
  } else {
    store_value(p.type, image, to, load_value(args.type, args.grad, from + first * args.grad_stride[2]) / std);
  }
}

template <bool WIDE>
FASTMIM_KERNEL(kThreads, 4)
place_tokens_kernel(PlaceTokens args) {
  constexpr int kCount = WIDE ? kWide : 1;
  const int64_t runs = args.width / kCount, index = block() * kThreads + thread();
  const int64_t row = index / runs, first = index % runs * kCount, all = args.prefixes + args.per_image;
  if (row >= args.rows) return;
  const int64_t b = row / all, n = row % all, k = n - args.prefixes;
  const auto read = [&](Type type, const void* from, int64_t from_row, float (&value)[kCount]) {
    if constexpr (WIDE) {
      load_values(type, from, from_row * args.width + first, value);
    } else {
      value[0] = load_value(type, from, from_row * args.width + first);
    }
  };
  float value[kCount];
  if (k < 0) {
    read(args.prefix_type, args.prefix, n, value);
  } else {
    read(args.type, args.tokens, b * args.per_image + k, value);
    if (args.positions != nullptr) {
      const int64_t id = load(args.ids + b * args.ids_stride[0] + k * args.ids_stride[1]);
      float position[kCount];
      const bool known = id >= 0 && id < args.num_patches;
      if (known) read(args.positions_type, args.positions, id, position);
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] += known ? position[i] : NAN;
    }
  }
  void* out = const_cast<void*>(args.out);
  if constexpr (WIDE) {
    store_values(args.type, out, row * args.width + first, value);
  } else {
    store_value(args.type, out, row * args.width + first, value[0]);
  }
}

bool on_words(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

}  // namespace

void launch_gather_patches(const GatherPatches& args, Stream stream) {
  with_layout(args.from.patches, [&](auto zero, auto layout) {
    using T = decltype(zero);
    constexpr Layout kLayout = decltype(layout)::value;
    const Shape shape{blocks_for(args.from.rows * run_count<T, kLayout>(args.from.patches)), kThreads, 0};
    launch("gather_patches", gather_patches_kernel<T, kLayout>, shape, stream, args);
  });
}

void launch_scatter_patches(const ScatterPatches& args, Stream stream) {
  const Patches& p = args.to.patches;
  const bool wide = p.patch[p.axes - 1] % kWide == 0 && on_words(args.grad) && args.grad_stride[2] == 1 &&
                    args.grad_stride[0] % kWide == 0 && args.grad_stride[1] % kWide == 0;
  const Shape shape{blocks_for(args.to.rows * patch_values(p) / (wide ? kWide : 1)), kThreads, 0};
  launch("scatter_patches", wide ? scatter_patches_kernel<true> : scatter_patches_kernel<false>, shape, stream, args);
}

void launch_place_tokens(const PlaceTokens& args, Stream stream) {
  const bool wide = args.width % kWide == 0 && on_words(args.tokens) && on_words(args.positions) &&
                    on_words(args.prefix) && on_words(args.out);
  const Shape shape{blocks_for(args.rows * args.width / (wide ? kWide : 1)), kThreads, 0};
  launch("place_tokens", wide ? place_tokens_kernel<true> : place_tokens_kernel<false>, shape, stream, args);
}

}  // namespace fastmim::cuda
