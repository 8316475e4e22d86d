// Attention on one (sequence, head) after another, all of it in cache.
//
//   forward    P = softmax(scale Q Kᵀ + bias)    O = P V
//   backward   dP = dO Vᵀ    dS = P (dP - rowsum(P dP))    dQ = scale dS K    dK = scale dSᵀ Q    dV = Pᵀ dO
//
// Neither O nor the softmax's statistics are needed by the backward pass. Queries are taken kRows at a time; K and V
// stay in scratch, transposed where a product wants them so.

constexpr int64_t kRows = 66;

// Scratch of one thread for one (sequence, head) after another, and the steps that all kinds of products share.
struct AttentionItem {
  const Attention& args;
  const int64_t dim = padded(args.dim), keys = padded(args.keys);
  Scratch memory;
  // a block's P, dP and O or dQ, and an item's dK and dV
  float *p, *dp, *out, *dk, *dv, *key_bias;
  int64_t sequence = 0, head = 0;

  AttentionItem(const Attention& a, bool backward) : args(a) {
    p = memory.take(kRows * keys);
    key_bias = memory.take(keys);
    out = memory.take(kRows * dim);
    dp = dk = dv = nullptr;
    if (backward) {
      dp = memory.take(kRows * keys);
      dk = memory.take(keys * dim);
      dv = memory.take(keys * dim);
    }
  }

  void* row(const View& view, int64_t position) const {
    return at(view, sequence * view.stride[0] + position * view.stride[1] + head * view.stride[2]);
  }

  bool attends(int64_t key) const {
    return args.key_mask == nullptr ||
           args.key_mask[sequence * args.key_mask_stride[0] + key * args.key_mask_stride[1]];
  }

  // keeps dS of a block, which is what a bias has as its gradient before it is summed
  void keep_slopes(int64_t start, int64_t rows) const {
    if (args.score_grad == nullptr) return;
    float* to = args.score_grad + ((sequence * args.heads + head) * args.queries + start) * args.keys;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < args.keys; ++j) to[i * args.keys + j] = dp[i * keys + j];
  }

  // prefetches a row of the next item: heads lie too far apart for the hardware to do so
  void prefetch(const View& view, int64_t item, int64_t rows) const {
    const int64_t size = view.type == Type::f32 ? 4 : 2;
    for (int64_t i = 0; i < rows; ++i) {
      const char* line = static_cast<const char*>(
          at(view, item / args.heads * view.stride[0] + i * view.stride[1] + item % args.heads * view.stride[2]));
      for (int64_t byte = 0; byte < args.dim * size; byte += 64) __builtin_prefetch(line + byte);
    }
  }

  // starts an item: finds the keys that its queries attend to
  void turn_to(int64_t item, int64_t end) {
    sequence = item / args.heads, head = item % args.heads;
    if (item + 1 < end) {
      prefetch(args.k, item + 1, args.keys);
      prefetch(args.v, item + 1, args.keys);
      prefetch(args.q, item + 1, args.queries);
      if (args.grad.data != nullptr) prefetch(args.grad, item + 1, args.queries);
    }
    for (int64_t j = 0; j < keys; ++j) key_bias[j] = j < args.keys && attends(j) ? 0.0f : -__builtin_inff();
  }

  void add_bias(int64_t query, float* scores) const {
    if (args.bias == nullptr) return;
    const int64_t* stride = args.bias_stride;
    const float* bias = args.bias + sequence * stride[0] + head * stride[1] + query * stride[2];
    for (int64_t j = 0; j < args.keys; ++j) scores[j] += bias[j * stride[3]];
  }

  // puts -inf in place of a query's scores of hidden keys and of padding; returns the largest score, 0 if all are -inf
  float hide(float* scores) const {
    for (int64_t j = args.key_mask == nullptr ? args.keys / VL * VL : 0; j < keys; j += VL) {
      const Vec hidden = load(key_bias + j);
      store(scores + j, hidden < 0.0f ? hidden : load(scores + j));
    }
    Vec top = splat(-__builtin_inff());
    for (int64_t j = 0; j < keys; j += VL) top = larger(load(scores + j), top);
    const float largest = largest_in(top);
    return largest == -__builtin_inff() ? 0 : largest;
  }

  // Mean of dP under a row of P, which sums to 1 only up to rounding; `mean` is its sum of products. What is left of dP
  // is averaged again: equal dP leave 0.
  float refined(Vec mean, const float* probabilities, const float* slopes) const {
    const float shift = sum_of(mean);
    Vec left{};
    for (int64_t j = 0; j < keys; j += VL) left += load(probabilities + j) * (load(slopes + j) - shift);
    return shift + sum_of(left);
  }
};

// divisor of the exponentials; without any key these are 0
FASTMIM_HD float divisor_of(float sum) {
  return sum == 0 ? 1 : sum;
}
