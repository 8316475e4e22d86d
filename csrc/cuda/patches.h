// Images as kernels read them.
#pragma once

#include "tensors.h"

namespace fastmim::cuda {

// Rows of patches, with the tensors that own their memory.
struct PatchTensors {
  PatchTensors(const Tensor& images, const Tensor& ids, at::IntArrayRef patch_size, const OptionalTensor& mean,
               const OptionalTensor& std);

  PatchRows rows{};

 private:
  OptionalTensor mean, std;
};

}  // namespace fastmim::cuda
