// Between tensors and kernels: views, value checks, the reference, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <initializer_list>
#include <string>

#include "kernels.h"

namespace fastmim::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// dtypes that the kernels serve; float64 is the reference's
inline bool served(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline Type type_of(at::ScalarType type) {
  return type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : Type::f16;
}

// the tensor's memory; the given axes' strides, 0 for an axis of -1
inline View view_of(const Tensor& tensor, std::initializer_list<int64_t> axes) {
  View view{const_cast<void*>(tensor.const_data_ptr()), type_of(tensor.scalar_type()), {}};
  int i = 0;
  for (const int64_t axis : axes) view.stride[i++] = axis < 0 ? 0 : tensor.stride(axis);
  return view;
}

// rows of the last axis of a contiguous tensor
inline View rows_of(const Tensor& tensor) {
  const int64_t width = tensor.dim() ? tensor.size(-1) : 1;
  return {const_cast<void*>(tensor.const_data_ptr()), type_of(tensor.scalar_type()), {width, 1}};
}

inline Tensor as_float(const Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

// the reference of the op, for what the kernel does not serve
template <typename Signature>
auto reference(const char* op) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("fastmim_reference::") + op).c_str(), "")
      .typed<Signature>();
}

// run(begin, end) over 0..count, `work` being the cost of one in elements touched
template <typename Run>
void for_rows(int64_t count, int64_t work, const Run& run) {
  if (count > 0) at::parallel_for(0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1)), run);
}

// returns the ids (B, K) contiguous; raises unless those of each row are distinct and in 0..limit-1
Tensor checked_ids(const char* name, const Tensor& ids, int64_t limit);

}  // namespace fastmim::cpu
