// Reading the pixels of patches, normalised; shared by patches.cu and loss.cu.
//
// A thread owns a run: adjacent pixels in a line of a patch, read 16 bytes at a time. Where channels are planes, a run
// has one channel; where three channels are interleaved, it has all three; any other layout is read one value at a time
// (scalar).
#pragma once

#include "kernels.h"
#include "values.h"

namespace fastmim::cuda {

enum class Layout : int { scalar, planes, interleaved };

constexpr int kInterleaved = 3;

template <typename T, Layout LAYOUT>
constexpr int kRun = LAYOUT == Layout::scalar ? 1
                     : sizeof(T) == 1         ? 16
                                              : 8;

template <Layout LAYOUT>
constexpr int kChannelsOfRun = LAYOUT == Layout::interleaved ? kInterleaved : 1;

// runs of one patch
template <typename T, Layout LAYOUT>
FASTMIM_HD int64_t run_count(const Patches& p) {
  return patch_values(p) / (kRun<T, LAYOUT> * kChannelsOfRun<LAYOUT>);
}

// as many values as 16 bytes hold
template <typename T>
FASTMIM_DEVICE void read_words(const T* from, float* value) {
  constexpr int kCount = 16 / sizeof(T), kPerWord = 4 / sizeof(T);
  const Words words = load(reinterpret_cast<const Words*>(from));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t word = words.word[i / kPerWord] >> (i % kPerWord * 8 * sizeof(T) % 32);
    if constexpr (sizeof(T) == 4) value[i] = float_of(word);
    if constexpr (sizeof(T) == 2) value[i] = pixel(T{static_cast<uint16_t>(word)});
    if constexpr (sizeof(T) == 1) value[i] = pixel(static_cast<uint8_t>(word));
  }
}

// the first value of patch row `row` in the image, or -1 where its id names no patch
FASTMIM_DEVICE int64_t row_start(const PatchRows& from, int64_t row) {
  const int64_t b = row / from.per_image, k = row % from.per_image;
  const int64_t id = load(from.ids + b * from.ids_stride[0] + k * from.ids_stride[1]);
  return id < 0 || id >= patch_count(from.patches) ? -1 : patch_start(from.patches, b, id);
}

// run `run` of the patch that starts at `start`: kRun pixels by kChannelsOfRun channels, channel fastest
template <typename T, Layout LAYOUT>
FASTMIM_DEVICE void read_run(const Patches& p, int64_t start, int64_t run,
                             float (&value)[kRun<T, LAYOUT> * kChannelsOfRun<LAYOUT>]) {
  constexpr int kPixels = kRun<T, LAYOUT>, kChannels = kChannelsOfRun<LAYOUT>, kValues = kPixels * kChannels;
  const int64_t width = p.patch[p.axes - 1], area = patch_area(p);
  const int64_t first = run * kPixels, c = LAYOUT == Layout::interleaved ? 0 : first / area;
  const int64_t in_plane = first - c * area;
  const int64_t at = start + patch_line(p, c, in_plane / width) + in_plane % width * p.stride[p.axes - 1];
  const T* from = static_cast<const T*>(p.images) + at;
  if (start < 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = NAN;
    return;
  }
  if constexpr (LAYOUT == Layout::scalar) {
    value[0] = pixel(load(from));
  } else {
#pragma unroll
    for (int i = 0; i < kValues; i += 16 / sizeof(T)) read_words(from + i, value + i);
  }
#pragma unroll
  for (int channel = 0; channel < kChannels; ++channel) {
    const float mean = p.mean == nullptr ? 0.0f : load(p.mean + c + channel);
    const float std = p.std == nullptr ? 1.0f : load(p.std + c + channel);
#pragma unroll
    for (int i = channel; i < kValues; i += kChannels) value[i] = (value[i] - mean) / std;
  }
}

// the layout that 16-byte reads can take
template <typename T>
Layout layout_of(const Patches& p) {
  constexpr int64_t kBytes = sizeof(T);
  const int last = p.axes - 1;
  bool aligned = reinterpret_cast<uintptr_t>(p.images) % 16 == 0 && p.batch_stride * kBytes % 16 == 0 &&
                 p.patch[last] % kRun<T, Layout::planes> == 0;
  for (int axis = 0; axis < last; ++axis) aligned = aligned && p.stride[axis] * kBytes % 16 == 0;
  if (!aligned) return Layout::scalar;
  if (p.stride[last] == 1 && p.channel_stride * kBytes % 16 == 0) return Layout::planes;
  const bool interleaved = p.channels == kInterleaved && p.channel_stride == 1 && p.stride[last] == kInterleaved;
  return interleaved ? Layout::interleaved : Layout::scalar;
}

// chosen.template operator()<T, LAYOUT>() for the pixels' type and layout
template <typename Chosen>
void with_layout(const Patches& p, const Chosen& chosen) {
  const auto typed = [&](auto zero) {
    using T = decltype(zero);
    const Layout layout = layout_of<T>(p);
    if (layout == Layout::planes) return chosen(zero, std::integral_constant<Layout, Layout::planes>());
    if (layout == Layout::interleaved) return chosen(zero, std::integral_constant<Layout, Layout::interleaved>());
    return chosen(zero, std::integral_constant<Layout, Layout::scalar>());
  };
  if (p.pixels == Pixels::uint8) return typed(uint8_t{});
  if (p.pixels == Pixels::uint16) return typed(uint16_t{});
  if (p.type == Type::f32) return typed(float{});
  if (p.type == Type::bf16) return typed(Bf16{});
  return typed(F16{});
}

}  // namespace fastmim::cuda
