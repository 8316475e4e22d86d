// Losses whose gradient is computed in the forward pass.
//
//   pixel:  t = the patch (x - mean) / std, normalised by its own mean and deviation; w = weight / total, or 1 / rows;
//           for a sum, or no reduction, w = weight, or 1
//           e = pred - t, f(e) = e^2, |e| or Huber's;  loss[row] = w sum(f(e)) / P,  grad = w f'(e) / P
//   cosine: x = pred / |pred|, y = target / |target|, c = x . y;  loss[row] = w (1 - c)^gamma
//           dpred = -w gamma (1 - c)^(gamma - 1) (y - c x) / |pred|, and the same for target
//   a row of w = 0 is not read: its loss and gradients are 0, whatever lies there
//
// Work: a warp owns a row, its lanes every 32nd value, or run of pixels (reader.h). Sums are of lanes in one
// order, so that they repeat; the rows' losses are summed by the caller.
// Shared memory, floats of each of the block's four warps:
//   pixel      P of the target, channel fastest as pred is
//   cosine     D of pred, then D of target
// Per row: the pixels, pred and its gradient once (cosine: both rows and each gradient that is asked for), about 10
// FLOPs a value. ViT-L at 75% masking (batch 256, 147 patches of 768 uint8, bfloat16 pred): 144 MB and 0.3 GFLOP a call
// of pixel, 9408 blocks of 12 KiB. Norms divide by the row's largest magnitude first, so that no square overflows.
#include "reader.h"

namespace fastmim::cuda {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;

FASTMIM_DEVICE int64_t own_row() {
  return block() * kWarps + warp();
}

// factor of a row's loss; 0 where all weights are 0
FASTMIM_DEVICE float scale_of(const float* weight, const float* total, float share, int64_t row) {
  if (weight == nullptr) return share;
  if (total == nullptr) return load(weight + row);
  const float sum = load(total);
  return sum == 0 ? 0 : load(weight + row) / sum;
}

// subtracts the mean of values first, first + step, .. of a row and divides them by their deviation
FASTMIM_DEVICE void normalize(float* row, int first, int step, int values, NormPix norm) {
  const int count = values / step;
  // sums are of differences to the first value, so that a constant patch becomes exactly 0
  const float origin = load(row + first);
  float sum = 0;
  for (int i = lane(); i < count; i += kLanes) sum += load(row + first + i * step) - origin;
  const float mean = sum_of_lanes(sum) / static_cast<float>(count);
  float square = 0;
  for (int i = lane(); i < count; i += kLanes) {
    const float difference = load(row + first + i * step) - origin - mean;
    square += difference * difference;
  }
  const float divisor = deviation(norm, sum_of_lanes(square) / static_cast<float>(count - 1));
  sync_warp();
  for (int i = lane(); i < count; i += kLanes) {
    float* at = row + first + i * step;
    store(at, (load(at) - origin - mean) / divisor);
  }
  sync_warp();
}

// a row of weight 0 has no loss and no gradient
FASTMIM_DEVICE void write_zeros(void* to, Type type, int64_t first, int width) {
  if (to == nullptr) return;
  for (int i = lane(); i < width; i += kLanes) store_value(type, to, first + i, 0.0f);
}

template <typename T, Layout LAYOUT>
FASTMIM_KERNEL(kThreads, 4)
pixel_loss_kernel(PixelLoss args) {
  constexpr int kPixels = kRun<T, LAYOUT>, kChannels = kChannelsOfRun<LAYOUT>;
  const Patches& p = args.target.patches;
  const int values = static_cast<int>(patch_values(p)), channels = static_cast<int>(p.channels);
  const int area = values / channels, runs = values / (kPixels * kChannels);
  const int64_t row = own_row();
  if (row >= args.target.rows) return;
  const float scale = scale_of(args.weight, args.weight_total, args.share, row);
  if (scale == 0) {
    if (lane() == 0) store(args.losses + row, 0.0f);
    write_zeros(args.grad, args.grad_type, row * values, values);
    return;
  }
  float* target = reinterpret_cast<float*>(shared_memory()) + warp() * values;

  const int64_t start = row_start(args.target, row);
  for (int run = lane(); run < runs; run += kLanes) {
    float value[kPixels * kChannels];
    read_run<T, LAYOUT>(p, start, run, value);
    const int first = run * kPixels, c = kChannels > 1 ? 0 : first / area, in_plane = first - c * area;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int channel = 0; channel < kChannels; ++channel) {
        store(target + (in_plane + i) * channels + c + channel, value[i * kChannels + channel]);
      }
    }
  }
  sync_warp();
  if (args.norm == NormPix::patch) normalize(target, 0, 1, values, args.norm);
  if (args.norm == NormPix::channel) {
    for (int c = 0; c < channels; ++c) normalize(target, c, channels, values, args.norm);
  }

  const float factor = scale * (slope_factor(args.form) / static_cast<float>(values));
  const int64_t from =
      row / args.target.per_image * args.pred_stride[0] + row % args.target.per_image * args.pred_stride[1];
  float sum = 0;
  // a loop for each form: a branch in one loop would keep its loads from being overlapped
  const auto add = [&](auto known) {
    for (int i = lane(); i < values; i += kLanes) {
      const float error = load_value(args.type, args.pred, from + i * args.pred_stride[2]) - load(target + i);
      const ErrorTerm term = error_term(decltype(known)::value, error);
      sum += term.loss;
      if (args.grad != nullptr) store_value(args.grad_type, args.grad, row * values + i, term.slope * factor);
    }
  };
  if (args.form == ErrorLoss::squared) add(std::integral_constant<ErrorLoss, ErrorLoss::squared>());
  if (args.form == ErrorLoss::absolute) add(std::integral_constant<ErrorLoss, ErrorLoss::absolute>());
  if (args.form == ErrorLoss::huber) add(std::integral_constant<ErrorLoss, ErrorLoss::huber>());
  sum = sum_of_lanes(sum);
  if (lane() == 0) store(args.losses + row, sum / static_cast<float>(values) * scale);
}

