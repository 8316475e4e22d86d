#include "tensors.h"

namespace fastmim::cpu {

namespace {

// arguments that both directions share; q, k, v are (B, S, H, D) views, the results contiguous
Attention arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask, double scale) {
  Attention args{};
  args.heads = q.size(2), args.queries = q.size(1), args.keys = k.size(1), args.dim = q.size(3);
  args.scale = static_cast<float>(scale);
  args.q = view_of(q, {0, 1, 2, 3}), args.k = view_of(k, {0, 1, 2, 3}), args.v = view_of(v, {0, 1, 2, 3});
  if (key_mask.has_value()) {
    args.key_mask = key_mask->const_data_ptr<bool>();
    args.key_mask_stride[0] = key_mask->stride(0), args.key_mask_stride[1] = key_mask->stride(1);
  }
  return args;
}

void set_bias(Attention& args, const Tensor& bias, at::IntArrayRef full) {
  const Tensor whole = bias.expand(full);
  args.bias = whole.const_data_ptr<float>();
  for (int axis = 0; axis < 4; ++axis) args.bias_stride[axis] = whole.stride(axis);
}

int64_t work(const Attention& args) {
  return args.queries * args.keys * args.dim / 8 + 1;
}

void forward(const Attention& args, int64_t batch) {
  for_rows(batch * args.heads, work(args), [&](int64_t begin, int64_t end) { kernels().attention(args, begin, end); });
}

void backward(const Attention& args, int64_t batch) {
  for_rows(batch * args.heads, 3 * work(args),
           [&](int64_t begin, int64_t end) { kernels().attention_backward(args, begin, end); });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                 const OptionalTensor& bias, double scale) {
  check_dtypes(q);
  Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  Attention args = arguments(q, k, v, key_mask, scale);
  const Tensor wide_bias = bias.has_value() ? bias->to(at::kFloat) : Tensor();
  if (bias.has_value()) set_bias(args, wide_bias, {q.size(0), q.size(2), q.size(1), k.size(1)});
  args.out = view_of(out, {0, 1, 2, 3});
  forward(args, q.size(0));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const OptionalTensor& key_mask,
                                                              const OptionalTensor& bias, double scale,
                                                              bool need_bias_grad) {
  check_dtypes(q);
  const auto like = [](const Tensor& x) {
    return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  Attention args = arguments(q, k, v, key_mask, scale);
  const Tensor wide_bias = bias.has_value() ? bias->to(at::kFloat) : Tensor();
  const std::vector<int64_t> full = {q.size(0), q.size(2), q.size(1), k.size(1)};
  if (bias.has_value()) set_bias(args, wide_bias, full);
  const bool keep = bias.has_value() && need_bias_grad;
  const Tensor score_grad = at::empty(keep ? full : std::vector<int64_t>{0}, q.options().dtype(at::kFloat));
  args.score_grad = keep ? score_grad.mutable_data_ptr<float>() : nullptr;
  args.grad = view_of(grad, {0, 1, 2, 3});
  args.dq = view_of(dq, {0, 1, 2, 3}), args.dk = view_of(dk, {0, 1, 2, 3}), args.dv = view_of(dv, {0, 1, 2, 3});
  backward(args, q.size(0));
  return {dq, dk, dv, keep ? at::sum_to(score_grad, bias->sizes()).to(bias->scalar_type()) : score_grad};
}

Tensor attention_qkvpacked(const Tensor& qkv, const OptionalTensor& key_mask, double scale) {
  const Tensor q = qkv.select(2, 0), k = qkv.select(2, 1), v = qkv.select(2, 2);
  check_dtypes(q);
  return attention(q, k, v, key_mask, {}, scale);
}

std::tuple<Tensor, Tensor> attention_qkvpacked_backward(const Tensor& grad, const Tensor& qkv,
                                                        const OptionalTensor& key_mask, double scale, bool sum_dqkv) {
  const int64_t skipped = qkv.size(1) - grad.size(1);
  const Tensor q = qkv.select(2, 0).slice(1, skipped), k = qkv.select(2, 1), v = qkv.select(2, 2);
  check_dtypes(q);
  Tensor out = at::empty(qkv.sizes(), qkv.options().memory_format(at::MemoryFormat::Contiguous));
  out.select(2, 0).slice(1, 0, skipped).zero_();
  Attention args = arguments(q, k, v, key_mask, scale);
  args.grad = view_of(grad, {0, 1, 2, 3});
  args.dq = view_of(out.select(2, 0).slice(1, skipped), {0, 1, 2, 3});
  args.dk = view_of(out.select(2, 1), {0, 1, 2, 3});
  args.dv = view_of(out.select(2, 2), {0, 1, 2, 3});
  const int64_t batch = qkv.size(0);
  const Tensor sums =
      at::zeros(sum_dqkv ? std::vector<int64_t>{batch, 3, qkv.size(3), qkv.size(4)} : std::vector<int64_t>{0},
                qkv.options().dtype(at::kFloat));
  args.sums = sum_dqkv ? sums.mutable_data_ptr<float>() : nullptr;
  backward(args, batch);
  return {out, sum_dqkv ? sums.sum(0) : sums};
}

// ---- ragged: a call for some heads of a sequence, lengths from cu_seqlens -------------------------------------------

std::vector<int64_t> offsets(const char* name, const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen) {
  const Tensor cu = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* first = cu.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(first, first + cu.numel());
  bool fine = starts.front() == 0 && starts.back() == total;
  int64_t longest = 0;
  for (size_t i = 1; i < starts.size(); ++i) {
    fine &= starts[i] >= starts[i - 1];
    longest = std::max(longest, starts[i] - starts[i - 1]);
  }
  TORCH_CHECK_VALUE(fine, "cu_seqlens_", name, " must start at 0, never fall and end at the ", total,
                    " packed rows; got ", at::IntArrayRef(starts));
  TORCH_CHECK_VALUE(longest <= max_seqlen, "max_seqlen_", name, " must be at least the longest sequence, ", longest,
                    "; got ", max_seqlen);
  return starts;
}

View rows_from(const Tensor& packed, int64_t start) {
  View view = view_of(packed, {-1, 0, 1, 2});
  view.data = static_cast<char*>(view.data) + start * packed.stride(0) * packed.element_size();
  return view;
}

// run(args, first query, first key, heads begin..end) for all heads of all sequences
template <typename Run>
void each_sequence(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& starts_q,
                   const std::vector<int64_t>& starts_k, double scale, const Run& run) {
  const int64_t heads = q.size(1), items = (static_cast<int64_t>(starts_q.size()) - 1) * heads;
  for_rows(items, (q.numel() + k.numel()) / std::max<int64_t>(items, 1), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {
      const int64_t i = item / heads, head = item % heads, last = std::min(heads, head + end - item);
      Attention args{};
      args.heads = heads, args.dim = q.size(2), args.scale = static_cast<float>(scale);
      args.queries = starts_q[i + 1] - starts_q[i], args.keys = starts_k[i + 1] - starts_k[i];
      args.q = rows_from(q, starts_q[i]), args.k = rows_from(k, starts_k[i]), args.v = rows_from(v, starts_k[i]);
      run(args, starts_q[i], starts_k[i], head, last);
      item += last - head;
    }
  });
}

Tensor attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                        const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale) {
  check_dtypes(q);
  const auto starts_q = offsets("q", cu_seqlens_q, q.size(0), max_seqlen_q),
             starts_k = offsets("k", cu_seqlens_k, k.size(0), max_seqlen_k);
  Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  each_sequence(q, k, v, starts_q, starts_k, scale,
                [&](Attention& args, int64_t first, int64_t, int64_t begin, int64_t end) {
                  args.out = rows_from(out, first);
                  kernels().attention(args, begin, end);
                });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& cu_seqlens_q,
                                                             const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                             int64_t max_seqlen_k, double scale) {
  check_dtypes(q);
  const auto starts_q = offsets("q", cu_seqlens_q, q.size(0), max_seqlen_q),
             starts_k = offsets("k", cu_seqlens_k, k.size(0), max_seqlen_k);
  const auto like = [](const Tensor& x) {
    return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  each_sequence(q, k, v, starts_q, starts_k, scale,
                [&](Attention& args, int64_t first_q, int64_t first_k, int64_t begin, int64_t end) {
                  args.grad = rows_from(grad, first_q), args.dq = rows_from(dq, first_q);
                  args.dk = rows_from(dk, first_k), args.dv = rows_from(dv, first_k);
                  kernels().attention_backward(args, begin, end);
                });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmim, CPU, library) {
  serve(library, "attention", attention);
  serve(library, "attention_backward", attention_backward);
  serve(library, "attention_qkvpacked", attention_qkvpacked);
  serve(library, "attention_qkvpacked_backward", attention_qkvpacked_backward);
  serve(library, "attention_varlen", attention_varlen);
  serve(library, "attention_varlen_backward", attention_varlen_backward);
}

}  // namespace fastmim::cpu
