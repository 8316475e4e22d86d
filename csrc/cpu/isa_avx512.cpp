// The kernels for avx512. Headers come before the pragma: what they define is shared by all instruction sets.
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

// GCC 12's own header leaves operands undefined that its instructions ignore
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTMIM_ISA avx512
#define FASTMIM_STREAM(to, value) _mm512_stream_ps(to, (__m512)(value))
#define FASTMIM_WIDEN_BYTES(from) _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))
#define FASTMIM_WIDEN_HALVES(from) _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))
#define FASTMIM_VL 16
#include "isa.inl"

namespace fastmim::cpu {
const Kernels avx512_kernels = FASTMIM_KERNELS("avx512");
}
#endif
