// Images as the patch kernels see them.
#pragma once

#include <vector>

#include "tensors.h"

namespace fastmim::cpu {

// The kernels' view of images, with each channel's mean and deviation.
struct PatchReader {
  PatchReader(const Tensor& images, at::IntArrayRef patch_size, const OptionalTensor& mean_of,
              const OptionalTensor& std_of);
  PatchReader(const PatchReader&) = delete;
  std::vector<float> mean, std, table;
  Patches patches;
};

// throws Unserved for pixels or statistics of a dtype that kernels do not read
void check_pixels(const Tensor& images, const OptionalTensor& mean, const OptionalTensor& std);

}  // namespace fastmim::cpu
