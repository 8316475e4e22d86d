#include "patches.h"

namespace fastmim::cuda {

namespace {

constexpr int64_t kReduceNone = 0, kReduceMean = 1;

// gradients of a mean underflow in float16: they are kept in float
Tensor gradient_for(const Tensor& of, bool wanted) {
  const auto dtype = of.scalar_type() == at::kHalf ? at::kFloat : of.scalar_type();
  const auto options = of.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  return wanted ? at::empty(of.sizes(), options) : at::empty({0}, options);
}

Tensor reduced(const Tensor& losses, int64_t reduction) {
  return reduction == kReduceNone ? losses : losses.sum();
}

std::tuple<Tensor, Tensor> pixel_loss(const Tensor& pred, const Tensor& images, const Tensor& ids,
                                      at::IntArrayRef patch_size, int64_t norm_pix, const OptionalTensor& weight,
                                      const OptionalTensor& mean, const OptionalTensor& std, int64_t loss,
                                      int64_t reduction, bool need_grad) {
  PixelLoss args{};
  args.type = type_of(pred);
  const Place place(pred);
  const PatchTensors target(images, ids, patch_size, mean, std);
  const int64_t rows = ids.numel();
  const Tensor losses = at::empty(ids.sizes(), pred.options().dtype(at::kFloat)), grad = gradient_for(pred, need_grad);
  args.target = target.rows;
  if (rows == 0 || pred.size(2) == 0) return {reduced(losses.zero_(), reduction), grad};
  check_served(refuses_pixel_loss(args));
  args.norm = static_cast<NormPix>(norm_pix);
  args.form = static_cast<ErrorLoss>(loss);
  args.pred = address(pred);
  for (int axis = 0; axis < 3; ++axis) args.pred_stride[axis] = pred.stride(axis);
  const OptionalTensor weights = as_float(weight);
  const bool mean_of_rows = reduction == kReduceMean;
  const OptionalTensor total = weights.has_value() && mean_of_rows ? OptionalTensor(weights->sum()) : OptionalTensor();
  args.weight = address_of<float>(weights), args.weight_total = address_of<float>(total);
  args.share = mean_of_rows ? static_cast<float>(1.0 / static_cast<double>(rows)) : 1.0f;
  args.losses = static_cast<float*>(address(losses));
  args.grad = need_grad ? address(grad) : nullptr;
  args.grad_type = type_of(grad);
  launch_pixel_loss(args, place.stream);
  return {reduced(losses, reduction), grad};
}

std::tuple<Tensor, Tensor, Tensor> scaled_cosine_loss(const Tensor& pred, const Tensor& target, double gamma,
                                                      const OptionalTensor& weight, int64_t reduction,
                                                      bool need_pred_grad, bool need_target_grad) {
  CosineLoss args{};
  args.pred_type = type_of(pred), args.target_type = type_of(target);
  args.width = pred.size(-1);
  if (args.width == 0) throw Unserved("rows without values are served by the reference");
  const Place place(pred);
  args.rows = pred.numel() / args.width;
  const Tensor losses = at::empty(pred.sizes().slice(0, pred.dim() - 1), pred.options().dtype(at::kFloat));
  const Tensor dpred = gradient_for(pred, need_pred_grad), dtarget = gradient_for(target, need_target_grad);
  if (args.rows > 0) {
    check_served(refuses_cosine_loss(args));
    const bool mean = reduction == kReduceMean;
    const Tensor x = pred.contiguous(), y = target.contiguous();
    const OptionalTensor weights = as_float(weight);
    const OptionalTensor total = weights.has_value() && mean ? OptionalTensor(weights->sum()) : OptionalTensor();
    args.gamma = static_cast<float>(gamma);
    args.pred = address(x), args.target = address(y);
    args.weight = address_of<float>(weights), args.weight_total = address_of<float>(total);
    args.share = mean ? static_cast<float>(1.0 / static_cast<double>(args.rows)) : 1.0f;
    args.losses = static_cast<float*>(address(losses));
    args.dpred = need_pred_grad ? address(dpred) : nullptr, args.dpred_type = type_of(dpred);
    args.dtarget = need_target_grad ? address(dtarget) : nullptr, args.dtarget_type = type_of(dtarget);
    launch_cosine_loss(args, place.stream);
  }
  return {reduced(losses, reduction), dpred, dtarget};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTMIM_CUDA_LIBRARY, library) {
  library.def("pixel_loss", pixel_loss);
  library.def("scaled_cosine_loss", scaled_cosine_loss);
}

}  // namespace fastmim::cuda
