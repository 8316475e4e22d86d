// Weights of bicubic, antialiased resampling, as PyTorch computes them for bytes.

// The pixels of the input, and their weights, for each of `out` pixels of an output axis. Weights are int16 in units of
// 2^-shift, two to an int32, zero beyond a pixel's own `count`.
struct Weights {
  int64_t pairs, stride;  // from a pair's weights to the next pair's
  int shift;
  double scale;
  int32_t *first, *count;
  int32_t* weight;  // of pair p and pixel i at [p * stride + i * copies], `copies` of each
};

// filter of Catmull and Rom: cubic convolution with a = -0.5
static inline double cubic(double x) {
  x = std::abs(x);
  const double near = (1.5 * x - 2.5) * x * x + 1, far = ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return x < 1 ? near : x < 2 ? far : 0;
}

// Weights of a pixel once, with kResampleMargin pixels more, which repeat the last with weight 0. `table` holds them
// from one call to the next.
static Weights resample_weights(int64_t in, int64_t out, char* table, char* memory) {
  const int64_t size = out + kResampleMargin;
  const double scale = double(in) / double(out), stretch = std::max(scale, 1.0), support = 2 * stretch;
  // pairs, and the shift
  int64_t* known = scratch_of<int64_t>(table, 2);
  int32_t *first = scratch_of<int32_t>(table, size), *count = scratch_of<int32_t>(table, size),
          *weight = scratch_of<int32_t>(table, (resample_taps(in, out) + 1) / 2 * size);
  if (known[0] != 0) return {known[0], size, int(known[1]), scale, first, count, weight};
  const int32_t most = int32_t(std::ceil(support)) * 2 + 1;
  double *centre = scratch_of<double>(memory, out), *total = scratch_of<double>(memory, out);
  int32_t taps = 1;
  for (int64_t i = 0; i < out; ++i) {
    centre[i] = scale * (double(i) + 0.5);
    total[i] = 0;
    first[i] = std::max(int32_t(centre[i] - support + 0.5), 0);
    count[i] = std::clamp(int32_t(std::min(centre[i] + support + 0.5, double(in))) - first[i], 1, most);
    taps = std::max(taps, count[i]);
  }
  std::fill(first + out, first + size, first[out - 1]), std::fill(count + out, count + size, count[out - 1]);
  double* values = scratch_of<double>(memory, taps * out);
  for (int32_t j = 0; j < taps; ++j) {
    for (int64_t i = 0; i < out; ++i) {
      const double value = cubic((double(first[i] + j) - centre[i] + 0.5) * (1 / stretch));
      values[j * out + i] = j < count[i] ? value : 0;
      total[i] += values[j * out + i];
    }
  }
  double largest = 0;
  for (int32_t j = 0; j < taps; ++j) {
    for (int64_t i = 0; i < out; ++i) values[j * out + i] /= total[i];
    for (int64_t i = 0; i < out; ++i) largest = values[j * out + i] > largest ? values[j * out + i] : largest;
  }
  int shift = 0;
  while (shift < 22 && int32_t(0.5 + largest * (1 << (shift + 1))) < 1 << 15) ++shift;
  const double unit = 1 << shift;
  const auto fixed = [unit](double w) { return int32_t(w * unit + (w < 0 ? -0.5 : 0.5)); };
  const int64_t pairs = (taps + 1) / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    const double *low = values + 2 * p * out, *high = 2 * p + 1 < taps ? low + out : nullptr;
    int32_t* pair = weight + p * size;
    for (int64_t i = 0; i < out; ++i)
      pair[i] = (fixed(low[i]) & 0xFFFF) | int32_t(uint32_t(high ? fixed(high[i]) : 0) << 16);
    std::fill(pair + out, pair + size, 0);
  }
  known[0] = pairs, known[1] = shift;
  return {pairs, size, shift, scale, first, count, weight};
}

// `copies` of each weight, and mirrored
static Weights resample_copied(const Weights& once, int64_t copies, bool mirrored, char*& memory) {
  const int64_t size = once.stride, out = size - kResampleMargin;
  int32_t *first = scratch_of<int32_t>(memory, size), *count = scratch_of<int32_t>(memory, size),
          *weight = scratch_of<int32_t>(memory, once.pairs * size * copies);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t pixel = std::min(i, out - 1), from = mirrored ? out - 1 - pixel : pixel;
    first[i] = once.first[from], count[i] = once.count[from];
  }
  for (int64_t p = 0; p < once.pairs; ++p) {
    const int32_t* from = once.weight + p * size;
    int32_t* to = weight + p * size * copies;
    for (int64_t i = 0; i < out; ++i) std::fill_n(to + i * copies, copies, from[mirrored ? out - 1 - i : i]);
    std::fill(to + out * copies, to + size * copies, 0);
  }
  return {once.pairs, size * copies, once.shift, once.scale, first, count, weight};
}
