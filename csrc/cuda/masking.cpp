#include "tensors.h"

namespace fastmim::cuda {

namespace {

std::tuple<Tensor, Tensor, Tensor> random_masking(int64_t batch, int64_t num_patches, int64_t len_keep,
                                                  int64_t len_predict, const OptionalTensor& noise,
                                                  const OptionalTensor& seeds) {
  constexpr int64_t kMostPatches = int64_t{1} << 30;
  if (num_patches > kMostPatches) throw Unserved("over 2^30 patches are served by the reference");
  const Tensor& source = noise.has_value() ? *noise : *seeds;
  Masking args{};
  if (noise.has_value()) {
    args.type = type_of(*noise);
    args.noise = address(*noise);
    args.noise_stride[0] = noise->stride(0), args.noise_stride[1] = noise->stride(1);
    TORCH_CHECK_VALUE(!looks_at(*noise) || !noise->isnan().any().item<bool>(),
                      "noise must not hold NaN: the order of its values is the mask");
  } else {
    args.seeds = address_of<int64_t>(seeds);
    args.seeds_stride = seeds->stride(0);
  }
  const auto ids = source.options().dtype(at::kLong);
  const Tensor keep = at::empty({batch, len_keep}, ids), predict = at::empty({batch, len_predict}, ids),
               restore = at::empty({batch, num_patches}, ids);
  args.batch = batch, args.num_patches = num_patches, args.len_keep = len_keep, args.len_predict = len_predict;
  args.ids_keep = static_cast<int64_t*>(address(keep));
  args.ids_predict = static_cast<int64_t*>(address(predict));
  args.ids_restore = static_cast<int64_t*>(address(restore));
  const Place place(source);
  launch_random_masking(args, place.stream);
  return {keep, predict, restore};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTMIM_CUDA_LIBRARY, library) {
  library.def("random_masking", random_masking);
}

}  // namespace fastmim::cuda
