#include "tensors.h"

namespace fastmim::cpu {

namespace {

int64_t rows_in(const Tensor& x) {
  int64_t rows = 1;
  for (const int64_t size : x.sizes().slice(0, x.dim() - 1)) rows *= size;
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const OptionalTensor& x, const Tensor& residual,
                                                          const Tensor& weight, const Tensor& bias, double eps,
                                                          std::optional<at::ScalarType> dtype,
                                                          const OptionalTensor& x_bias) {
  check_dtypes(residual, x, weight, bias, x_bias, dtype);
  const Tensor a = x ? x->contiguous() : Tensor(), b = residual.contiguous(), w = as_float(weight),
               shift = as_float(bias), branch_bias = x_bias ? as_float(*x_bias) : Tensor();
  const at::ScalarType wider = x ? at::promote_types(x->scalar_type(), residual.scalar_type()) : residual.scalar_type();
  const auto options = b.options().dtype(wider);
  // without x the sum is the residual, and is not written
  Tensor normed = at::empty(residual.sizes(), options.dtype(dtype.value_or(wider))),
         sum = at::empty(x ? residual.sizes() : at::IntArrayRef({0}), options);
  auto per_row = residual.sizes().vec();
  per_row.back() = 1;
  Tensor mean = at::empty(per_row, at::kFloat), rstd = at::empty(per_row, at::kFloat);
  const int64_t bytes = normed.nbytes() + sum.nbytes();
  const AddLayerNorm args{residual.size(-1),
                          static_cast<float>(eps),
                          x ? rows_of(a) : View{},
                          rows_of(b),
                          x_bias ? branch_bias.const_data_ptr<float>() : nullptr,
                          w.const_data_ptr<float>(),
                          shift.const_data_ptr<float>(),
                          output_rows_of(normed, bytes),
                          x ? output_rows_of(sum, bytes) : View{},
                          mean.mutable_data_ptr<float>(),
                          rstd.mutable_data_ptr<float>()};
  for_rows(rows_in(residual), 4 * residual.size(-1),
           [&](int64_t begin, int64_t end) { kernels().add_layer_norm(args, begin, end); });
  return {normed, sum, mean, rstd};
}

// Returns x, the last rows (..., Q, D) of the shape of `whole`, with zeros for the others.
Tensor as_long(const Tensor& x, const Tensor& whole) {
  const int64_t skipped = x.dim() > 1 ? whole.size(-2) - x.size(-2) : 0;
  return skipped == 0 ? x : at::constant_pad_nd(x, {0, 0, skipped, 0});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_normed, const OptionalTensor& grad_sum, const Tensor& total, const Tensor& mean,
    const Tensor& rstd, const Tensor& weight, const OptionalTensor& bias, std::optional<at::ScalarType> dx_dtype,
    bool sum_dx) {
  check_dtypes(total, grad_normed, grad_sum, dx_dtype);
  const Tensor g = grad_normed.contiguous(), through = grad_sum ? as_long(*grad_sum, total).contiguous() : Tensor(),
               sum = total.contiguous(), w = as_float(weight);
  Tensor dsum = at::empty(sum.sizes(), sum.options());
  const int64_t width = total.size(-1);
  const Tensor means = mean.contiguous(), rstds = rstd.contiguous(), shift = bias ? as_float(*bias) : Tensor();
  const bool narrow = dx_dtype && *dx_dtype != total.scalar_type();
  Tensor normed = bias ? at::empty(g.sizes(), g.options()) : at::empty({0}, g.options()),
         dx = at::empty(narrow ? total.sizes() : at::IntArrayRef({0}),
                        sum.options().dtype(dx_dtype.value_or(total.scalar_type())));
  const int64_t bytes = dsum.nbytes() + dx.nbytes() + normed.nbytes();
  const AddLayerNormBackward args{width,
                                  rows_of(g),
                                  grad_sum ? rows_of(through) : View{},
                                  rows_of(sum),
                                  means.const_data_ptr<float>(),
                                  rstds.const_data_ptr<float>(),
                                  w.const_data_ptr<float>(),
                                  bias ? shift.const_data_ptr<float>() : nullptr,
                                  output_rows_of(dsum, bytes),
                                  narrow ? rows_of(dx) : View{},
                                  output_rows_of(normed, bytes)};
  const int64_t count = sum_dx ? 3 : 2;
  const Tensor sums = by_pieces(rows_in(total), count * width, 8 * width, [&](float* part, int64_t begin, int64_t end) {
    kernels().add_layer_norm_backward(args, part, part + width, sum_dx ? part + 2 * width : nullptr, begin, end);
  });
  const auto sum_at = [&](int64_t i) { return sums.slice(0, i * width, (i + 1) * width).clone(); };
  return {dsum, sum_at(0), sum_at(1), normed, dx, sum_dx ? sum_at(2) : at::empty({0}, at::kFloat)};
}

Tensor bias_gelu(const Tensor& x, const Tensor& bias) {
  check_dtypes(x, bias);
  const Tensor from = x.contiguous(), b = as_float(bias);
  Tensor out = at::empty(x.sizes(), from.options());
  const BiasGelu args{x.size(-1), rows_of(from), View{}, b.const_data_ptr<float>(), rows_of(out), View{}};
  for_rows(rows_in(x), 8 * x.size(-1), [&](int64_t begin, int64_t end) { kernels().bias_gelu(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias,
                                                      bool again) {
  check_dtypes(x, bias, grad);
  const Tensor from = x.contiguous(), g = grad.contiguous(), b = as_float(bias);
  Tensor dx = at::empty(x.sizes(), from.options()),
         out = at::empty(again ? x.sizes() : at::IntArrayRef({0}), from.options());
  const int64_t width = x.size(-1);
  const BiasGelu args{width,      rows_of(from), rows_of(g), b.const_data_ptr<float>(), again ? rows_of(out) : View{},
                      rows_of(dx)};
  const Tensor dbias = by_pieces(rows_in(x), width, 16 * width, [&](float* part, int64_t begin, int64_t end) {
    kernels().bias_gelu_backward(args, part, begin, end);
  });
  return {dx, dbias, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, library) {
  serve(library, "add_layer_norm", add_layer_norm);
  serve(library, "add_layer_norm_backward", add_layer_norm_backward);
  serve(library, "bias_gelu", bias_gelu);
  serve(library, "bias_gelu_backward", bias_gelu_backward);
}

}  // namespace fastmim::cpu
