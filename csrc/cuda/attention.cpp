#include "tensors.h"

namespace fastmim::cuda {

namespace {

// whether kernels can read the rows of (B, S, H, D) in place, in words of 16 bytes
bool readable(const Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return aligned && x.stride(3) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) % 8 == 0;
}

Tensor as_readable(const Tensor& x) {
  return readable(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

Heads heads_of(const Tensor& x) {
  return {address(x), x.stride(0), x.stride(1), x.stride(2)};
}

constexpr int64_t kMostRows = int64_t{1} << 30;

// sizes and key mask of both directions
Attention arguments(const Tensor& q, const Tensor& k, const OptionalTensor& key_mask, double scale) {
  if (q.size(1) > kMostRows || k.size(1) > kMostRows) throw Unserved("over 2^30 rows of one sequence are not served");
  Attention args{};
  args.batch = q.size(0), args.heads = static_cast<int>(q.size(2)), args.dim = static_cast<int>(q.size(3));
  args.queries = static_cast<int>(q.size(1)), args.keys = static_cast<int>(k.size(1));
  args.scale = static_cast<float>(scale);
  args.type = type_of(q);
  if (key_mask.has_value()) {
    args.key_mask = address_of<bool>(key_mask);
    args.mask_batch = key_mask->stride(0), args.mask_key = key_mask->stride(1);
  }
  return args;
}

void check_bias(const OptionalTensor& bias) {
  if (bias.has_value()) throw Unserved("a bias is left to other kernels");
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask, double scale,
             const Tensor& out) {
  const Place place(q);
  Attention args = arguments(q, k, key_mask, scale);
  if (args.dim == 0) throw Unserved("heads without columns are served by the reference");
  if (out.numel() == 0) return;
  check_served(refuses_attention(args));
  const Tensor query = as_readable(q), key = as_readable(k), value = as_readable(v);
  args.q = heads_of(query), args.k = heads_of(key), args.v = heads_of(value), args.out = heads_of(out);
  launch_attention(args, place.stream);
}

void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
              double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const Place place(q);
  Attention args = arguments(q, k, key_mask, scale);
  if (args.queries == 0) throw Unserved("a gradient without queries is served by the reference");
  if (args.dim == 0) throw Unserved("heads without columns are served by the reference");
  if (q.numel() == 0) return;
  check_served(refuses_attention_backward(args));
  const Tensor slope = as_readable(grad), query = as_readable(q), key = as_readable(k), value = as_readable(v);
  args.grad = heads_of(slope);
  args.q = heads_of(query), args.k = heads_of(key), args.v = heads_of(value);
  args.dq = heads_of(dq), args.dk = heads_of(dk), args.dv = heads_of(dv);
  launch_attention_backward(args, place.stream);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                 const OptionalTensor& bias, double scale) {
  check_bias(bias);
  Tensor out = contiguous_like(q);
  forward(q, k, v, key_mask, scale, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const OptionalTensor& key_mask,
                                                              const OptionalTensor& bias, double scale,
                                                              bool need_bias_grad) {
  check_bias(bias);
  Tensor dq = contiguous_like(q), dk = contiguous_like(k), dv = contiguous_like(v);
  backward(grad, q, k, v, key_mask, scale, dq, dk, dv);
  return {dq, dk, dv, at::empty({0}, q.options().dtype(at::kFloat))};
}

Tensor attention_qkvpacked(const Tensor& qkv, const OptionalTensor& key_mask, double scale) {
  const Tensor q = qkv.select(2, 0);
  Tensor out = contiguous_like(q);
  forward(q, qkv.select(2, 1), qkv.select(2, 2), key_mask, scale, out);
  return out;
}

std::tuple<Tensor, Tensor> attention_qkvpacked_backward(const Tensor& grad, const Tensor& qkv,
                                                        const OptionalTensor& key_mask, double scale, bool sum_dqkv) {
  Tensor dqkv = contiguous_like(qkv);
  const int64_t skipped = qkv.size(1) - grad.size(1);
  backward(grad, qkv.select(2, 0).slice(1, skipped), qkv.select(2, 1), qkv.select(2, 2), key_mask, scale,
           dqkv.select(2, 0).slice(1, skipped), dqkv.select(2, 1), dqkv.select(2, 2));
  dqkv.select(2, 0).slice(1, 0, skipped).zero_();
  const auto options = qkv.options().dtype(at::kFloat);
  return {dqkv, sum_dqkv ? at::sum(dqkv, at::IntArrayRef{0, 1}, false, at::kFloat) : at::empty({0}, options)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTMIM_CUDA_LIBRARY, library) {
  library.def("attention", attention);
  library.def("attention_backward", attention_backward);
  library.def("attention_qkvpacked", attention_qkvpacked);
  library.def("attention_qkvpacked_backward", attention_qkvpacked_backward);
}

}  // namespace fastmim::cuda
