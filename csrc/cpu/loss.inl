// Losses row by row, each with its gradient.

// Subtracts the mean of the values and divides by their deviation. Differences from the first value are summed, so that
// the values of a flat patch become exactly 0.
FASTMIM_HD void normalize(NormPix norm, float* values, int64_t count) {
  const float first = values[0];
  for (int64_t i = 0; i < count; ++i) values[i] -= first;
  const float mean = total(values, count) / static_cast<float>(count);
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

// Returns the sum of the losses of a row's errors, which become slopes; as error_term.
template <ErrorLoss FORM>
FASTMIM_HD float error_loss_as(float* errors, int64_t count) {
  Vec losses[4] = {};
  by_vectors<4>(count, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP {
    constexpr float corner = FORM == ErrorLoss::huber ? 1.0f : 0.0f;
    const Vec error = lanes.get(errors + i), size = larger(error, -error);
    if constexpr (FORM == ErrorLoss::absolute) losses[chain] += size;
    if constexpr (FORM == ErrorLoss::huber) losses[chain] += size > 1.0f ? size - 0.5f : 0.5f * error * error;
    lanes.put(errors + i, error > corner ? splat(1.0f) : error < -corner ? splat(-1.0f) : error);
  });
  return sum_of((losses[0] + losses[1]) + (losses[2] + losses[3]));
}

FASTMIM_HD float error_loss(ErrorLoss form, float* errors, int64_t count) {
  if (form == ErrorLoss::squared) return dot(errors, errors, count);
  if (form == ErrorLoss::absolute) return error_loss_as<ErrorLoss::absolute>(errors, count);
  return error_loss_as<ErrorLoss::huber>(errors, count);
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
    args.row_loss[row] = error_loss(args.form, pred, values) / static_cast<float>(values);
    if (args.grad.data != nullptr) {
      const float scale = args.row_scale[row] * (slope_factor(args.form) / static_cast<float>(values));
      float* grad = target_of(args.grad, row, out);
      for (int64_t i = 0; i < values; ++i) grad[i] = pred[i] * scale;
      finish(args.grad, row, values, out);
    }
  }
}

// the bits of a row's largest magnitude, those of infinity or above where a value is not finite
FASTMIM_HD uint32_t top_of(const float* x, int64_t width) {
  Int top[4] = {};
  by_vectors<4>(width, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP {
    const Int magnitude = (Int)lanes.get(x + i) & 0x7fffffff;
    top[chain] = magnitude > top[chain] ? magnitude : top[chain];
  });
  const auto larger_of = [](Int a, Int b) { return a > b ? a : b; };
  const Int largest = larger_of(larger_of(top[0], top[1]), larger_of(top[2], top[3]));
  int32_t of_row = 0;
  for (int lane = 0; lane < VL; ++lane) of_row = largest[lane] > of_row ? largest[lane] : of_row;
  return static_cast<uint32_t>(of_row);
}

// x = unit * norm * size with size a power of two near the largest magnitude: no square overflows, and products with
// 1 / size are exact. Both size and its inverse are normal numbers. A zero row has inverse_size 0 and unit 0.
struct Direction {
  float inverse_size, inverse_norm;
};

FASTMIM_HD float inverse_size(uint32_t top) {
  const uint32_t exponent = top & 0x7f800000u;
  const float size = float_of(exponent < 0x00800000u ? 0x00800000u : exponent > 0x7e800000u ? 0x7e800000u : exponent);
  return top == 0 ? 0 : 1 / size;
}

static void write_cosine_gradient(const View& out, int64_t row, int64_t width, float slope, float cosine,
                                  const float* own, const Direction& of_own, const float* other,
                                  const Direction& of_other, Type limit, float* scratch) {
  if (of_own.inverse_size == 0) return write_zeros(out, row, width, scratch);
  float* grad = target_of(out, row, scratch);
  const Vec largest = splat(largest_of(limit));
  by_vectors(width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
    const Vec unit = lanes.get(own + i) * of_own.inverse_size * of_own.inverse_norm,
              other_unit = lanes.get(other + i) * of_other.inverse_size * of_other.inverse_norm;
    const Vec value = slope * (other_unit - cosine * unit) * of_own.inverse_norm * of_own.inverse_size;
    lanes.put(grad + i, value > largest ? largest : value < -largest ? -largest : value);
  });
  finish(out, row, width, scratch);
}

static void cosine_loss(const CosineLoss& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  Scratch memory;
  float *a = memory.take(width), *b = memory.take(width), *c = memory.take(width);
  for (int64_t row = begin; row < end; ++row) {
    if (args.row_scale[row] == 0) {
      args.row_loss[row] = 0;
      write_zeros(args.dpred, row, width, a);
      write_zeros(args.dtarget, row, width, b);
      continue;
    }
    const float *x = row_of(args.pred, row, width, a), *y = row_of(args.target, row, width, b);
    const uint32_t x_top = top_of(x, width), y_top = top_of(y, width);
    Direction of_x{inverse_size(x_top), 1}, of_y{inverse_size(y_top), 1};
    Vec xx[2] = {}, yy[2] = {}, xy[2] = {};
    by_vectors<2>(width, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP {
      const Vec left = lanes.get(x + i) * of_x.inverse_size, right = lanes.get(y + i) * of_y.inverse_size;
      xx[chain] += left * left, yy[chain] += right * right, xy[chain] += left * right;
    });
    float cosine = 0;
    const float x_square = sum_of(xx[0] + xx[1]), y_square = sum_of(yy[0] + yy[1]);
    if (x_top != 0) of_x.inverse_norm = 1 / __builtin_sqrtf(x_square);
    if (y_top != 0) of_y.inverse_norm = 1 / __builtin_sqrtf(y_square);
    if (x_top != 0 && y_top != 0) cosine = sum_of(xy[0] + xy[1]) / __builtin_sqrtf(x_square * y_square);
    cosine = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
    // a row with a value that is not finite has no direction
    if (std::max(x_top, y_top) >= 0x7f800000u) cosine = __builtin_nanf("");
    const CosineError error = cosine_error(cosine, args.gamma);
    args.row_loss[row] = error.loss;
    const float slope = error.slope * args.row_scale[row];
    if (args.dpred.data != nullptr)
      write_cosine_gradient(args.dpred, row, width, slope, cosine, x, of_x, y, of_y, args.pred_limit, c);
    if (args.dtarget.data != nullptr)
      write_cosine_gradient(args.dtarget, row, width, slope, cosine, y, of_y, x, of_x, args.target_limit, c);
  }
}
