// Values of any storage type, read and written one or many at a time, as floats.
#pragma once

#include "device.h"

namespace fastmim::cuda {

// value `i` of an array
FASTMIM_DEVICE float load_value(Type type, const void* from, int64_t i) {
  if (type == Type::f32) return load(static_cast<const float*>(from) + i);
  if (type == Type::bf16) return widen(load(static_cast<const Bf16*>(from) + i));
  return widen(load(static_cast<const F16*>(from) + i));
}

FASTMIM_DEVICE void store_value(Type type, void* to, int64_t i, float value) {
  if (type == Type::f32) store(static_cast<float*>(to) + i, value);
  if (type == Type::bf16) store(static_cast<Bf16*>(to) + i, narrow<Bf16>(value));
  if (type == Type::f16) store(static_cast<F16*>(to) + i, narrow<F16>(value));
}

// COUNT values from value `i` on, which lies on a multiple of 16 bytes: a multiple of 8 for narrow types, of 4 for f32
template <int COUNT>
FASTMIM_DEVICE void load_values(Type type, const void* from, int64_t i, float (&value)[COUNT]) {
  if (type == Type::f32) {
#pragma unroll
    for (int j = 0; j < COUNT; j += 4) {
      const Words words = load(reinterpret_cast<const Words*>(static_cast<const float*>(from) + i + j));
#pragma unroll
      for (int w = 0; w < 4; ++w) value[j + w] = float_of(words.word[w]);
    }
    return;
  }
  if constexpr (COUNT % 8 == 0) {
#pragma unroll
    for (int j = 0; j < COUNT; j += 8) {
      const Words words = load(reinterpret_cast<const Words*>(static_cast<const uint16_t*>(from) + i + j));
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const auto bits = static_cast<uint16_t>(words.word[w / 2] >> (w % 2 * 16));
        value[j + w] = type == Type::bf16 ? widen(Bf16{bits}) : widen(F16{bits});
      }
    }
  }
}

template <int COUNT>
FASTMIM_DEVICE void store_values(Type type, void* to, int64_t i, const float (&value)[COUNT]) {
  if (type == Type::f32) {
#pragma unroll
    for (int j = 0; j < COUNT; j += 4) {
      const Words words{{bits_of(value[j]), bits_of(value[j + 1]), bits_of(value[j + 2]), bits_of(value[j + 3])}};
      store(reinterpret_cast<Words*>(static_cast<float*>(to) + i + j), words);
    }
    return;
  }
  if constexpr (COUNT % 8 == 0) {
#pragma unroll
    for (int j = 0; j < COUNT; j += 8) {
      Words words;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float low = value[j + 2 * w], high = value[j + 2 * w + 1];
        words.word[w] = type == Type::bf16 ? pack<Bf16>(low, high) : pack<F16>(low, high);
      }
      store(reinterpret_cast<Words*>(static_cast<uint16_t*>(to) + i + j), words);
    }
  }
}

}  // namespace fastmim::cuda