// x = direction * norm * size, with size the largest magnitude; a zero row has size 0
struct Direction {
  float size, norm;
};

// a row, in shared memory from now on, becomes its direction; NaN where a value is not finite
FASTMIM_DEVICE Direction read_direction(Type type, const void* from, int64_t first, int width, float* row) {
  float size = 0, poison = 0;
  for (int i = lane(); i < width; i += kLanes) {
    const float value = load_value(type, from, first + i);
    size = fmaxf(size, fabsf(value));
    poison += value - value;
    store(row + i, value);
  }
  size = largest_of_lanes(size);
  poison = sum_of_lanes(poison);
  float square = 0;
  for (int i = lane(); i < width; i += kLanes) {
    const float scaled = size == 0 ? 0 : load(row + i) / size;
    square += scaled * scaled;
    store(row + i, scaled);
  }
  const float norm = fmaxf(sqrtf(sum_of_lanes(square)), 1.0f);
  for (int i = lane(); i < width; i += kLanes) store(row + i, load(row + i) / norm + poison);
  return {size, norm};
}

FASTMIM_DEVICE void write_gradient(void* to, Type type, Type limit, int64_t first, int width, float slope, float cosine,
                                   const float* own, const float* other, const Direction& of) {
  if (to == nullptr) return;
  for (int i = lane(); i < width; i += kLanes) {
    const float value =
        cosine_gradient(slope, cosine, load(own + i), load(other + i), of.norm, of.size, largest_of(limit));
    store_value(type, to, first + i, value);
  }
}

FASTMIM_KERNEL(kThreads, 4) cosine_loss_kernel(CosineLoss args) {
  const int64_t row = own_row();
  if (row >= args.rows) return;
  const int width = static_cast<int>(args.width);
  const int64_t first = row * args.width;
  const float scale = scale_of(args.weight, args.weight_total, args.share, row);
  if (scale == 0) {
    if (lane() == 0) store(args.losses + row, 0.0f);
    write_zeros(args.dpred, args.dpred_type, first, width);
    write_zeros(args.dtarget, args.dtarget_type, first, width);
    return;
  }
  float* x = reinterpret_cast<float*>(shared_memory()) + warp() * 2 * width;
  float* y = x + width;
  const Direction of_x = read_direction(args.pred_type, args.pred, first, width, x);
  const Direction of_y = read_direction(args.target_type, args.target, first, width, y);
  float cosine = 0;
  for (int i = lane(); i < width; i += kLanes) cosine += load(x + i) * load(y + i);
  cosine = sum_of_lanes(cosine);
  cosine = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
  const CosineError error = cosine_error(cosine, args.gamma);
  if (lane() == 0) store(args.losses + row, error.loss * scale);
  const float slope = error.slope * scale;
  write_gradient(args.dpred, args.dpred_type, args.pred_type, first, width, slope, cosine, x, y, of_x);
  write_gradient(args.dtarget, args.dtarget_type, args.target_type, first, width, slope, cosine, y, x, of_y);
}

Shape shape_of(int64_t rows, int64_t values) {
  return {(rows + kWarps - 1) / kWarps, kThreads, kWarps * values * static_cast<int64_t>(sizeof(float))};
}

const char* refuses(int64_t values) {
  constexpr int64_t kMostValues = int64_t{1} << 24;
  const bool fits = values < kMostValues && shape_of(1, values).shared <= shared_limit();
  return fits ? nullptr : "a row exceeds this device's shared memory";
}

}  // namespace

const char* refuses_pixel_loss(const PixelLoss& args) {
  return refuses(patch_values(args.target.patches));
}

const char* refuses_cosine_loss(const CosineLoss& args) {
  return refuses(2 * args.width);
}

void launch_pixel_loss(const PixelLoss& args, Stream stream) {
  const Shape shape = shape_of(args.target.rows, patch_values(args.target.patches));
  with_layout(args.target.patches, [&](auto zero, auto layout) {
    launch("pixel_loss", pixel_loss_kernel<decltype(zero), decltype(layout)::value>, shape, stream, args);
  });
}

void launch_cosine_loss(const CosineLoss& args, Stream stream) {
  launch("cosine_loss", cosine_loss_kernel, shape_of(args.rows, 2 * args.width), stream, args);
}

}  // namespace fastmim::cuda
