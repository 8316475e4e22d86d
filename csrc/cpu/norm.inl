// The elementwise passes of a transformer block, a row at a time.

static void add_layer_norm(const AddLayerNorm& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  const float *weight = args.weight, *bias = args.bias, *x_bias = args.x_bias;
  Scratch memory;
  float *a = memory.take(width), *b = memory.take(width), *c = memory.take(width), *d = memory.take(width);
  for (int64_t row = begin; row < end; ++row) {
    const float *residual = row_of(args.residual, row, width, b), *sum = residual;
    if (args.x.data != nullptr) {
      const float* x = row_of(args.x, row, width, a);
      float* target = target_of(args.sum, row, c);
      by_vectors(width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
        Vec value = lanes.get(x + i);
        if (x_bias != nullptr) value += lanes.get(x_bias + i);
        lanes.put(target + i, value + lanes.get(residual + i));
      });
      if (target == c && args.sum.type != Type::f32) {
        // the norm is taken of the sum as it is stored
        store_row(args.sum.type, at(args.sum, row * args.sum.stride[0]), 1, c, width);
        load_row(args.sum.type, at(args.sum, row * args.sum.stride[0]), 1, c, width);
      }
      sum = target;
    }
    const float mean = total(sum, width) / static_cast<float>(width);
    Vec square[4] = {};
    float rest = 0;
    by_vectors<4>(width, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP {
      const Vec off = lanes.get(sum + i) - mean;
      if constexpr (std::is_same_v<decltype(lanes), Rest>) {
        for (int64_t lane = 0; lane < lanes.count; ++lane) rest += off[lane] * off[lane];
      } else {
        square[chain] += off * off;
      }
    });
    const float squares = sum_of((square[0] + square[1]) + (square[2] + square[3])) + rest;
    const float rstd = 1 / __builtin_sqrtf(squares / static_cast<float>(width) + args.eps);
    float* normed = target_of(args.normed, row, d);
    by_vectors(width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
      lanes.put(normed + i, (lanes.get(sum + i) - mean) * rstd * lanes.get(weight + i) + lanes.get(bias + i));
    });
    finish(args.normed, row, width, d);
    if (args.sum.streamed) finish(args.sum, row, width, c);
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
  finish_streams();
}

// Adds the rows' part of the gradients of weight, bias and x_bias, ROWS at a time: those gradients are read and written
// once for all of them.
template <int ROWS, bool THROUGH>
static void add_layer_norm_backward_rows(const AddLayerNormBackward& args, float* dweight, float* dbias, float* dx_bias,
                                         int64_t begin, float* memory) {
  const int64_t width = args.width;
  const float *weight = args.weight, *bias = args.bias;
  const float *grad[ROWS], *through[ROWS], *sum[ROWS];
  float *out[ROWS], *spare[ROWS], mean[ROWS], rstd[ROWS], first[ROWS], second[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = begin + r;
    grad[r] = row_of(args.grad_normed, row, width, memory), memory += width;
    if constexpr (THROUGH) through[r] = row_of(args.grad_sum, row, width, memory), memory += width;
    sum[r] = row_of(args.sum, row, width, memory), memory += width;
    spare[r] = memory, memory += width;
    out[r] = target_of(args.dsum, row, spare[r]);
    // one value has no deviation: its gradient is exactly 0, whatever the products below are rounded to
    mean[r] = args.mean[row], rstd[r] = width == 1 ? 0 : args.rstd[row];
    Vec a[2] = {}, b[2] = {};
    by_vectors<2>(width, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP {
      const Vec weighted = lanes.get(grad[r] + i) * lanes.get(weight + i);
      a[chain] += weighted;
      b[chain] += weighted * ((lanes.get(sum[r] + i) - mean[r]) * rstd[r]);
    });
    first[r] = sum_of(a[0] + a[1]) / static_cast<float>(width);
    second[r] = sum_of(b[0] + b[1]) / static_cast<float>(width);
  }
  by_vectors(width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
    const Vec factor = lanes.get(weight + i);
    Vec to_weight = {}, to_bias = {}, to_x_bias = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec gradient = lanes.get(grad[r] + i), normed = (lanes.get(sum[r] + i) - mean[r]) * rstd[r];
      to_weight += gradient * normed;
      to_bias += gradient;
      Vec to_sum = (gradient * factor - first[r] - normed * second[r]) * rstd[r];
      if constexpr (THROUGH) to_sum += lanes.get(through[r] + i);
      to_x_bias += to_sum;
      lanes.put(out[r] + i, to_sum);
    }
    lanes.put(dweight + i, lanes.get(dweight + i) + to_weight);
    lanes.put(dbias + i, lanes.get(dbias + i) + to_bias);
    if (dx_bias != nullptr) lanes.put(dx_bias + i, lanes.get(dx_bias + i) + to_x_bias);
  });
  for (int r = 0; r < ROWS; ++r) {
    finish(args.dsum, begin + r, width, out[r]);
    if (args.dx.data != nullptr)
      store_row(args.dx.type, at(args.dx, (begin + r) * args.dx.stride[0]), 1, out[r], width);
    if (bias == nullptr) continue;
    float* again = target_of(args.normed, begin + r, spare[r]);
    by_vectors(width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
      const Vec normed = (lanes.get(sum[r] + i) - mean[r]) * rstd[r];
      lanes.put(again + i, normed * lanes.get(weight + i) + lanes.get(bias + i));
    });
    finish(args.normed, begin + r, width, again);
  }
}

