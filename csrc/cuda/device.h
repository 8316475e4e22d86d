// The thin layer that kernels are written on: thread indices, memory, barriers, lanes, tensor cores, launches.
//
// Terms, for a reader new to CUDA. A kernel is one function that very many threads run. 32 threads are a warp: they
// step together, and a thread's place in its warp is its lane; lanes read each other's registers (from_lane). Up to
// some hundred threads are a block: it runs on one multiprocessor and uses a part of its registers and shared memory (a
// scratchpad of up to 227 KiB on sm_90, 163 KiB on sm_80). The less a block needs, the more of them run at once, and
// one computes while another waits for memory. Threads of a block synchronise at barriers (sync_block); blocks do not.
// Tensors lie in global memory: a warp reads it fastest as adjacent 16-byte words, a word a lane. Shared memory has 32
// banks of 4 bytes: lanes that read different words of one bank wait for each other. Tensor cores multiply 16x16 by
// 16x8 tiles whose values are spread over the lanes of a warp as "tensor cores" below says.
//
// Kernels touch memory through load, store and copy_async alone and talk to other threads through this file alone, so
// that a second implementation, tests/kernels/cuda/host/device.h, runs the same source on a CPU with every access
// checked.
#pragma once

#include <cstddef>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/storage.h"

namespace fastmim::cuda {

constexpr int kLanes = 32;
constexpr float kLog2e = 1.4426950408889634f;

// 16 bytes: what one thread reads or writes at a time where rows are aligned
struct alignas(16) Words {
  uint32_t word[4];
};

// blocks of threads, and the bytes of shared memory of each
struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared;
};

// a cudaStream_t
using Stream = void*;

}  // namespace fastmim::cuda

#if !defined(__CUDACC__)
#include "host/device.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define FASTMIM_DEVICE __device__ __forceinline__
// `blocks` is how many must fit on a multiprocessor: it limits the registers that the compiler gives each thread
#define FASTMIM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fastmim::cuda {

// ---- threads ----

FASTMIM_DEVICE int thread() {
  return static_cast<int>(threadIdx.x);
}

FASTMIM_DEVICE int64_t block() {
  return blockIdx.x;
}

FASTMIM_DEVICE int64_t blocks() {
  return gridDim.x;
}

FASTMIM_DEVICE void sync_block() {
  __syncthreads();
}

FASTMIM_DEVICE void sync_warp() {
  __syncwarp();
}

// the value of the lane whose number differs in the bits of `mask`
FASTMIM_DEVICE float from_lane(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- memory ----

FASTMIM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

template <typename T>
FASTMIM_DEVICE T load(const T* from) {
  return *from;
}

template <>
FASTMIM_DEVICE Words load<Words>(const Words* from) {
  const uint4 word = *reinterpret_cast<const uint4*>(from);
  return {{word.x, word.y, word.z, word.w}};
}

template <typename T>
FASTMIM_DEVICE void store(T* to, T value) {
  *to = value;
}

template <>
FASTMIM_DEVICE void store<Words>(Words* to, Words value) {
  *reinterpret_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

FASTMIM_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// starts a copy of 16 bytes to shared memory, zeros unless `valid`; this thread may read them after wait_for_copies,
// others after a barrier that follows it
FASTMIM_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

FASTMIM_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- arithmetic ----

// a b, rounded even where a sum takes it
FASTMIM_DEVICE float product_of(float a, float b) {
  return __fmul_rn(a, b);
}

FASTMIM_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// two values in one register, the first in the low half
template <typename T>
FASTMIM_DEVICE uint32_t pack(float low, float high);

template <>
FASTMIM_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
FASTMIM_DEVICE uint32_t pack<F16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// ---- tensor cores ----
// Fragments of m16n8k16, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a (16 rows, 16 deep): registers (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)
//   b (16 deep, 8 columns): registers (2t.., g), (2t + 8.., g)
//   c (16 rows, 8 columns): values (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)

// four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8, and gets (g, 2t..) of each
FASTMIM_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// as load_matrices, of the transposed matrices: each lane gets (2t.., g)
FASTMIM_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b
template <typename T>
FASTMIM_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FASTMIM_DEVICE void multiply<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FASTMIM_DEVICE void multiply<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- launches ----

// the shared memory that one block may have on the current device
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    throw std::runtime_error("fastmim: the properties of the current CUDA device can't be read");
  }
  return bytes;
}

// kernel(args) on `shape`; errors of the launch are thrown with the kernel's name
template <typename Args>
void launch(const char* name, void (*kernel)(Args), const Shape& shape, Stream stream, const Args& args) {
  constexpr int64_t kLargestGrid = 0x7fffffff, kSharedByDefault = 48 * 1024;
  if (shape.blocks == 0) return;
  if (shape.blocks > kLargestGrid) throw std::runtime_error(std::string("fastmim: too many blocks for ") + name);
  cudaError_t error = cudaSuccess;
  if (shape.shared > kSharedByDefault) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Args*>(&args)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.blocks)),
                             dim3(static_cast<unsigned>(shape.threads)), arguments, shape.shared,
                             static_cast<cudaStream_t>(stream));
  }
  // the sticky error too is cleared, so that it is not taken for the next launch's
  if (const cudaError_t last = cudaGetLastError(); error == cudaSuccess) error = last;
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastmim: launching ") + name + ": " + cudaGetErrorString(error));
  }
}

}  // namespace fastmim::cuda

#endif

namespace fastmim::cuda {

FASTMIM_DEVICE int lane() {
  return thread() % kLanes;
}

FASTMIM_DEVICE int warp() {
  return thread() / kLanes;
}

// the sum over `LANES` adjacent lanes, in the same order on each; all of them get it
template <int LANES = kLanes>
FASTMIM_DEVICE float sum_of_lanes(float value) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) value += from_lane(value, mask);
  return value;
}

template <int LANES = kLanes>
FASTMIM_DEVICE float largest_of_lanes(float value) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) value = fmaxf(value, from_lane(value, mask));
  return value;
}

}  // namespace fastmim::cuda
