// Shared by both directions of attention: tiles in shared memory and their products on the tensor cores.
//
// A tile is rows of D values, D a multiple of 16 and the head's own columns followed by zeros. Its rows lie D + 8
// values apart, an odd number of 16-byte words, so that the eight rows that ldmatrix reads at a time fall on different
// banks.
#pragma once

#include "device.h"
#include "kernels.h"

namespace fastmim::cuda {

constexpr int kTile = 16;  // rows that a warp owns, and the depth of one product

template <int D>
constexpr int kPitch = D + 8;

// offset from which this lane reads a 16x16 tile at (row, column): four matrices, rows first or columns first
template <int PITCH>
FASTMIM_DEVICE int rows_first(int row, int column) {
  return (row + lane() / 8 % 2 * 8 + lane() % 8) * PITCH + column + lane() / 16 * 8;
}

template <int PITCH>
FASTMIM_DEVICE int columns_first(int row, int column) {
  return (row + lane() / 16 * 8 + lane() % 8) * PITCH + column + lane() / 8 % 2 * 8;
}

// an item: a head of a sequence
struct Item {
  int64_t b;
  int h;
};

// item `item` of the `items` that a block owns; divisions are of 32 bits, which the number of an item may exceed
FASTMIM_DEVICE Item item_of(const Attention& args, int items, int item) {
  const auto place = static_cast<uint32_t>(block()), heads = static_cast<uint32_t>(args.heads);
  const uint32_t within = place % heads * static_cast<uint32_t>(items) + static_cast<uint32_t>(item);
  return {int64_t{place / heads} * items + within / heads, static_cast<int>(within % heads)};
}

// row `row` of a (sequence, head), in global memory
template <typename T>
FASTMIM_DEVICE T* row_of(const Heads& heads, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(heads.data) + b * heads.batch + h * heads.head + row * heads.row;
}

// word `word` of a row on its way to shared memory; zeros behind the head's columns and where not `valid`
template <typename T>
FASTMIM_DEVICE void fetch_word(T* to, const T* row, int word, int dim, bool valid) {
  copy_async(to + word * 8, row + (word * 8 < dim ? word * 8 : 0), valid && word * 8 < dim);
}

// 16 rows of a tile, which one warp wrote, to rows first.. of a (sequence, head)
template <typename T, int D>
FASTMIM_DEVICE void store_rows(const Heads& to, int64_t b, int64_t h, int first, int rows, int dim, const T* tile) {
  sync_warp();
  for (int i = lane(); i < kTile * (D / 8); i += kLanes) {
    const int row = i / (D / 8), word = i % (D / 8);
    if (first + row < rows && word * 8 < dim) {
      store(reinterpret_cast<Words*>(row_of<T>(to, b, h, first + row) + word * 8),
            load(reinterpret_cast<const Words*>(tile + row * kPitch<D> + word * 8)));
    }
  }
}

// a tile of 16 rows from accumulators, each of its two rows of a lane times a factor
template <typename T, int COLUMNS>
FASTMIM_DEVICE void write_tile(T* tile, int pitch, const float (&c)[COLUMNS / 8][4], float upper, float lower) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n) {
    store(reinterpret_cast<uint32_t*>(tile + g * pitch + n * 8 + 2 * t), pack<T>(c[n][0] * upper, c[n][1] * upper));
    store(reinterpret_cast<uint32_t*>(tile + (g + 8) * pitch + n * 8 + 2 * t),
          pack<T>(c[n][2] * lower, c[n][3] * lower));
  }
}

// the fragments of 16 rows, to be multiplied from the left
template <typename T, int D>
FASTMIM_DEVICE void load_rows(uint32_t (&a)[D / 16][4], const T* tile) {
#pragma unroll
  for (int d = 0; d < D / 16; ++d) load_matrices(a[d], tile + rows_first<kPitch<D>>(0, d * 16));
}

// c (16 x KEYS) = a bᵀ, with b the first `count` (a multiple of 16) of KEYS rows; 0 behind them
template <typename T, int D, int KEYS>
FASTMIM_DEVICE void multiply_by_rows(float (&c)[KEYS / 8][4], const uint32_t (&a)[D / 16][4], const T* b, int count) {
#pragma unroll
  for (int n = 0; n < KEYS; n += kTile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n / 8][i] = c[n / 8 + 1][i] = 0;
    if (n >= count) continue;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t right[4];
      load_matrices(right, b + columns_first<kPitch<D>>(n, d * 16));
      multiply<T>(c[n / 8], a[d], right[0], right[1]);
      multiply<T>(c[n / 8 + 1], a[d], right[2], right[3]);
    }
  }
}

