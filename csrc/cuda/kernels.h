// Launchers of the kernels and their arguments: pointers, sizes, strides in elements, a stream. No torch here.
#pragma once

#include <cstdint>

#include "../common/loss.h"
#include "../common/patches.h"
#include "../common/storage.h"

namespace fastmim::cuda {

using Stream = void*;

struct Masking {
  int64_t batch, num_patches, len_keep, len_predict;
  const void* noise;  // (B, L) of `type`, or null: drawn from seeds
  Type type;
  int64_t noise_stride[2];
  const int64_t* seeds;  // (B,)
  int64_t seeds_stride;
  int64_t* ids_keep;     // (B, K)
  int64_t* ids_predict;  // (B, M)
  int64_t* ids_restore;  // (B, L)
};

// Patches of images by id; rows are (b, k), k fastest.
struct PatchRows {
  Patches patches;  // of float mean and std, or null; the table of uint8 pixels is made in shared memory
  const int64_t* ids;
  int64_t ids_stride[2];
  int64_t rows, per_image;
};

struct GatherPatches {
  PatchRows from;
  void* out;  // (rows, P), contiguous
  Type out_type;
};

struct ScatterPatches {
  PatchRows to;      // `images` is written: contiguous, zeros before
  const void* grad;  // (B, K, P)
  Type type;
  int64_t grad_stride[3];
};

// rows of embeddings: the prefix, then tokens with the position of their patch
struct PlaceTokens {
  int64_t rows, per_image, prefixes, width, num_patches;
  const int64_t* ids;
  int64_t ids_stride[2];
  const void *tokens, *positions, *prefix, *out;  // (B * K, D), (L, D) or null, (N, D) or null, (B, N + K, D)
  Type type, positions_type, prefix_type;         // of tokens and out, of positions, of prefix
};

struct PixelLoss {
  PatchRows target;
  NormPix norm;
  ErrorLoss form;
  const void* pred;  // (B, M, P)
  Type type;
  int64_t pred_stride[3];
  const float* weight;        // (rows,) or null
  const float* weight_total;  // one value, or null: weights are used as they are
  float share;                // of each row where there is no weight
  float* losses;              // (rows,)
  void* grad;                 // (rows, P) or null
  Type grad_type;
};

struct CosineLoss {
  int64_t rows, width;
  float gamma;
  const void *pred, *target;  // (rows, D), contiguous
  Type pred_type, target_type;
  const float* weight;        // (rows,) or null
  const float* weight_total;  // one value, or null: weights are used as they are
  float share;                // of each row where there is no weight
  float* losses;              // (rows,)
  void *dpred, *dtarget;      // (rows, D) or null
  Type dpred_type, dtarget_type;
};

// rows of (B, S, H, D), D contiguous, each row on a multiple of 16 bytes
struct Heads {
  void* data;
  int64_t batch, row, head;
};

struct Attention {
  int64_t batch;
  int heads, queries, keys, dim;
  float scale;
  Type type;
  Heads q, k, v, out;
  Heads grad, dq, dk, dv;  // backward
  const bool* key_mask;    // (B, Sk) or null
  int64_t mask_batch, mask_key;
};

void launch_random_masking(const Masking& args, Stream stream);
void launch_gather_patches(const GatherPatches& args, Stream stream);
void launch_scatter_patches(const ScatterPatches& args, Stream stream);
void launch_place_tokens(const PlaceTokens& args, Stream stream);
void launch_pixel_loss(const PixelLoss& args, Stream stream);
void launch_cosine_loss(const CosineLoss& args, Stream stream);
void launch_attention(const Attention& args, Stream stream);
void launch_attention_backward(const Attention& args, Stream stream);

// the reason why the kernels can't serve these arguments on the current device; null where they can
const char* refuses_pixel_loss(const PixelLoss& args);
const char* refuses_cosine_loss(const CosineLoss& args);
const char* refuses_attention(const Attention& args);
const char* refuses_attention_backward(const Attention& args);

}  // namespace fastmim::cuda
