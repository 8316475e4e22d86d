// From tensors to kernels: dtypes that are served, views, checks on values, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <initializer_list>
#include <string>
#include <string_view>

#include "../common/unserved.h"
#include "kernels.h"

namespace fastmim::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_dtype(const Tensor& tensor) {
  type_of(tensor);
}

inline void check_dtype(at::ScalarType dtype) {
  type_of(dtype);
}

template <typename Given>
void check_dtype(const std::optional<Given>& given) {
  if (given.has_value()) check_dtype(*given);
}

// throws Unserved for a dtype, or a tensor of a dtype, that kernels do not serve
template <typename... Given>
void check_dtypes(const Given&... given) {
  (check_dtype(given), ...);
}

// Registers `kernel` for CPU tensors. What it does not serve goes to the op's fallback, with the reason.
template <typename Result, typename... Args>
void serve(torch::Library& library, const char* op, Result (*kernel)(Args...)) {
  library.impl(op, [=](Args... args) -> Result {
    try {
      return kernel(args...);
    } catch (const Unserved& unserved) {
      return c10::Dispatcher::singleton()
          .findSchemaOrThrow((std::string("fastmim_fallback::") + op).c_str(), "")
          .typed<Result(Args..., std::string_view)>()
          .call(args..., unserved.what());
    }
  });
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

// Rows of an output of `bytes` in all with the op's others: past the caches where they would not hold it anyway.
inline View output_rows_of(const Tensor& tensor, int64_t bytes) {
  constexpr int64_t kStreamed = int64_t{6} << 20;
  View view = rows_of(tensor);
  view.streamed = bytes >= kStreamed && view.type == Type::f32 && view.stride[0] % 16 == 0 &&
                  reinterpret_cast<uintptr_t>(view.data) % 64 == 0;
  return view;
}

inline Tensor as_float(const Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

// run(begin, end) over 0..count in several threads; `work` is the number of elements touched for each
template <typename Run>
void for_rows(int64_t count, int64_t work, const Run& run) {
  if (count > 0) at::parallel_for(0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1)), run);
}

// Sums over rows in pieces that don't depend on the number of threads: run(piece's sums, begin, end).
template <typename Run>
Tensor by_pieces(int64_t rows, int64_t sums, int64_t work, const Run& run) {
  const int64_t size = std::max<int64_t>(32, (rows + 63) / 64), pieces = (rows + size - 1) / size;
  Tensor partial = at::zeros({pieces, sums}, at::kFloat);
  for_rows(pieces, size * work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run(partial.mutable_data_ptr<float>() + i * sums, i * size, std::min(rows, (i + 1) * size));
  });
  Tensor out = at::zeros({sums}, at::kFloat);
  float* total = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < pieces; ++i) {
    const float* part = partial.const_data_ptr<float>() + i * sums;
    for (int64_t j = 0; j < sums; ++j) total[j] += part[j];
  }
  return out;
}

// returns the ids (B, K) contiguous; raises unless those of each row are distinct and in 0..limit-1
Tensor checked_ids(const char* name, const Tensor& ids, int64_t limit);

}  // namespace fastmim::cpu