// c (16 x D) += a (16 x 16) b, with b 16 rows
template <typename T, int D>
FASTMIM_DEVICE void multiply_by_columns(float (&c)[D / 8][4], const uint32_t (&a)[4], const T* b) {
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t right[4];
    load_matrices_transposed(right, b + rows_first<kPitch<D>>(0, d));
    multiply<T>(c[d / 8], a, right[0], right[1]);
    multiply<T>(c[d / 8 + 1], a, right[2], right[3]);
  }
}

// c (16 x D) += weights (16 x KEYS, accumulators of another product) b, with b the first `count` of KEYS rows
template <typename T, int D, int KEYS>
FASTMIM_DEVICE void multiply_weights(float (&c)[D / 8][4], const float (&weights)[KEYS / 8][4], const T* b, int count) {
#pragma unroll
  for (int n = 0; n < KEYS; n += kTile) {
    if (n >= count) continue;
    const float (&left)[4] = weights[n / 8], (&right)[4] = weights[n / 8 + 1];
    // accumulators of two adjacent products are laid out as one left operand
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                           pack<T>(right[2], right[3])};
    multiply_by_columns<T, D>(c, a, b + n * kPitch<D>);
  }
}

// scores in powers of two, rounded before the maximum of a row is subtracted: none may exceed it; -infinity for masked
// keys
template <int KEYS>
FASTMIM_DEVICE void mask_scores(float (&scores)[KEYS / 8][4], const uint8_t* attends, int count, float scale) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = n * 8 + 2 * (lane() % 4) + i;
      const bool attended = key < count && load(attends + key) != 0;
      scores[n][i] = attended ? product_of(scores[n][i], scale) : -INFINITY;
      scores[n][i + 2] = attended ? product_of(scores[n][i + 2], scale) : -INFINITY;
    }
  }
}

// the largest of a row, over the four lanes that share it
template <int KEYS>
FASTMIM_DEVICE float largest_of_row(const float (&value)[KEYS / 8][4], int half) {
  float largest = -INFINITY;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) largest = fmaxf(largest, fmaxf(value[n][2 * half], value[n][2 * half + 1]));
  return largest_of_lanes<4>(largest);
}

// scores become e^(score - top); returns this lane's part of the row's sum
template <int KEYS>
FASTMIM_DEVICE float exponentiate_row(float (&scores)[KEYS / 8][4], int half, float top) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      scores[n][i] = exp2_of(scores[n][i] - top);
      sum += scores[n][i];
    }
  }
  return sum;
}

FASTMIM_HD int round_up(int count, int to) {
  return (count + to - 1) / to * to;
}

// whether `key`, one of the padded keys of sequence b, is attended to; `real` says that the sequence exists
FASTMIM_DEVICE bool attends_to(const Attention& args, bool real, int64_t b, int key) {
  if (!real || key >= args.keys) return false;
  return args.key_mask == nullptr || load(args.key_mask + b * args.mask_batch + key * args.mask_key);
}

// chosen(T{}, integral_constant D) for the type and the smallest D that holds the head's columns
template <typename Chosen>
void with_head(const Attention& args, const Chosen& chosen) {
  const auto typed = [&](auto zero) {
    if (args.dim <= 32) return chosen(zero, std::integral_constant<int, 32>());
    if (args.dim <= 64) return chosen(zero, std::integral_constant<int, 64>());
    if (args.dim <= 80) return chosen(zero, std::integral_constant<int, 80>());
    return chosen(zero, std::integral_constant<int, 96>());
  };
  if (args.type == Type::bf16) return typed(Bf16{});
  return typed(F16{});
}

// the reason why no form serves these arguments, or null
inline const char* refuses_heads(const Attention& args) {
  if (args.type == Type::f32) return "float32 is not served: tensor cores would round it";
  if (args.dim % 8 || args.dim > 96 || args.dim == 0) return "head dimensions up to 96 in multiples of 8 are served";
  return nullptr;
}

}  // namespace fastmim::cuda
