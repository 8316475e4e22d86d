// From tensors to kernels: addresses, devices and streams, checks on values.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "../common/unserved.h"
#include "kernels.h"

#if defined(FASTMIM_HOST)
#include "host/tensors.h"
#else

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define FASTMIM_CUDA_LIBRARY fastmim_cuda

namespace fastmim::cuda {

// launches go to the tensor's device while this lives, and to its current stream
struct Place {
  explicit Place(const at::Tensor& tensor)
      : guard(of(tensor)), stream(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()) {}

  static at::Device of(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_cuda(), "the CUDA C++ kernels serve CUDA tensors, got one on ", tensor.device());
    return tensor.device();
  }

  c10::cuda::CUDAGuard guard;
  Stream stream;
};

// the address of a tensor's values, for a kernel
inline void* address(const at::Tensor& tensor) {
  return const_cast<void*>(tensor.const_data_ptr());
}

}  // namespace fastmim::cuda

#endif

namespace fastmim::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `reason` is a kernel's own, null where it serves the arguments
inline void check_served(const char* reason) {
  if (reason != nullptr) throw Unserved(reason);
}

template <typename T>
T* address_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(address(*tensor)) : nullptr;
}

inline OptionalTensor as_float(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  if (tensor->scalar_type() == at::kDouble) throw Unserved("float64 is served by the reference");
  return tensor->to(at::kFloat).contiguous();
}

inline Tensor contiguous_like(const Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::Contiguous));
}

// whether the host may look at values: free on the CPU, a synchronisation elsewhere
inline bool looks_at(const Tensor& tensor) {
  static const char* wanted = std::getenv("FASTMIM_CHECK_IDS");
  return tensor.device().is_cpu() || (wanted != nullptr && std::string(wanted) == "1");
}

// the ids (B, K) of each row are distinct and in 0..limit-1
inline void check_ids(const char* name, const Tensor& ids, int64_t limit) {
  if (ids.numel() == 0 || !looks_at(ids)) return;
  const int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  TORCH_CHECK_VALUE(low >= 0 && high < limit, name, " must be in 0..", limit - 1, "; got ", low < 0 ? low : high);
  const Tensor sorted = std::get<0>(ids.sort(1));
  const bool repeated = sorted.diff(1, 1).eq(0).any().item<bool>();
  TORCH_CHECK_VALUE(!repeated, name, " must not repeat an id within a row; got a duplicate");
}

// deviations to divide by are positive
inline void check_std(const OptionalTensor& std) {
  if (!std.has_value() || !looks_at(*std)) return;
  for (int64_t c = 0; c < std->numel(); ++c) {
    const double value = (*std)[c].item<double>();
    TORCH_CHECK_VALUE(value > 0, "std must be positive, got ", value, " for channel ", c);
  }
}

}  // namespace fastmim::cuda
