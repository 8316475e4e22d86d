// The kernels for avx2. Headers come before the pragma: what they define is shared by all instruction sets.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "../common/philox.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")
#define FASTMIM_ISA avx2
#define FASTMIM_STREAM(to, value) _mm256_stream_ps(to, (__m256)(value))
#define FASTMIM_UPPER(bits) \
  _mm_packus_epi32(_mm256_castsi256_si128((__m256i)(bits >> 16)), _mm256_extracti128_si256((__m256i)(bits >> 16), 1))
#define FASTMIM_WIDEN_BYTES(from) _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))
#define FASTMIM_WIDEN_HALVES(from) _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))
#define FASTMIM_VL 8
#include "isa.inl"

namespace fastmim::cpu {
const Kernels avx2_kernels = FASTMIM_KERNELS("avx2");
}
#endif
