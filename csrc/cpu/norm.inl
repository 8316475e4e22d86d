// The elementwise passes of a transformer block, a row at a time.

// the widest rows of which the next are asked for ahead: they fit in a cache beside those at work
constexpr int64_t kFetchedWidth = 4096;

// Computes x + x_bias + residual in floats, of the precision in which the sum is stored; returns its total. A sum of
// floats is stored where `floats` points.
template <typename X, typename R>
FASTMIM_HD float add_branch_as(const AddLayerNorm& args, int64_t row, float* floats) {
  using Sum = std::conditional_t<std::is_same_v<X, R>, X, float>;
  const X* x = static_cast<const X*>(at(args.x, row * args.width));
  const R* residual = static_cast<const R*>(at(args.residual, row * args.width));
  Sum* sum = static_cast<Sum*>(at(args.sum, row * args.width));
  const float* x_bias = args.x_bias;
  Vec sums[4] = {};
  by_vectors<4>(args.width, [&](int chain, int64_t i, auto lanes) FASTMIM_STEP {
    Vec value = lanes.get(x + i);
    if (x_bias != nullptr) value += lanes.get(x_bias + i);
    value += lanes.get(residual + i);
    if constexpr (!std::is_same_v<Sum, float>) {
      lanes.put(sum + i, value);
      if constexpr (std::is_same_v<Sum, Bf16>) {
        value = (Vec)(rounded_to_bf16(value) & 0xffff0000u);
      } else {
        value = lanes.get(sum + i);
      }
    }
    lanes.put(floats + i, value);
    sums[chain] += value;
  });
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static float add_branch(const AddLayerNorm& args, int64_t row, float* floats) {
  float total = 0;
  in_type(args.x.type, [&](auto x) {
    in_type(args.residual.type,
            [&](auto residual) { total = add_branch_as<decltype(x), decltype(residual)>(args, row, floats); });
  });
  return total;
}

// the norm of `sum`, which is also written where it is streamed
template <bool STREAMED, typename T>
static void write_normed(const AddLayerNorm& args, int64_t row, const float* sum, float mean, float rstd) {
  const int64_t width = args.width;
  const float *weight = args.weight, *bias = args.bias;
  T* normed = static_cast<T*>(at(args.normed, row * width));
  float* copy = args.sum.streamed ? static_cast<float*>(at(args.sum, row * width)) : nullptr;
  by_vec_pairs(width, [&](int64_t i, auto lanes) FASTMIM_STEP {
    const auto value = lanes.get(sum + i);
    put<STREAMED>(lanes, normed + i, (value - mean) * rstd * lanes.get(weight + i) + lanes.get(bias + i));
    if (copy != nullptr) put<true>(lanes, copy + i, value);
  });
}

static void add_layer_norm(const AddLayerNorm& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  Scratch memory;
  float* a = memory.take(width);
  for (int64_t row = begin; row < end; ++row) {
    const float* sum;
    float mean;
    if (args.x.data == nullptr) {
      sum = row_of(args.residual, row, width, a);
      mean = total(sum, width);
    } else {
      float* target = target_of(args.sum, row, a);
      mean = add_branch(args, row, target);
      sum = target;
    }
    mean /= static_cast<float>(width);
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
    in_type(args.normed.type, [&](auto stored) {
      if (args.normed.streamed) return write_normed<true, decltype(stored)>(args, row, sum, mean, rstd);
      write_normed<false, decltype(stored)>(args, row, sum, mean, rstd);
    });
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
  finish_streams();
}

// Adds the rows' part of the gradients of weight, bias and x_bias, ROWS at a time: those gradients are read and written
// once for all of them. STREAMED: dsum is, and dx isn't asked for.
template <int ROWS, bool THROUGH, bool STREAMED>
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
    out[r] = STREAMED ? static_cast<float*>(at(args.dsum, row * width)) : target_of(args.dsum, row, spare[r]);
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
    if (width <= kFetchedWidth) {
      fetch_row(args.grad_normed, row + ROWS, width);
      fetch_row(args.sum, row + ROWS, width);
      if constexpr (THROUGH) fetch_row(args.grad_sum, row + ROWS, width);
    }
  }
  by_vec_pairs(width, [&](int64_t i, auto lanes) FASTMIM_STEP {
    const auto factor = lanes.get(weight + i);
    decltype(lanes.get(weight)) to_weight = {}, to_bias = {}, to_x_bias = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const auto gradient = lanes.get(grad[r] + i), normed = (lanes.get(sum[r] + i) - mean[r]) * rstd[r];
      to_weight = to_weight + gradient * normed;
      to_bias = to_bias + gradient;
      auto to_sum = (gradient * factor - first[r] - normed * second[r]) * rstd[r];
      if constexpr (THROUGH) to_sum = to_sum + lanes.get(through[r] + i);
      to_x_bias = to_x_bias + to_sum;
      put<STREAMED>(lanes, out[r] + i, to_sum);
    }
    lanes.put(dweight + i, lanes.get(dweight + i) + to_weight);
    lanes.put(dbias + i, lanes.get(dbias + i) + to_bias);
    if (dx_bias != nullptr) lanes.put(dx_bias + i, lanes.get(dx_bias + i) + to_x_bias);
  });
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (!STREAMED) {
      finish(args.dsum, begin + r, width, out[r]);
      if (args.dx.data != nullptr)
        store_row(args.dx.type, at(args.dx, (begin + r) * args.dx.stride[0]), 1, out[r], width);
    }
    if (bias == nullptr) continue;
    float* again = target_of(args.normed, begin + r, spare[r]);
    by_vectors(width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
      const Vec normed = (lanes.get(sum[r] + i) - mean[r]) * rstd[r];
      lanes.put(again + i, normed * lanes.get(weight + i) + lanes.get(bias + i));
    });
    finish(args.normed, begin + r, width, again);
  }
}

