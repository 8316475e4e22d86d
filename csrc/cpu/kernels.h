// The kernels that each instruction set has, and their arguments. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/loss.h"
#include "../common/patches.h"
#include "../common/storage.h"

namespace fastmim::cpu {

// A tensor's memory with strides in elements; the letters of the axes stand at each use.
struct View {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t stride[4] = {0, 0, 0, 0};
  // written past the caches, which would read each line before it is written: rows of floats at multiples of 64 bytes
  bool streamed = false;
};

struct Masking {
  int64_t num_patches, len_keep, len_predict;
  View noise;            // (B, L); data null: drawn from seeds
  const int64_t* seeds;  // (B,)
  int64_t* ids_keep;     // (B, K)
  int64_t* ids_predict;  // (B, M)
  int64_t* ids_restore;  // (B, L)
};

struct GatherPatches {
  Patches patches;
  const int64_t* ids;  // (B, K)
  int64_t rows;        // K
  View out;            // (B * K, P) rows
};

struct ScatterPatches {
  Patches patches;  // of the gradient: `images` is written
  const int64_t* ids;
  int64_t rows;
  View grad;  // (B, K, P)
};

struct PixelLoss {
  Patches patches;
  const int64_t* ids;  // (B, M)
  int64_t rows;        // M
  NormPix norm;
  ErrorLoss form;
  View pred;               // (B, M, P)
  const float* row_scale;  // (B * M,)
  float* row_loss;         // (B * M,)
  View grad;               // (B * M, P) rows; data null: not wanted
};

struct CosineLoss {
  int64_t width;
  float gamma;
  View pred, target;              // (rows, D)
  const float* row_scale;         // (rows,)
  float* row_loss;                // (rows,)
  View dpred, dtarget;            // (rows, D); data null: not wanted
  Type pred_limit, target_limit;  // gradients stay finite in these
};

struct Attention {
  int64_t heads, queries, keys, dim;
  float scale;
  View q, k, v, grad;    // (B, S, H, D)
  const bool* key_mask;  // (B, Sk) or null
  int64_t key_mask_stride[2];
  const float* bias;  // (B, H, Sq, Sk) or null
  int64_t bias_stride[4];
  float* score_grad;     // (B, H, Sq, Sk), contiguous, or null
  float* sums;           // (B, 3, H, D), contiguous and zero: dq, dk and dv are added to it; or null
  View out, dq, dk, dv;  // (B, S, H, D)
};

struct AddLayerNorm {
  int64_t width;
  float eps;
  View x, residual;     // (rows, D), contiguous as all of them
  const float* x_bias;  // (D,), or null
  const float *weight, *bias;
  View normed, sum;    // (rows, D)
  float *mean, *rstd;  // (rows,)
};

struct AddLayerNormBackward {
  int64_t width;
  View grad_normed, grad_sum, sum;  // (rows, D); grad_sum's data may be null
  const float *mean, *rstd, *weight;
  const float* bias;      // null: normed isn't asked for
  View dsum, dx, normed;  // (rows, D); dx is dsum in another dtype, its data null where it isn't asked for
};

struct BiasGelu {
  int64_t width;
  View x, grad;  // (rows, D), contiguous as all of them
  const float* bias;
  View out;  // (rows, D) of x's type: the value; its data may be null in the backward pass
  View dx;   // (rows, D) of x's type
};

// a row of `type`, and the row of a table that is added to it
struct RowSum {
  Type type;
  const void *value, *table;
};

struct SumRows {
  int64_t rows, width;  // K, D
  View x;               // (B, K, D); values of a row are contiguous
};

// Crops of RGB bytes, resampled. A crop is cut into patches, or is one patch itself.
struct Resample {
  const uint8_t *source, *end;  // the crop's first byte; the end of the memory that it lies in
  int64_t row;                  // bytes from a row of the source to the next
  int64_t width, height;        // of the crop
  int64_t out_width, out_height;
  bool flip;  // mirror the result
  int64_t patch_width, patch_height, count;
  const int64_t* ids;   // (count,) patches, null: all of them
  bool planar;          // a patch is (3, height, width), otherwise (height, width, 3)
  uint8_t* out;         // (count, a patch)
  char *across, *down;  // weights of each axis, zero before the first call with its sizes
  char* scratch;
};

// the next `count` values of memory whose start is moved past them
template <typename T>
T* scratch_of(char*& memory, int64_t count) {
  T* start = reinterpret_cast<T*>(memory);
  memory += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
  return start;
}

// pixels past the end of a line that vectors may compute, and lines that are resampled at a time
constexpr int64_t kResampleMargin = 6, kResampleLines = 16;

// bytes of a line in scratch memory; vectors write up to 16 past it
inline int64_t resample_stride(int64_t width) {
  return (3 * width + 16 + 63) / 64 * 64;
}

// largest number of input pixels for one output pixel
inline int64_t resample_taps(int64_t in, int64_t out) {
  return 2 * ((2 * std::max(in, out) + out - 1) / out) + 1;
}

// rows of the input that are read for kResampleLines of the output, with weight 0 too
inline int64_t resample_rows_held(int64_t in, int64_t out) {
  return kResampleLines * in / out + resample_taps(in, out) + 4;
}

struct Kernels {
  const char* name;
  // whether no noise was NaN
  bool (*random_masking)(const Masking&, int64_t begin, int64_t end);
  void (*gather_patches)(const GatherPatches&, int64_t begin, int64_t end);
  void (*scatter_patches)(const ScatterPatches&, int64_t begin, int64_t end);
  void (*pixel_loss)(const PixelLoss&, int64_t begin, int64_t end);
  void (*cosine_loss)(const CosineLoss&, int64_t begin, int64_t end);
  void (*attention)(const Attention&, int64_t begin, int64_t end);
  void (*attention_backward)(const Attention&, int64_t begin, int64_t end);
  void (*add_layer_norm)(const AddLayerNorm&, int64_t begin, int64_t end);
  // dx_bias null: isn't asked for
  void (*add_layer_norm_backward)(const AddLayerNormBackward&, float* dweight, float* dbias, float* dx_bias,
                                  int64_t begin, int64_t end);
  void (*bias_gelu)(const BiasGelu&, int64_t begin, int64_t end);
  void (*bias_gelu_backward)(const BiasGelu&, float* dbias, int64_t begin, int64_t end);
  void (*add_row)(Type a_type, const void* a, Type b_type, const void* b, Type out_type, void* out, int64_t width);
  void (*add_rows)(const RowSum* sums, int64_t count, Type table_type, const View& out, int64_t first, int64_t width);
  // adds rows begin..end of (B * K, D)
  void (*sum_rows)(const SumRows&, float* sums, int64_t begin, int64_t end);
  void (*copy_row)(Type a_type, const void* a, Type out_type, void* out, int64_t width);
  // the number of pixels that its two passes made
  int64_t (*resample)(const Resample&);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

// avx512's, but for attention of bf16; null where the processor or the compiler has no AVX512-BF16
const Kernels* avx512_bf16_kernels();

// the fastest set this processor has; FASTMIM_ISA names a lower one
const Kernels& kernels();

}  // namespace fastmim::cpu
