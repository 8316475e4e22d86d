#include "patches.h"

namespace fastmim::cuda {

namespace {

Pixels pixels_of(const Tensor& images) {
  if (images.scalar_type() == at::kByte) return Pixels::uint8;
  return images.scalar_type() == at::kUInt16 ? Pixels::uint16 : Pixels::floating;
}

}  // namespace

PatchTensors::PatchTensors(const Tensor& images, const Tensor& ids, at::IntArrayRef patch_size,
                           const OptionalTensor& mean_of, const OptionalTensor& std_of)
    : mean(as_float(mean_of)), std(as_float(std_of)) {
  check_std(std);
  Patches& patches = rows.patches;
  patches.pixels = pixels_of(images);
  patches.type = patches.pixels == Pixels::floating ? type_of(images) : Type::f32;
  patches.images = address(images);
  patches.mean = address_of<float>(mean), patches.std = address_of<float>(std);
  patches.axes = static_cast<int>(patch_size.size());
  patches.channels = images.size(1);
  patches.batch_stride = images.stride(0), patches.channel_stride = images.stride(1);
  for (int axis = 0; axis < patches.axes; ++axis) {
    patches.stride[axis] = images.stride(2 + axis);
    patches.patch[axis] = patch_size[axis];
    patches.grid[axis] = images.size(2 + axis) / patch_size[axis];
  }
  check_ids("ids", ids, patch_count(patches));
  rows.ids = static_cast<const int64_t*>(address(ids));
  rows.ids_stride[0] = ids.stride(0), rows.ids_stride[1] = ids.stride(1);
  rows.rows = ids.numel(), rows.per_image = ids.size(1);
}

namespace {

Tensor gather_patches(const Tensor& images, const Tensor& ids, at::IntArrayRef patch_size, const OptionalTensor& mean,
                      const OptionalTensor& std, at::ScalarType dtype) {
  const Type out_type = type_of(dtype);
  const PatchTensors from(images, ids, patch_size, mean, std);
  const int64_t values = patch_values(from.rows.patches);
  const Tensor out = at::empty({ids.size(0), ids.size(1), values},
                               images.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const Place place(images);
  launch_gather_patches({from.rows, address(out), out_type}, place.stream);
  return out;
}

Tensor gather_patches_backward(const Tensor& grad, const Tensor& ids, at::IntArrayRef patch_size,
                               const OptionalTensor& std, at::IntArrayRef shape, at::ScalarType dtype) {
  const Type type = type_of(grad);
  type_of(dtype);
  Tensor images = at::zeros(shape, grad.options().dtype(dtype));
  const PatchTensors to(images, ids, patch_size, {}, std);
  if (grad.numel() == 0) return images;
  const Place place(grad);
  launch_scatter_patches({to.rows, address(grad), type, {grad.stride(0), grad.stride(1), grad.stride(2)}},
                         place.stream);
  return images;
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : tensor;
}

Tensor embed_patches(const Tensor& images, const Tensor& ids, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& pos_embed, const OptionalTensor& prefix, const OptionalTensor& mean,
                     const OptionalTensor& std, at::ScalarType dtype, const OptionalTensor& pos_ids) {
  PlaceTokens args{};
  args.type = type_of(dtype);
  type_of(weight);
  if (bias.has_value()) type_of(*bias);
  if (pos_embed.has_value()) args.positions_type = type_of(*pos_embed);
  if (prefix.has_value()) args.prefix_type = type_of(*prefix);
  const Tensor patches = gather_patches(images, ids, weight.sizes().slice(2), mean, std, dtype);
  const OptionalTensor narrow = bias.has_value() ? OptionalTensor(bias->to(dtype)) : OptionalTensor();
  const Tensor tokens = at::linear(patches, weight.flatten(1).to(dtype), narrow).contiguous();
  if (!pos_embed.has_value() && !prefix.has_value()) return tokens;
  const OptionalTensor positions = contiguous(pos_embed), first = contiguous(prefix);
  args.prefixes = prefix.has_value() ? prefix->size(0) : 0;
  args.per_image = ids.size(1), args.width = weight.size(0);
  args.rows = ids.size(0) * (args.prefixes + args.per_image);
  args.num_patches = pos_embed.has_value() ? pos_embed->size(0) : 0;
  const Tensor& rows = pos_ids.has_value() ? *pos_ids : ids;
  if (pos_embed.has_value() && pos_ids.has_value()) check_ids("pos_ids", rows, args.num_patches);
  args.ids = static_cast<const int64_t*>(address(rows));
  args.ids_stride[0] = rows.stride(0), args.ids_stride[1] = rows.stride(1);
  const Tensor out = at::empty({ids.size(0), args.prefixes + args.per_image, args.width}, tokens.options());
  if (out.numel() == 0) return out;
  args.tokens = address(tokens), args.out = address(out);
  args.positions = address_of<void>(positions), args.prefix = address_of<void>(first);
  const Place place(images);
  launch_place_tokens(args, place.stream);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTMIM_CUDA_LIBRARY, library) {
  library.def("gather_patches", gather_patches);
  library.def("gather_patches_backward", gather_patches_backward);
  library.def("embed_patches", embed_patches);
}

}  // namespace fastmim::cuda
