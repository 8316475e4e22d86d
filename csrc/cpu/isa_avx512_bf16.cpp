// The kernels for avx512_bf16, which are avx512's but for attention. Headers come before the pragma: what they define
// is shared by all instruction sets. Clang has no such pragma, and without it no such instructions.
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

namespace fastmim::cpu {

namespace avx512_bf16 {
static void attention(const Attention& args, int64_t begin, int64_t end);
static void attention_backward(const Attention& args, int64_t begin, int64_t end);
}  // namespace avx512_bf16

// before the pragma: it runs on any processor
const Kernels* avx512_bf16_kernels() {
#if !defined(FASTMIM_EMULATE_BF16)
  if (!__builtin_cpu_supports("avx512bf16")) return nullptr;
#endif
  static const Kernels set = [] {
    Kernels same = avx512_kernels;
    same.name = "avx512_bf16";
    same.attention = avx512_bf16::attention, same.attention_backward = avx512_bf16::attention_backward;
    return same;
  }();
  return &set;
}

}  // namespace fastmim::cpu

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTMIM_WIDEN_BYTES(from) _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))
#define FASTMIM_WIDEN_HALVES(from) _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))
#define FASTMIM_VL 16

namespace fastmim::cpu {
namespace avx512_bf16 {

#include "vector.inl"
//
#include "rows.inl"
//
#include "functions.inl"
//
#include "pairs.inl"
//
#include "product.inl"
//
#include "attention_item.inl"
//
#include "attention_pairs.inl"

}  // namespace avx512_bf16
}  // namespace fastmim::cpu
#else
const fastmim::cpu::Kernels* fastmim::cpu::avx512_bf16_kernels() {
  return nullptr;
}
#endif