template <bool THROUGH>
static void add_layer_norm_backward_as(const AddLayerNormBackward& args, float* dweight, float* dbias, float* dx_bias,
                                       int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  Scratch scratch;
  float* memory = scratch.take(4 * kRows * args.width);
  for (; begin + kRows <= end; begin += kRows)
    add_layer_norm_backward_rows<kRows, THROUGH>(args, dweight, dbias, dx_bias, begin, memory);
  for (; begin < end; ++begin) add_layer_norm_backward_rows<1, THROUGH>(args, dweight, dbias, dx_bias, begin, memory);
  finish_streams();
}

static void add_layer_norm_backward(const AddLayerNormBackward& args, float* dweight, float* dbias, float* dx_bias,
                                    int64_t begin, int64_t end) {
  if (args.grad_sum.data == nullptr)
    return add_layer_norm_backward_as<false>(args, dweight, dbias, dx_bias, begin, end);
  add_layer_norm_backward_as<true>(args, dweight, dbias, dx_bias, begin, end);
}

// values of a row that are processed at a time
constexpr int64_t kPiece = 512;

static void bias_gelu(const BiasGelu& args, int64_t begin, int64_t end) {
  alignas(64) float x_memory[kPiece] = {}, bias_memory[kPiece] = {}, out_memory[kPiece];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t start = 0; start < args.width; start += kPiece) {
      const int64_t count = args.width - start < kPiece ? args.width - start : kPiece;
      const float* x = piece_of(args.x, row, start, count, x_memory);
      const float* bias = whole_vectors(args.bias + start, count, bias_memory);
      float* out = piece_target(args.out, row, start, count, out_memory);
      for (int64_t i = 0; i < count; i += VL) {
        Vec bell;
        const Vec value = load(x + i) + load(bias + i);
        store(out + i, value * normal_distribution(value, bell));
      }
      finish_piece(args.out, row, start, count, out, out_memory);
    }
  }
}

// adds the rows' part of the gradient of bias
static void bias_gelu_backward(const BiasGelu& args, float* dbias, int64_t begin, int64_t end) {
  alignas(64) float x_memory[kPiece] = {}, bias_memory[kPiece] = {}, grad_memory[kPiece] = {}, dx_memory[kPiece],
                    out_memory[kPiece];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t start = 0; start < args.width; start += kPiece) {
      const int64_t count = args.width - start < kPiece ? args.width - start : kPiece;
      const float* x = piece_of(args.x, row, start, count, x_memory);
      const float* grad = piece_of(args.grad, row, start, count, grad_memory);
      const float* bias = whole_vectors(args.bias + start, count, bias_memory);
      float* dx = piece_target(args.dx, row, start, count, dx_memory);
      float* out = args.out.data == nullptr ? out_memory : piece_target(args.out, row, start, count, out_memory);
      for (int64_t i = 0; i < count; i += VL) {
        Vec bell;
        const Vec value = load(x + i) + load(bias + i);
        const Vec phi = normal_distribution(value, bell);
        store(dx + i, load(grad + i) * (phi + value * bell * 0.398942280f));
        store(out + i, value * phi);
      }
      by_vectors(count, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
        lanes.put(dbias + start + i, lanes.get(dbias + start + i) + lanes.get(dx + i));
      });
      finish_piece(args.dx, row, start, count, dx, dx_memory);
      if (args.out.data != nullptr) finish_piece(args.out, row, start, count, out, out_memory);
    }
  }
}
