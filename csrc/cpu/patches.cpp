#include "patches.h"

namespace fastmim::cpu {

namespace {

Pixels pixels_of(const Tensor& images) {
  if (images.scalar_type() == at::kByte) return Pixels::uint8;
  return images.scalar_type() == at::kUInt16 ? Pixels::uint16 : Pixels::floating;
}

std::vector<float> stats_of(const OptionalTensor& given, int64_t channels, float otherwise) {
  if (!given.has_value()) return std::vector<float>(channels, otherwise);
  const Tensor stats = as_float(*given);
  return {stats.const_data_ptr<float>(), stats.const_data_ptr<float>() + channels};
}

}  // namespace

void check_pixels(const Tensor& images, const OptionalTensor& mean, const OptionalTensor& std) {
  if (pixels_of(images) == Pixels::floating) check_dtypes(images);
  check_dtypes(mean, std);
}

PatchReader::PatchReader(const Tensor& images, at::IntArrayRef patch_size, const OptionalTensor& mean_of,
                         const OptionalTensor& std_of)
    : mean(stats_of(mean_of, images.size(1), 0)), std(stats_of(std_of, images.size(1), 1)) {
  const int64_t channels = images.size(1);
  const Pixels pixels = pixels_of(images);
  for (int64_t c = 0; c < channels; ++c)
    TORCH_CHECK_VALUE(std[c] > 0, "std must be positive, got ", std[c], " for channel ", c);
  if (pixels == Pixels::uint8) {
    table.resize(channels * 256);
    for (int64_t c = 0; c < channels; ++c)
      for (int value = 0; value < 256; ++value)
        table[c * 256 + value] = (pixel(static_cast<uint8_t>(value)) - mean[c]) / std[c];
  }
  patches.table = pixels == Pixels::uint8 ? table.data() : nullptr;
  patches.mean = mean.data(), patches.std = std.data();
  patches.images = images.const_data_ptr();
  patches.pixels = pixels;
  patches.type = pixels == Pixels::floating ? type_of(images.scalar_type()) : Type::f32;
  patches.axes = static_cast<int>(patch_size.size());
  patches.channels = channels;
  patches.batch_stride = images.stride(0), patches.channel_stride = images.stride(1);
  for (int axis = 0; axis < patches.axes; ++axis) {
    patches.stride[axis] = images.stride(2 + axis);
    patches.patch[axis] = patch_size[axis];
    patches.grid[axis] = images.size(2 + axis) / patch_size[axis];
  }
}

namespace {

Tensor gather_patches(const Tensor& images, const Tensor& ids, at::IntArrayRef patch_size, const OptionalTensor& mean,
                      const OptionalTensor& std, at::ScalarType dtype) {
  check_pixels(images, mean, std);
  check_dtypes(dtype);
  const PatchReader reader(images, patch_size, mean, std);
  const Tensor rows = checked_ids("ids", ids, patch_count(reader.patches));
  const int64_t values = patch_values(reader.patches);
  Tensor out = at::empty({ids.size(0), ids.size(1), values},
                         images.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
  const GatherPatches args{reader.patches, rows.const_data_ptr<int64_t>(), ids.size(1), rows_of(out)};
  for_rows(rows.numel(), values, [&](int64_t begin, int64_t end) { kernels().gather_patches(args, begin, end); });
  return out;
}

Tensor gather_patches_backward(const Tensor& grad, const Tensor& ids, at::IntArrayRef patch_size,
                               const OptionalTensor& std, at::IntArrayRef shape, at::ScalarType dtype) {
  check_dtypes(grad, std, dtype);
  Tensor images = at::zeros(shape, grad.options().dtype(dtype));
  const PatchReader reader(images, patch_size, {}, std);
  const Tensor rows = checked_ids("ids", ids, patch_count(reader.patches));
  const ScatterPatches args{reader.patches, rows.const_data_ptr<int64_t>(), ids.size(1), view_of(grad, {0, 1, 2})};
  for_rows(rows.numel(), grad.size(2),
           [&](int64_t begin, int64_t end) { kernels().scatter_patches(args, begin, end); });
  return images;
}

Tensor embed_patches(const Tensor& images, const Tensor& ids, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& pos_embed, const OptionalTensor& prefix, const OptionalTensor& mean,
                     const OptionalTensor& std, at::ScalarType dtype, const OptionalTensor& pos_ids) {
  check_pixels(images, mean, std);
  check_dtypes(weight, bias, pos_embed, prefix, dtype);
  const Tensor patches = gather_patches(images, ids, weight.sizes().slice(2), mean, std, dtype);
  const Tensor matrix = weight.flatten(1).to(dtype);
  const OptionalTensor narrow_bias = bias.has_value() ? OptionalTensor(bias->to(dtype)) : OptionalTensor();
  const int64_t K = ids.size(1), N = prefix.has_value() ? prefix->size(0) : 0, width = weight.size(0);
  const Tensor head = prefix.has_value() ? prefix->contiguous() : Tensor(),
               pos = pos_embed.has_value() ? pos_embed->contiguous() : Tensor();
  const Tensor rows =
      pos.defined() && pos_ids.has_value() ? checked_ids("pos_ids", *pos_ids, pos.size(0)) : ids.contiguous();
  const Type type = type_of(dtype);
  const auto row_of = [width](const Tensor& table, int64_t row) {
    return static_cast<char*>(const_cast<void*>(table.const_data_ptr())) + row * width * table.element_size();
  };
  if (pos.defined() && N == 0 && dtype == at::kFloat) {
    // the product is added to position and bias, as it would be to the bias alone: no pass of their own
    Tensor out = at::empty({ids.size(0) * K, width}, patches.options());
    const Tensor shift = bias.has_value() ? narrow_bias->contiguous() : Tensor();
    for_rows(out.size(0), width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const void* position = row_of(pos, rows.const_data_ptr<int64_t>()[i]);
        if (shift.defined()) {
          kernels().add_row(type, row_of(shift, 0), type_of(pos.scalar_type()), position, type, row_of(out, i), width);
        } else {
          kernels().copy_row(type_of(pos.scalar_type()), position, type, row_of(out, i), width);
        }
      }
    });
    out.addmm_(patches.flatten(0, 1), matrix.t());
    return out.view({ids.size(0), K, width});
  }
  const Tensor tokens = at::linear(patches, matrix, narrow_bias).contiguous();
  if (!pos.defined() && !head.defined()) return tokens;
  // without a prefix the positions are added in place
  Tensor out = N == 0 ? tokens : at::empty({ids.size(0), N + K, width}, tokens.options());
  for_rows(ids.size(0) * (N + K), width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (N + K), row = i % (N + K);
      if (row < N) {
        kernels().copy_row(type_of(head.scalar_type()), row_of(head, row), type, row_of(out, i), width);
        continue;
      }
      const int64_t token = b * K + row - N;
      if (pos.defined()) {
        const void* position = row_of(pos, rows.const_data_ptr<int64_t>()[token]);
        kernels().add_row(type, row_of(tokens, token), type_of(pos.scalar_type()), position, type, row_of(out, i),
                          width);
      } else {
        kernels().copy_row(type, row_of(tokens, token), type, row_of(out, i), width);
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, library) {
  serve(library, "gather_patches", gather_patches);
  serve(library, "gather_patches_backward", gather_patches_backward);
  serve(library, "embed_patches", embed_patches);
}

}  // namespace fastmim::cpu