template <bool THROUGH, bool STREAMED>
static void add_layer_norm_backward_as(const AddLayerNormBackward& args, float* dweight, float* dbias, float* dx_bias,
                                       int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  Scratch scratch;
  float* memory = scratch.take(4 * kRows * args.width);
  for (; begin + kRows <= end; begin += kRows)
    add_layer_norm_backward_rows<kRows, THROUGH, STREAMED>(args, dweight, dbias, dx_bias, begin, memory);
  for (; begin < end; ++begin)
    add_layer_norm_backward_rows<1, THROUGH, STREAMED>(args, dweight, dbias, dx_bias, begin, memory);
  finish_streams();
}

static void add_layer_norm_backward(const AddLayerNormBackward& args, float* dweight, float* dbias, float* dx_bias,
                                    int64_t begin, int64_t end) {
  const auto run = [&](auto through) {
    constexpr bool kThrough = decltype(through)::value;
    if (args.dsum.streamed && args.dx.data == nullptr)
      return add_layer_norm_backward_as<kThrough, true>(args, dweight, dbias, dx_bias, begin, end);
    add_layer_norm_backward_as<kThrough, false>(args, dweight, dbias, dx_bias, begin, end);
  };
  if (args.grad_sum.data == nullptr) return run(std::false_type());
  run(std::true_type());
}

template <typename T>
FASTMIM_HD Vec distribution_for(Vec u, Vec& bell) {
  if constexpr (std::is_same_v<T, Bf16>) return normal_distribution_bf16(u, bell);
  return normal_distribution(u, bell);
}

template <typename T>
static void bias_gelu_as(const BiasGelu& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(at(args.x, row * args.width));
    T* out = static_cast<T*>(at(args.out, row * args.width));
    by_vectors(args.width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
      Vec bell;
      const Vec value = lanes.get(x + i) + lanes.get(args.bias + i);
      lanes.put(out + i, value * distribution_for<T>(value, bell));
    });
  }
}

static void bias_gelu(const BiasGelu& args, int64_t begin, int64_t end) {
  in_type(args.x.type, [&](auto x) { bias_gelu_as<decltype(x)>(args, begin, end); });
}

template <typename T, typename G, bool AGAIN>
static void bias_gelu_backward_as(const BiasGelu& args, float* dbias, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(at(args.x, row * args.width));
    const G* grad = static_cast<const G*>(at(args.grad, row * args.width));
    T *dx = static_cast<T*>(at(args.dx, row * args.width)), *out = nullptr;
    if constexpr (AGAIN) out = static_cast<T*>(at(args.out, row * args.width));
    by_vectors(args.width, [&](int, int64_t i, auto lanes) FASTMIM_STEP {
      Vec bell;
      const Vec value = lanes.get(x + i) + lanes.get(args.bias + i), phi = distribution_for<T>(value, bell);
      const Vec slope = lanes.get(grad + i) * (phi + value * bell * 0.398942280f);
      lanes.put(dx + i, slope);
      lanes.put(dbias + i, lanes.get(dbias + i) + slope);
      if constexpr (AGAIN) lanes.put(out + i, value * phi);
    });
  }
}

// adds the rows' part of the gradient of bias
static void bias_gelu_backward(const BiasGelu& args, float* dbias, int64_t begin, int64_t end) {
  in_type(args.x.type, [&](auto x) {
    in_type(args.grad.type, [&](auto grad) {
      using T = decltype(x);
      using G = decltype(grad);
      if (args.out.data == nullptr) return bias_gelu_backward_as<T, G, false>(args, dbias, begin, end);
      bias_gelu_backward_as<T, G, true>(args, dbias, begin, end);
    });
  });
}
