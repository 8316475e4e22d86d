// The exception of a kernel for arguments that it does not serve, and the dtypes that kernels serve. Needs torch.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/Exceptions.h>

#include "storage.h"

namespace fastmim {

// Thrown before anything is computed; the message is the reason. In Python it is fastmim.kernels.Unserved.
struct Unserved : torch::PyTorchError {
  using PyTorchError::PyTorchError;

  // torch calls this with the GIL held
  PyObject* python_type() override {
    const pybind11::object type = pybind11::module_::import("fastmim.kernels").attr("Unserved");
    return type.ptr();  // the module keeps it alive
  }
};

inline Type type_of(at::ScalarType type) {
  if (type == at::kFloat) return Type::f32;
  if (type == at::kBFloat16) return Type::bf16;
  if (type == at::kHalf) return Type::f16;
  throw Unserved(type == at::kDouble ? "float64 is served by the reference" : "this dtype is served by the reference");
}

inline Type type_of(const at::Tensor& tensor) {
  return type_of(tensor.scalar_type());
}

}  // namespace fastmim
