// Helpers of functions that compile for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTMIM_HD __host__ __device__ __forceinline__
#else
#define FASTMIM_HD inline __attribute__((always_inline))
#endif

namespace fastmim {

FASTMIM_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FASTMIM_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace fastmim
