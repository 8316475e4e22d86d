// Positions of patches in an image.
#pragma once

#include "portable.h"
#include "storage.h"

namespace fastmim {

constexpr int kMaxAxes = 3;

enum class Pixels : int { floating, uint8, uint16 };

// Patches of images (B, C, *sizes), read in place.
struct Patches {
  const void* images;
  Pixels pixels;
  Type type;  // of floating pixels
  int axes;
  int64_t channels;
  int64_t batch_stride, channel_stride;
  int64_t stride[kMaxAxes], patch[kMaxAxes], grid[kMaxAxes];
  const float* mean;   // (C,): a pixel x is read as (pixel(x) - mean) / std
  const float* std;    // (C,)
  const float* table;  // (C, 256): normalised values of uint8 pixels
};

// a pixel before mean and deviation
template <typename T>
FASTMIM_HD float pixel(T value) {
  return widen(value);
}

FASTMIM_HD float pixel(uint8_t value) {
  return static_cast<float>(value) / 255.0f;
}

FASTMIM_HD float pixel(uint16_t value) {
  return static_cast<float>(value) / 65535.0f;
}

// pixels of a patch in one channel
FASTMIM_HD int64_t patch_area(const Patches& p) {
  int64_t area = 1;
  for (int axis = 0; axis < p.axes; ++axis) area *= p.patch[axis];
  return area;
}

FASTMIM_HD int64_t patch_values(const Patches& p) {
  return p.channels * patch_area(p);
}

FASTMIM_HD int64_t patch_count(const Patches& p) {
  int64_t count = 1;
  for (int axis = 0; axis < p.axes; ++axis) count *= p.grid[axis];
  return count;
}

// the first pixel of patch `id` of image `b`, in elements
FASTMIM_HD int64_t patch_start(const Patches& p, int64_t b, int64_t id) {
  int64_t offset = b * p.batch_stride;
  for (int axis = p.axes - 1; axis >= 0; --axis) {
    offset += id % p.grid[axis] * p.patch[axis] * p.stride[axis];
    id /= p.grid[axis];
  }
  return offset;
}

// line `line` of channel `c` within a patch: all its axes but the last, row-major
FASTMIM_HD int64_t patch_line(const Patches& p, int64_t c, int64_t line) {
  int64_t offset = c * p.channel_stride;
  for (int axis = p.axes - 2; axis > 0; --axis) {
    offset += line % p.patch[axis] * p.stride[axis];
    line /= p.patch[axis];
  }
  return offset + line * p.stride[0];
}

}  // namespace fastmim
