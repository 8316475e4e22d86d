// What tests need of the runner: which memory kernels may touch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmim::cuda::host {

// the pointer to `bytes` bytes from `first` that a kernel may be given
void* shown(const void* first, size_t bytes);
void forget_all();
// the shared memory of a block on the device that is played
void set_shared_limit(int64_t bytes);

}  // namespace fastmim::cuda::host
