// Narrow floating types as stored in memory; arithmetic is in float.
#pragma once

#include "portable.h"

namespace fastmim {

enum class Type : int { f32, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

FASTMIM_HD float widen(float value) {
  return value;
}

FASTMIM_HD float widen(Bf16 value) {
  return float_of(uint32_t{value.bits} << 16);
}

FASTMIM_HD float widen(F16 value) {
  // the exponent is rebiased by a product, which is exact for subnormals too
  const float magnitude = float_of(uint32_t{value.bits & 0x7fffu} << 13) * 0x1p112f;
  const uint32_t special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | special | (uint32_t{value.bits & 0x8000u} << 16));
}

template <typename T>
T narrow(float value);

template <>
FASTMIM_HD float narrow<float>(float value) {
  return value;
}

// to nearest even; a NaN stays one
template <>
FASTMIM_HD Bf16 narrow<Bf16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded >> 16)};
}

template <>
FASTMIM_HD F16 narrow<F16>(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u, bits = bits_of(value) & 0x7fffffffu;
  // below 2^-14 the spacing is that of floats next to 0.5
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = bits >= 0x47800000u ? special : bits < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(sign | magnitude)};
}

}  // namespace fastmim
