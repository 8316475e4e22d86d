#include <cstring>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fastmim::cpu {

namespace {

// out[b, place] = the row `from`, byte for byte
void copy_rows(const Tensor& from, const Tensor& to, const int64_t* from_id, const int64_t* to_id, int64_t count) {
  const int64_t size = from.element_size(), width = from.size(2), step = from.stride(2);
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(to.mutable_data_ptr());
  for_rows(from.size(0) * count, width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / count, k = row % count;
      const char* a = source + (b * from.stride(0) + (from_id ? from_id[row] : k) * from.stride(1)) * size;
      char* o = target + (b * to.stride(0) + (to_id ? to_id[row] : k) * to.stride(1)) * size;
      if (step == 1) {
        std::memcpy(o, a, width * size);
      } else {
        for (int64_t d = 0; d < width; ++d) std::memcpy(o + d * size, a + d * step * size, size);
      }
    }
  });
}

Tensor gather_tokens(const Tensor& tokens, const Tensor& ids) {
  const Tensor from = tokens.dim() == 2 ? tokens.expand({ids.size(0), -1, -1}) : tokens;
  const Tensor rows = checked_ids("ids", ids, from.size(1));
  Tensor out = at::empty({ids.size(0), ids.size(1), from.size(2)}, tokens.options());
  copy_rows(from, out, rows.const_data_ptr<int64_t>(), nullptr, ids.size(1));
  return out;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& ids, int64_t num_tokens) {
  const Tensor rows = checked_ids("ids", ids, num_tokens);
  Tensor out = at::zeros({grad.size(0), num_tokens, grad.size(2)}, grad.options());
  copy_rows(grad, out, nullptr, rows.const_data_ptr<int64_t>(), ids.size(1));
  return out;
}

Tensor sum_by_position(const Tensor& rows, const Tensor& ids, int64_t num_positions) {
  check_dtypes(rows);
  const Tensor id = checked_ids("ids", ids, num_positions);
  const Tensor from = rows.contiguous();
  Tensor out = at::zeros({num_positions, rows.size(2)}, rows.options().dtype(at::kFloat));
  const int64_t batch = rows.size(0), count = rows.size(1), width = rows.size(2);
  const View a = rows_of(from), o = rows_of(out);
  // for each position, its row in each image of the batch: one thread then sums a position, in batch order
  std::vector<int64_t> place(batch * num_positions, -1);
  for (int64_t row = 0; row < batch * count; ++row)
    place[id.const_data_ptr<int64_t>()[row] * batch + row / count] = row;
  for_rows(num_positions, batch * width, [&](int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end; ++position) {
      float* sum = static_cast<float*>(o.data) + position * width;
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t row = place[position * batch + b];
        if (row < 0) continue;
        const char* line = static_cast<const char*>(a.data) + row * width * from.element_size();
        kernels().add_row(a.type, line, Type::f32, sum, Type::f32, sum, width);
      }
    }
  });
  return out;
}

Tensor sum_rows(const Tensor& x) {
  check_dtypes(x);
  const Tensor from = x.stride(2) == 1 ? x : x.contiguous();
  const SumRows args{from.size(1), from.size(2), view_of(from, {0, 1})};
  return by_pieces(from.size(0) * from.size(1), args.width, args.width,
                   [&](float* part, int64_t begin, int64_t end) { kernels().sum_rows(args, part, begin, end); });
}

// out[b, row] = visible[b, from] (or the mask token, where `from` is past the visible tokens) + pos_embed[position];
// mask token and positions may be of each sample
template <typename Place>
Tensor assemble(const Tensor& visible, const Tensor& mask_token, const Tensor& pos_embed, int64_t rows,
                const Place& place) {
  const Tensor tokens = visible.contiguous(), mask = mask_token.contiguous();
  // few rows of a long table are read: it is not copied where its rows are dense
  const Tensor pos = pos_embed.stride(-1) == 1 ? pos_embed : pos_embed.contiguous();
  const auto bytes_of = [](const Tensor& table, int64_t values) { return values * table.element_size(); };
  const int64_t seen = visible.size(1), width = visible.size(2);
  Tensor out = at::empty({visible.size(0), rows, width}, visible.options());
  // outside the loop: a tensor's methods cost about as much as a short row
  const auto* token = static_cast<const char*>(tokens.const_data_ptr());
  const auto* mask_row = static_cast<const char*>(mask.const_data_ptr());
  const auto* pos_row = static_cast<const char*>(pos.const_data_ptr());
  const int64_t token_step = bytes_of(tokens, width), pos_step = bytes_of(pos, pos.stride(-2)),
                mask_of_sample = mask.dim() == 2 ? bytes_of(mask, mask.stride(0)) : 0,
                pos_of_sample = pos.dim() == 3 ? bytes_of(pos, pos.stride(0)) : 0;
  const Type type = type_of(visible.scalar_type()), mask_type = type_of(mask.scalar_type()),
             pos_type = type_of(pos.scalar_type());
  const View target = output_rows_of(out, out.nbytes());
  for_rows(visible.size(0) * rows, width, [&](int64_t begin, int64_t end) {
    constexpr int64_t kRows = 64;
    RowSum sums[kRows];
    int64_t b = begin / rows, row = begin % rows, count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto [from, position] = place(b, row);
      const bool is_visible = from < seen;
      sums[count++] = {is_visible ? type : mask_type,
                       is_visible ? token + (b * seen + from) * token_step : mask_row + b * mask_of_sample,
                       pos_row + b * pos_of_sample + position * pos_step};
      if (count == kRows || i + 1 == end) {
        kernels().add_rows(sums, count, pos_type, target, i + 1 - count, width);
        count = 0;
      }
      if (++row == rows) ++b, row = 0;
    }
  });
  return out;
}

