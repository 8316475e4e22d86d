// The extension module: facts about the build. Operators register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include <cuda.h>
#include <torch/version.h>

PYBIND11_MODULE(_CUDA, module) {
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("cuda_version") = CUDA_VERSION;
  module.attr("architectures") = FASTMIM_CUDA_ARCHITECTURES;
}
