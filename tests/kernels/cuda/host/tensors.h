// CPU tensors in place of CUDA's: the same checks and launchers, on the runner.
#pragma once

#include <ATen/ATen.h>

#include "runner.h"

#define FASTMIM_CUDA_LIBRARY fastmim_host

namespace fastmim::cuda {

struct Place {
  explicit Place(const at::Tensor&) {}
  ~Place() { host::forget_all(); }

  Stream stream = nullptr;
};

// the tensor's memory, from its first value to its last, becomes known to the runner
inline void* address(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  const size_t bytes = tensor.numel() ? static_cast<size_t>(last + 1) * tensor.element_size() : 0;
  return host::shown(tensor.const_data_ptr(), bytes);
}

}  // namespace fastmim::cuda
