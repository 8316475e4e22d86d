#include <atomic>

#include "tensors.h"

namespace fastmim::cpu {

namespace {

using Ids = std::tuple<Tensor, Tensor, Tensor>;

Ids random_masking(int64_t batch, int64_t num_patches, int64_t len_keep, int64_t len_predict,
                   const OptionalTensor& noise, const OptionalTensor& seeds) {
  check_dtypes(noise);
  const auto ids = at::TensorOptions().dtype(at::kLong);
  Tensor keep = at::empty({batch, len_keep}, ids), predict = at::empty({batch, len_predict}, ids),
         restore = at::empty({batch, num_patches}, ids);
  const Tensor source = seeds.has_value() ? seeds->contiguous() : Tensor();
  const Masking args{num_patches,
                     len_keep,
                     len_predict,
                     noise.has_value() ? view_of(*noise, {0, 1}) : View{},
                     seeds.has_value() ? source.const_data_ptr<int64_t>() : nullptr,
                     keep.mutable_data_ptr<int64_t>(),
                     predict.mutable_data_ptr<int64_t>(),
                     restore.mutable_data_ptr<int64_t>()};
  std::atomic<bool> good = true;
  for_rows(batch, 16 * num_patches, [&](int64_t begin, int64_t end) {
    if (!kernels().random_masking(args, begin, end)) good = false;
  });
  TORCH_CHECK_VALUE(good, "noise must not hold NaN: the order of its values is the mask");
  return {keep, predict, restore};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, library) {
  serve(library, "random_masking", random_masking);
}

}  // namespace fastmim::cpu
