// The extension module: facts about the build. Operators register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include <ATen/Version.h>
#include <torch/version.h>

#include "cpu/kernels.h"
#include "cpu/resample.h"

PYBIND11_MODULE(_C, module) {
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("compiler") = __VERSION__;
  module.def("isa", [] { return fastmim::cpu::kernels().name; }, "the instruction set that serves CPU tensors");
  module.def("resample", &fastmim::cpu::resample);
}
