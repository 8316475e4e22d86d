// The host implementation of csrc/cuda/device.h: threads are fibers, and every access to memory is checked.
//
// Pointers that kernels see are tagged, so that one that is dereferenced without load or store faults at once. A read
// must be of bytes that were written, with a barrier between two threads that touch the same byte; what is copied
// asynchronously arrives when its thread waits for it. All lanes of a warp must meet in a collective operation.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#define FASTMIM_DEVICE inline
#define FASTMIM_KERNEL(threads, blocks) void

namespace fastmim::cuda {

namespace host {

enum class Access { read, write };

// the bytes behind a tagged pointer, once the access is found to be allowed
unsigned char* checked(const void* pointer, size_t bytes, Access access);
// one byte after another, with the threads of other warps kept apart by barriers
void record_copy(void* to, const void* from, bool valid);

// waits for all 32 lanes, runs `together` once for them, in lane order of what they bring, and goes on
void meet(const char* what, const void* in, void* out,
          const std::function<void(const void* const* in, void* const* out)>& together);

void run(const char* name, const Shape& shape, const std::function<void()>& kernel);

}  // namespace host

int thread();
int64_t block();
int64_t blocks();
void sync_block();
void sync_warp();
void wait_for_copies();
unsigned char* shared_memory();
int64_t shared_limit();
float from_lane(float value, int mask);
void load_matrices(uint32_t (&to)[4], const void* row);
void load_matrices_transposed(uint32_t (&to)[4], const void* row);

template <typename T>
T load(const T* from) {
  T value;
  std::memcpy(&value, host::checked(from, sizeof(T), host::Access::read), sizeof(T));
  return value;
}

template <typename T>
void store(T* to, T value) {
  std::memcpy(host::checked(to, sizeof(T), host::Access::write), &value, sizeof(T));
}

inline void copy_async(void* to, const void* from, bool valid) {
  host::record_copy(to, from, valid);
}

inline float product_of(float a, float b) {
  return a * b;
}

inline float exp2_of(float x) {
  return std::exp2(x);
}

template <typename T>
uint32_t pack(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

template <typename T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In {
    const uint32_t* a;
    uint32_t b[2];
  } in{a, {b0, b1}};
  host::meet("multiply", &in, c, [](const void* const* lanes, void* const* results) {
    float left[16][16], right[16][8];
    const auto half = [](uint32_t word, int i) { return widen(T{static_cast<uint16_t>(word >> (16 * i))}); };
    for (int lane = 0; lane < kLanes; ++lane) {
      const In& own = *static_cast<const In*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half(own.a[r], i);
        for (int r = 0; r < 2; ++r) right[2 * t + i + 8 * r][g] = half(own.b[r], i);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      float* own = static_cast<float*>(results[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k) own[i] += left[row][k] * right[k][column];
      }
    }
  });
}

template <typename Args>
void launch(const char* name, void (*kernel)(Args), const Shape& shape, Stream, const Args& args) {
  host::run(name, shape, [&] { kernel(args); });
}

}  // namespace fastmim::cuda
