// The elementwise passes of a transformer block, a row at a time.

static void add_layer_norm(const AddLayerNorm& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  Scratch memory;
  float *a = memory.take(width), *b = memory.take(width), *c = memory.take(width), *d = memory.take(width);
  for (int64_t row = begin; row < end; ++row) {
    const float *x = row_of(args.x, row, width, a), *residual = row_of(args.residual, row, width, b);
    float* sum = target_of(args.sum, row, c);
    float total = 0, square = 0;
    for (int64_t i = 0; i < width; ++i) sum[i] = x[i] + residual[i];
    if (sum == c && args.sum.type != Type::f32) {
      // the norm is taken of the sum as it is stored
      store_row(args.sum.type, at(args.sum, row * args.sum.stride[0]), 1, c, width);
      load_row(args.sum.type, at(args.sum, row * args.sum.stride[0]), 1, c, width);
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; ++i) total += sum[i];
    const float mean = total / static_cast<float>(width);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; ++i) square += (sum[i] - mean) * (sum[i] - mean);
    const float rstd = 1 / __builtin_sqrtf(square / static_cast<float>(width) + args.eps);
    float* normed = target_of(args.normed, row, d);
    for (int64_t i = 0; i < width; ++i) normed[i] = (sum[i] - mean) * rstd * args.weight[i] + args.bias[i];
    finish(args.normed, row, width, d);
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

// adds the rows' part of the gradients of weight and bias
static void add_layer_norm_backward(const AddLayerNormBackward& args, float* dweight, float* dbias, int64_t begin,
                                    int64_t end) {
  const int64_t width = args.width;
  Scratch memory;
  float *a = memory.take(width), *b = memory.take(width), *c = memory.take(width), *d = memory.take(width);
  for (int64_t row = begin; row < end; ++row) {
    const float* grad = row_of(args.grad_normed, row, width, a);
    const float* through = row_of(args.grad_sum, row, width, b);
    const float* sum = row_of(args.sum, row, width, c);
    const float mean = args.mean[row], rstd = args.rstd[row];
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = 0; i < width; ++i) {
      const float normed = (sum[i] - mean) * rstd, weighted = grad[i] * args.weight[i];
      first += weighted;
      second += weighted * normed;
      dweight[i] += grad[i] * normed;
      dbias[i] += grad[i];
    }
    first /= static_cast<float>(width);
    second /= static_cast<float>(width);
    float* out = target_of(args.dsum, row, d);
    for (int64_t i = 0; i < width; ++i) {
      const float normed = (sum[i] - mean) * rstd;
      out[i] = (grad[i] * args.weight[i] - first - normed * second) * rstd + through[i];
    }
    finish(args.dsum, row, width, d);
    if (args.bias != nullptr) {
      float* again = target_of(args.normed, row, d);
      for (int64_t i = 0; i < width; ++i) again[i] = (sum[i] - mean) * rstd * args.weight[i] + args.bias[i];
      finish(args.normed, row, width, d);
    }
  }
}

static void bias_gelu(const BiasGelu& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, whole = padded(width);
  Scratch memory;
  float *bias = memory.take(whole), *u = memory.take(whole), *out = memory.take(whole);
  for (int64_t i = 0; i < whole; ++i) bias[i] = i < width ? args.bias[i] : 0;
  for (int64_t i = 0; i < whole; ++i) u[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    load_row(args.x.type, at(args.x, row * args.x.stride[0]), args.x.stride[1], u, width);
    for (int64_t i = 0; i < whole; i += VL) {
      Vec bell;
      const Vec value = load(u + i) + load(bias + i);
      store(out + i, value * normal_distribution(value, bell));
    }
    store_row(args.out.type, at(args.out, row * args.out.stride[0]), args.out.stride[1], out, width);
  }
}

// adds the rows' part of the gradient of bias (padded)
static void bias_gelu_backward(const BiasGelu& args, float* dbias, int64_t begin, int64_t end) {
  const int64_t width = args.width, whole = padded(width);
  Scratch memory;
  float *bias = memory.take(whole), *u = memory.take(whole), *grad = memory.take(whole), *out = memory.take(whole),
        *dx = memory.take(whole);
  for (int64_t i = 0; i < whole; ++i) bias[i] = i < width ? args.bias[i] : 0;
  for (int64_t i = 0; i < whole; ++i) u[i] = grad[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    load_row(args.x.type, at(args.x, row * args.x.stride[0]), args.x.stride[1], u, width);
    load_row(args.grad.type, at(args.grad, row * args.grad.stride[0]), args.grad.stride[1], grad, width);
    for (int64_t i = 0; i < whole; i += VL) {
      Vec bell;
      const Vec value = load(u + i) + load(bias + i);
      const Vec phi = normal_distribution(value, bell);
      store(dx + i, load(grad + i) * (phi + value * bell * 0.398942280f));
      store(out + i, value * phi);
    }
    for (int64_t i = 0; i < width; ++i) dbias[i] += dx[i];
    store_row(args.dx.type, at(args.dx, row * args.dx.stride[0]), args.dx.stride[1], dx, width);
    if (args.out.data != nullptr) {
      store_row(args.out.type, at(args.out, row * args.out.stride[0]), args.out.stride[1], out, width);
    }
  }
}