using Place = std::pair<int64_t, int64_t>;

Tensor decoder_tokens(const Tensor& visible, const Tensor& ids_keep, const Tensor& ids_predict,
                      const Tensor& mask_token, const Tensor& pos_embed, int64_t num_prefix_tokens) {
  check_dtypes(visible, mask_token, pos_embed);
  const int64_t patches = pos_embed.size(-2) - num_prefix_tokens, seen = visible.size(1);
  const Tensor keep = checked_ids("ids_keep", ids_keep, patches),
               predict = checked_ids("ids_predict", ids_predict, patches);
  const int64_t *kept = keep.const_data_ptr<int64_t>(), *predicted = predict.const_data_ptr<int64_t>();
  const int64_t K = keep.size(1), M = predict.size(1), N = num_prefix_tokens;
  return assemble(visible, mask_token, pos_embed, seen + M, [=](int64_t b, int64_t row) -> Place {
    if (row < N) return {row, row};
    return {row, N + (row < seen ? kept[b * K + row - N] : predicted[b * M + row - seen])};
  });
}

Tensor unshuffle(const Tensor& visible, const Tensor& ids_restore, const Tensor& mask_token, const Tensor& pos_embed,
                 int64_t num_prefix_tokens) {
  check_dtypes(visible, mask_token, pos_embed);
  const int64_t L = ids_restore.size(1), N = num_prefix_tokens;
  const Tensor restore = checked_ids("ids_restore", ids_restore, L);
  const int64_t* rank = restore.const_data_ptr<int64_t>();
  return assemble(visible, mask_token, pos_embed, N + L,
                  [=](int64_t b, int64_t row) -> Place { return {row < N ? row : N + rank[b * L + row - N], row}; });
}

std::tuple<Tensor, Tensor> unshuffle_backward(const Tensor& grad, const Tensor& ids_restore, int64_t len_keep,
                                              int64_t num_prefix_tokens) {
  check_dtypes(grad);
  const Tensor from = grad.contiguous(), restore = ids_restore.contiguous();
  const int64_t batch = grad.size(0), width = grad.size(2), L = ids_restore.size(1), N = num_prefix_tokens;
  Tensor dvisible = at::empty({batch, N + len_keep, width}, grad.options());
  Tensor by_image = at::zeros({batch, width}, grad.options().dtype(at::kFloat));
  const int64_t size = grad.element_size();
  const Type type = type_of(grad.scalar_type());
  for_rows(batch, (N + L) * width, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* masked = by_image.mutable_data_ptr<float>() + b * width;
      for (int64_t row = 0; row < N + L; ++row) {
        const char* line = static_cast<const char*>(from.const_data_ptr()) + (b * (N + L) + row) * width * size;
        const int64_t to = row < N ? row : N + restore.const_data_ptr<int64_t>()[b * L + row - N];
        if (to < N + len_keep) {
          std::memcpy(static_cast<char*>(dvisible.mutable_data_ptr()) + (b * (N + len_keep) + to) * width * size, line,
                      width * size);
        } else {
          kernels().add_row(type, line, Type::f32, masked, Type::f32, masked, width);
        }
      }
    }
  });
  return {dvisible, by_image.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, library) {
  serve(library, "gather_tokens", gather_tokens);
  serve(library, "gather_tokens_backward", gather_tokens_backward);
  serve(library, "sum_by_position", sum_by_position);
  serve(library, "sum_rows", sum_rows);
  serve(library, "decoder_tokens", decoder_tokens);
  serve(library, "unshuffle", unshuffle);
  serve(library, "unshuffle_backward", unshuffle_backward);
}

}  // namespace fastmim::cpu
