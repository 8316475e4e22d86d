// The scalar formulas of the losses.
#pragma once

#include <cmath>

#include "storage.h"

namespace fastmim {

enum class NormPix : int { none, patch, channel };

// divisor of a target: MAE adds its epsilon to the variance, VideoMAE to the deviation
FASTMIM_HD float deviation(NormPix norm, float var) {
  return norm == NormPix::patch ? sqrtf(var + 1e-6f) : sqrtf(var) + 1e-6f;
}

enum class ErrorLoss : int { squared, absolute, huber };

// the loss of an error, and its derivative over slope_factor
struct ErrorTerm {
  float loss, slope;
};

FASTMIM_HD float slope_factor(ErrorLoss form) {
  return form == ErrorLoss::squared ? 2.0f : 1.0f;
}

FASTMIM_HD ErrorTerm error_term(ErrorLoss form, float error) {
  const float square = error * error;
  if (form == ErrorLoss::squared) return {square, error};
  const float size = fabsf(error);
  // NaN stays in the last branch of each
  if (form == ErrorLoss::absolute) return {size, error > 0 ? 1.0f : error < 0 ? -1.0f : error};
  return {size > 1 ? size - 0.5f : 0.5f * square, error > 1 ? 1.0f : error < -1 ? -1.0f : error};
}

// (1 - cos)^gamma and its derivative by cos
struct CosineError {
  float loss, slope;
};

FASTMIM_HD CosineError cosine_error(float cosine, float gamma) {
  const float error = 1 - cosine;
  const float power = gamma == 2 ? error : gamma == 1 ? 1.0f : powf(error, gamma - 1);
  return {power * error, -gamma * power};
}

FASTMIM_HD float largest_of(Type type) {
  return type == Type::f32 ? 3.40282347e38f : type == Type::bf16 ? 0x1.fep127f : 65504.0f;
}

// the gradient by one value of x = own * norm * size, kept finite; 0 for a zero row
FASTMIM_HD float cosine_gradient(float slope, float cosine, float own, float other, float norm, float size,
                                 float largest) {
  const float value = size == 0 ? 0.0f : slope * (other - cosine * own) / norm / size;
  return value > largest ? largest : value < -largest ? -largest : value;
}

}  // namespace fastmim
