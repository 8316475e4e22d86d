// The functions of CUDA's driver that launch a kernel, found at run time: building needs no toolkit.
#pragma once

#include <array>

namespace fastmim::plans {

// CUfunction and CUstream
using Function = void*;
using Stream = void*;

// Make a device's primary context current in a thread that has none: a thread of the caller that has not used CUDA.
void ensure_context(int device);

// Launch a kernel in the current context; raise an error that names CUDA's.
void launch_kernel(Function function, const std::array<unsigned, 3>& grid, unsigned threads, unsigned shared,
                   Stream stream, void** parameters);

}  // namespace fastmim::plans
