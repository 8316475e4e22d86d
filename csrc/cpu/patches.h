// Images as the patch kernels see them.
#pragma once

#include "tensors.h"

namespace fastmim::cpu {

// The kernels' view of images, with what each channel is multiplied by and shifted by.
struct PatchReader {
  PatchReader(const Tensor& images, at::IntArrayRef patch_size, const OptionalTensor& mean, const OptionalTensor& std);
  Tensor scale, shift;
  Patches patches;
};

bool served_pixels(const Tensor& images, const OptionalTensor& mean, const OptionalTensor& std);

}  // namespace fastmim::cpu
