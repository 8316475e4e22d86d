// Resampling of a batch of crops, for the loader of images.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmim::cpu {

// Writes crops of RGB images, or patches of crops, and returns the number of pixels that both passes made.
//   sources: list of buffers of uint8
//   boxes: int64 (n, 6): a crop's source, its first byte there, bytes per row, height, width, and 1 to mirror it
//   ids: int64 (n, k) patches of each crop, or None
//   out: uint8 (n, height, width, 3), or with ids (n, k, 3 * patch_height * patch_width) in order channel, row, column;
//     other shapes of as many bytes a row do too, and rows may lie apart
int64_t resample(const pybind11::list& sources, const pybind11::buffer& boxes, const pybind11::object& ids,
                 const pybind11::buffer& out, int64_t height, int64_t width, int64_t patch_height, int64_t patch_width,
                 int threads);

}  // namespace fastmim::cpu
