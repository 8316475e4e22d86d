#include "patches.h"

namespace fastmim::cpu {

namespace {

constexpr int64_t kReduceMean = 1, kReduceNone = 0;

// factor of each row's loss; 0 where all weights are 0
Tensor row_scale(const OptionalTensor& weight, int64_t rows, bool mean) {
  if (!weight.has_value()) return at::full({rows}, mean && rows ? 1.0 / static_cast<double>(rows) : 1.0, at::kFloat);
  const Tensor upcast = weight->to(at::kDouble).reshape({rows});
  if (!mean) return as_float(upcast);
  const double total = upcast.sum().item<double>();
  return as_float(total != 0 ? upcast / total : at::zeros_like(upcast));
}

// the rows' losses times their scales: of the shape of the rows, or summed in their order
Tensor reduced(const Tensor& losses, const Tensor& scale, int64_t reduction, at::IntArrayRef shape) {
  if (reduction == kReduceNone) return (losses * scale).reshape(shape);
  double sum = 0;
  const float *loss = losses.const_data_ptr<float>(), *weight = scale.const_data_ptr<float>();
  for (int64_t i = 0; i < losses.numel(); ++i) sum += static_cast<double>(loss[i]) * weight[i];
  return at::scalar_tensor(sum, at::kFloat);
}

// gradients of a mean underflow in float16: they are kept in float
at::ScalarType gradient_dtype(const Tensor& of) {
  return of.scalar_type() == at::kHalf ? at::kFloat : of.scalar_type();
}

Tensor gradient_for(const Tensor& of, bool wanted) {
  const auto options = of.options().dtype(gradient_dtype(of)).memory_format(at::MemoryFormat::Contiguous);
  return wanted ? at::empty(of.sizes(), options) : at::empty({0}, options);
}

std::tuple<Tensor, Tensor> pixel_loss(const Tensor& pred, const Tensor& images, const Tensor& ids,
                                      at::IntArrayRef patch_size, int64_t norm_pix, const OptionalTensor& weight,
                                      const OptionalTensor& mean, const OptionalTensor& std, int64_t loss,
                                      int64_t reduction, bool need_grad) {
  check_pixels(images, mean, std);
  check_dtypes(pred);
  const PatchReader reader(images, patch_size, mean, std);
  const Tensor id = checked_ids("ids", ids, patch_count(reader.patches));
  const int64_t rows = id.numel();
  const Tensor scale = row_scale(weight, rows, reduction == kReduceMean);
  Tensor losses = at::empty({rows}, at::kFloat), grad = gradient_for(pred, need_grad);
  const PixelLoss args{reader.patches,
                       id.const_data_ptr<int64_t>(),
                       ids.size(1),
                       static_cast<NormPix>(norm_pix),
                       static_cast<ErrorLoss>(loss),
                       view_of(pred, {0, 1, 2}),
                       scale.const_data_ptr<float>(),
                       losses.mutable_data_ptr<float>(),
                       need_grad ? rows_of(grad) : View{}};
  for_rows(rows, 4 * pred.size(2), [&](int64_t begin, int64_t end) { kernels().pixel_loss(args, begin, end); });
  return {reduced(losses, scale, reduction, ids.sizes()), grad};
}

std::tuple<Tensor, Tensor, Tensor> scaled_cosine_loss(const Tensor& pred, const Tensor& target, double gamma,
                                                      const OptionalTensor& weight, int64_t reduction,
                                                      bool need_pred_grad, bool need_target_grad) {
  check_dtypes(pred, target);
  const Tensor x = pred.contiguous(), y = target.contiguous();
  const int64_t width = pred.size(-1);
  int64_t rows = 1;
  for (const int64_t size : pred.sizes().slice(0, pred.dim() - 1)) rows *= size;
  const Tensor scale = row_scale(weight, rows, reduction == kReduceMean);
  Tensor losses = at::empty({rows}, at::kFloat), dpred = gradient_for(pred, need_pred_grad),
         dtarget = gradient_for(target, need_target_grad);
  const CosineLoss args{width,
                        static_cast<float>(gamma),
                        rows_of(x),
                        rows_of(y),
                        scale.const_data_ptr<float>(),
                        losses.mutable_data_ptr<float>(),
                        need_pred_grad ? rows_of(dpred) : View{},
                        need_target_grad ? rows_of(dtarget) : View{},
                        type_of(pred.scalar_type()),
                        type_of(target.scalar_type())};
  for_rows(rows, 8 * width, [&](int64_t begin, int64_t end) { kernels().cosine_loss(args, begin, end); });
  return {reduced(losses, scale, reduction, pred.sizes().slice(0, pred.dim() - 1)), dpred, dtarget};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, library) {
  serve(library, "pixel_loss", pixel_loss);
  serve(library, "scaled_cosine_loss", scaled_cosine_loss);
}

}  // namespace fastmim::cpu
