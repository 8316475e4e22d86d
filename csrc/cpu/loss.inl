// Losses row by row, each with its gradient.

// Subtracts the mean of the values and divides by their deviation. Differences from the first value are summed, so that
// the values of a flat patch become exactly 0.
FASTMIM_HD void normalize(NormPix norm, float* values, int64_t count) {
  const float first = values[0];
  for (int64_t i = 0; i < count; ++i) values[i] -= first;
  const float mean = sum(values, count) / static_cast<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] -= mean;
  const float divisor = deviation(norm, dot(values, values, count) / static_cast<float>(count - 1));
  for (int64_t i = 0; i < count; ++i) values[i] /= divisor;
}

static void write_zeros(const View& out, int64_t row, int64_t width, float* scratch) {
  if (out.data == nullptr) return;
  float* to = target_of(out, row, scratch);
  for (int64_t i = 0; i < width; ++i) to[i] = 0;
  finish(out, row, width, scratch);
}

static void pixel_loss(const PixelLoss& args, int64_t begin, int64_t end) {
  const int64_t values = patch_values(args.patches), channels = args.patches.channels, area = values / channels;
  Scratch memory;
  float *target = memory.take(values), *pred = memory.take(values), *out = memory.take(values);
  for (int64_t row = begin; row < end; ++row) {
    // a row of weight 0 is not read, so that NaN in it has no effect
    if (args.row_scale[row] == 0) {
      args.row_loss[row] = 0;
      write_zeros(args.grad, row, values, out);
      continue;
    }
    const int64_t b = row / args.rows, m = row % args.rows;
    if (row + 1 < end)
      prefetch_patch(args.patches, patch_start(args.patches, (row + 1) / args.rows, args.ids[row + 1]));
    read_patch(args.patches, patch_start(args.patches, b, args.ids[row]), target, 1, channels);
    if (args.norm == NormPix::patch) {
      normalize(args.norm, target, values);
    } else if (args.norm == NormPix::channel) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < area; ++i) out[i] = target[i * channels + c];
        normalize(args.norm, out, area);
        for (int64_t i = 0; i < area; ++i) target[i * channels + c] = out[i];
      }
    }
    load_row(args.pred.type, at(args.pred, b * args.pred.stride[0] + m * args.pred.stride[1]), args.pred.stride[2],
             pred, values);
    for (int64_t i = 0; i < values; ++i) pred[i] -= target[i];
    args.row_loss[row] = dot(pred, pred, values) / static_cast<float>(values);
    if (args.grad.data != nullptr) {
      const float scale = args.row_scale[row] * (2.0f / static_cast<float>(values));
      float* grad = target_of(args.grad, row, out);
      for (int64_t i = 0; i < values; ++i) grad[i] = pred[i] * scale;
      finish(args.grad, row, values, out);
    }
  }
}

// x = direction * norm * size with size a power of two near the largest magnitude: no square overflows, and products
// with 1 / size are exact. A zero row has size 0 and direction 0.
FASTMIM_HD void direction(const float* x, int64_t width, float* unit, float& size, float& norm) {
  float largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t i = 0; i < width; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    poison += magnitude - magnitude;  // 0, or NaN where x is not finite
  }
  if (largest == 0) {
    for (int64_t i = 0; i < width; ++i) unit[i] = poison;
    size = 0, norm = 1;
    return;
  }
  // both size and its inverse are normal numbers
  const uint32_t exponent = bits_of(largest) & 0x7f800000u;
  size = float_of(exponent < 0x00800000u ? 0x00800000u : exponent > 0x7e800000u ? 0x7e800000u : exponent);
  const float inverse_size = 1 / size;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) unit[i] = x[i] * inverse_size;
  norm = __builtin_sqrtf(dot(unit, unit, width));
  const float inverse = 1 / norm;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) unit[i] = unit[i] * inverse + poison;
}

static void write_cosine_gradient(const View& out, int64_t row, int64_t width, float slope, float cosine,
                                  const float* own, const float* other, float size, float norm, Type limit,
                                  float* scratch) {
  float* grad = target_of(out, row, scratch);
  const float largest = largest_of(limit);
  for (int64_t i = 0; i < width; ++i) grad[i] = cosine_gradient(slope, cosine, own[i], other[i], norm, size, largest);
  finish(out, row, width, scratch);
}

static void cosine_loss(const CosineLoss& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  Scratch memory;
  float *x = memory.take(width), *y = memory.take(width), *a = memory.take(width), *b = memory.take(width);
  for (int64_t row = begin; row < end; ++row) {
    if (args.row_scale[row] == 0) {
      args.row_loss[row] = 0;
      write_zeros(args.dpred, row, width, a);
      write_zeros(args.dtarget, row, width, b);
      continue;
    }
    float x_size, x_norm, y_size, y_norm;
    direction(row_of(args.pred, row, width, a), width, x, x_size, x_norm);
    direction(row_of(args.target, row, width, b), width, y, y_size, y_norm);
    const float product = dot(x, y, width), cosine = product > 1 ? 1 : product < -1 ? -1 : product;
    const CosineError error = cosine_error(cosine, args.gamma);
    args.row_loss[row] = error.loss;
    const float slope = error.slope * args.row_scale[row];
    if (args.dpred.data != nullptr) {
      write_cosine_gradient(args.dpred, row, width, slope, cosine, x, y, x_size, x_norm, args.pred_limit, a);
    }
    if (args.dtarget.data != nullptr) {
      write_cosine_gradient(args.dtarget, row, width, slope, cosine, y, x, y_size, y_norm, args.target_limit, b);
    }
  }
}
