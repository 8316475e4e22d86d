// Bicubic, antialiased resampling of RGB bytes, in PyTorch's fixed point: a horizontal pass to bytes, then a vertical
// one.

// The pixels of the input, and their weights, for each of `size` pixels of an output axis. Weights are int16 in units
// of 2^-shift, two to an int32, zero beyond a pixel's own `count`.
struct Weights {
  int64_t size, pairs;
  int shift;
  int32_t *first, *count;
  int32_t* weight;  // of pair p and pixel i at [(p * size + i) * copies]
};

// filter of Catmull and Rom: cubic convolution with a = -0.5
static inline double cubic(double x) {
  x = std::abs(x);
  const double near = (1.5 * x - 2.5) * x * x + 1, far = ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return x < 1 ? near : x < 2 ? far : 0;
}

// `copies` of each weight; `size` pixels of which the first `out` exist, the others repeat the last with weight 0
static Weights resample_weights(int64_t in, int64_t out, int64_t size, int64_t copies, bool mirrored, char*& memory) {
  const double scale = double(in) / double(out), stretch = std::max(scale, 1.0), support = 2 * stretch;
  const int64_t most = int64_t(std::ceil(support)) * 2 + 1;
  Weights to{size, 0, 0, scratch_of<int32_t>(memory, size), scratch_of<int32_t>(memory, size), nullptr};
  double *centre = scratch_of<double>(memory, out), *total = scratch_of<double>(memory, out);
  int32_t taps = 1;
  for (int64_t i = 0; i < out; ++i) {
    centre[i] = scale * (double(mirrored ? out - 1 - i : i) + 0.5);
    total[i] = 0;
    to.first[i] = std::max(int32_t(centre[i] - support + 0.5), 0);
    to.count[i] = std::clamp(int32_t(std::min(centre[i] + support + 0.5, double(in))) - to.first[i], 1, int32_t(most));
    taps = std::max(taps, to.count[i]);
  }
  to.pairs = (taps + 1) / 2;
  double* values = scratch_of<double>(memory, taps * out);
  double largest = 0;
  for (int32_t j = 0; j < taps; ++j) {
    double* w = values + j * out;
    for (int64_t i = 0; i < out; ++i) {
      const double value = cubic((double(to.first[i] + j) - centre[i] + 0.5) * (1 / stretch));
      w[i] = j < to.count[i] ? value : 0;
      total[i] += w[i];
    }
  }
  for (int32_t j = 0; j < taps; ++j) {
    double* w = values + j * out;
    for (int64_t i = 0; i < out; ++i) w[i] /= total[i];
    for (int64_t i = 0; i < out; ++i) largest = w[i] > largest ? w[i] : largest;
  }
  while (to.shift < 22 && int32_t(0.5 + largest * (1 << (to.shift + 1))) < 1 << 15) ++to.shift;
  const double unit = 1 << to.shift;
  to.weight = scratch_of<int32_t>(memory, to.pairs * size * copies);
  const auto fixed = [unit](double w) { return int32_t(w * unit + (w < 0 ? -0.5 : 0.5)); };
  for (int64_t p = 0; p < to.pairs; ++p) {
    const double *low = values + 2 * p * out, *high = low + out;
    int32_t* pair = to.weight + p * size * copies;
    const bool odd = 2 * p + 1 >= taps;
    for (int64_t i = 0; i < out; ++i) {
      const int32_t both = (fixed(low[i]) & 0xFFFF) | (odd ? 0 : int32_t(uint32_t(fixed(high[i])) << 16));
      for (int64_t c = 0; c < copies; ++c) pair[i * copies + c] = both;
    }
    std::fill(pair + out * copies, pair + size * copies, 0);
  }
  for (int64_t i = out; i < size; ++i) to.first[i] = to.first[out - 1], to.count[i] = to.count[out - 1];
  return to;
}

// pixels begin..end of a row of the input, whose 16 bytes past each pixel's window can be read; writes 16 bytes more
static void resample_row(const uint8_t* row, const Weights& to, int64_t begin, int64_t end, uint8_t* out) {
  const int32_t half = 1 << (to.shift - 1);
#if FASTMIM_VL == 16
  const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1)),
                high =
                    _mm512_broadcast_i32x4(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  const __m128i packed = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const __m128i shift = _mm_cvtsi32_si128(to.shift);
  for (int64_t x = begin; x < end; x += 4, out += 12) {
    __m512i sum = _mm512_set1_epi32(half);
    const auto window = [&](int i, int64_t p) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 3 * (to.first[x + i] + 2 * p)));
    };
    for (int64_t p = 0; p < to.pairs; p += 2) {
      __m512i pixels = _mm512_castsi128_si512(window(0, p));
      pixels = _mm512_inserti32x4(pixels, window(1, p), 1);
      pixels = _mm512_inserti32x4(pixels, window(2, p), 2);
      pixels = _mm512_inserti32x4(pixels, window(3, p), 3);
      const int32_t* w = to.weight + (p * to.size + x) * 4;
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_shuffle_epi8(pixels, low), _mm512_loadu_si512(w)));
      if (p + 1 == to.pairs) break;
      w += to.size * 4;
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_shuffle_epi8(pixels, high), _mm512_loadu_si512(w)));
    }
    sum = _mm512_max_epi32(_mm512_sra_epi32(sum, shift), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(_mm512_cvtusepi32_epi8(sum), packed));
  }
#elif FASTMIM_VL == 8
  const __m256i low = _mm256_broadcastsi128_si256(
                    _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1)),
                high = _mm256_broadcastsi128_si256(
                    _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  // of the pixels 0, 2, 1 and 3
  const __m128i packed = _mm_setr_epi8(0, 1, 2, 8, 9, 10, 4, 5, 6, 12, 13, 14, -1, -1, -1, -1);
  const __m128i shift = _mm_cvtsi32_si128(to.shift);
  for (int64_t x = begin; x < end; x += 4, out += 12) {
    __m256i sum[2] = {_mm256_set1_epi32(half), _mm256_set1_epi32(half)};
    const auto window = [&](int i, int64_t p) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 3 * (to.first[x + i] + 2 * p)));
    };
    for (int64_t p = 0; p < to.pairs; p += 2) {
      for (int i = 0; i < 2; ++i) {
        const __m256i pixels = _mm256_set_m128i(window(2 * i + 1, p), window(2 * i, p));
        const int32_t* w = to.weight + (p * to.size + x + 2 * i) * 4;
        const auto weights = [](const int32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, low), weights(w)));
        if (p + 1 == to.pairs) continue;
        w += to.size * 4;
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, high), weights(w)));
      }
    }
    const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(sum[0], shift), _mm256_sra_epi32(sum[1], shift));
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(bytes, packed));
  }
#else
  for (int64_t x = begin; x < end; ++x, out += 3) {
    const uint8_t* pixel = row + 3 * to.first[x];
    for (int c = 0; c < 3; ++c) {
      int32_t sum = half;
      for (int64_t p = 0; p < to.pairs; ++p) {
        const int32_t w = to.weight[(p * to.size + x) * 4];
        sum += pixel[6 * p + c] * int16_t(w) + pixel[6 * p + 3 + c] * (w >> 16);
      }
      out[c] = uint8_t(std::clamp(sum >> to.shift, 0, 255));
    }
  }
#endif
}

// `width` bytes of pixel y from rows of the input; reads and writes up to a multiple of 64 bytes
static void resample_column(const uint8_t* const* rows, const Weights& to, int64_t y, int64_t width, uint8_t* out) {
  const int32_t half = 1 << (to.shift - 1);
  const int32_t* weight = to.weight + y;
#if FASTMIM_VL == 16
  using Bytes = __m512i;
#define FASTMIM_SIMD(name) _mm512_##name
#define FASTMIM_LOAD(at) _mm512_loadu_si512(at)
#define FASTMIM_STORE(at, value) _mm512_storeu_si512(at, value)
  const Bytes zero = _mm512_setzero_si512();
#elif FASTMIM_VL == 8
  using Bytes = __m256i;
#define FASTMIM_SIMD(name) _mm256_##name
#define FASTMIM_LOAD(at) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
#define FASTMIM_STORE(at, value) _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value)
  const Bytes zero = _mm256_setzero_si256();
#endif
#ifdef FASTMIM_SIMD
  const __m128i shift = _mm_cvtsi32_si128(to.shift);
  for (int64_t at = 0; at < width; at += sizeof(Bytes)) {
    Bytes sum0 = FASTMIM_SIMD(set1_epi32)(half), sum1 = sum0, sum2 = sum0, sum3 = sum0;
    for (int64_t p = 0; p < to.pairs; ++p) {
      const Bytes w = FASTMIM_SIMD(set1_epi32)(weight[p * to.size]);
      const Bytes a = FASTMIM_LOAD(rows[2 * p] + at), b = FASTMIM_LOAD(rows[2 * p + 1] + at);
      const Bytes low = FASTMIM_SIMD(unpacklo_epi8)(a, b), high = FASTMIM_SIMD(unpackhi_epi8)(a, b);
      const auto add = [&](Bytes& sum, Bytes words) {
        sum = FASTMIM_SIMD(add_epi32)(sum, FASTMIM_SIMD(madd_epi16)(words, w));
      };
      add(sum0, FASTMIM_SIMD(unpacklo_epi8)(low, zero));
      add(sum1, FASTMIM_SIMD(unpackhi_epi8)(low, zero));
      add(sum2, FASTMIM_SIMD(unpacklo_epi8)(high, zero));
      add(sum3, FASTMIM_SIMD(unpackhi_epi8)(high, zero));
    }
    const auto words = [&](Bytes a, Bytes b) {
      return FASTMIM_SIMD(packs_epi32)(FASTMIM_SIMD(sra_epi32)(a, shift), FASTMIM_SIMD(sra_epi32)(b, shift));
    };
    FASTMIM_STORE(out + at, FASTMIM_SIMD(packus_epi16)(words(sum0, sum1), words(sum2, sum3)));
  }
#undef FASTMIM_SIMD
#undef FASTMIM_LOAD
#undef FASTMIM_STORE
#else
  for (int64_t at = 0; at < width; at += 64) {
    int32_t sum[64];
    std::fill_n(sum, 64, half);
    for (int64_t p = 0; p < to.pairs; ++p) {
      const int32_t w = weight[p * to.size], low = int16_t(w), high = w >> 16;
      const uint8_t *a = rows[2 * p] + at, *b = rows[2 * p + 1] + at;
      for (int i = 0; i < 64; ++i) sum[i] += a[i] * low + b[i] * high;
    }
    for (int i = 0; i < 64; ++i) out[at + i] = uint8_t(std::clamp(sum[i] >> to.shift, 0, 255));
  }
#endif
}

// A crop, whole or some of its patches. Each patch is resampled alone, from a ring of rows that the horizontal pass has
// made; the whole crop is one patch. Returns the number of pixels that both passes made.
static int64_t resample(const Resample& args) {
  char* memory = args.scratch;
  // vectors of the horizontal pass are of four pixels and may begin at any
  const Weights across = resample_weights(args.width, args.out_width, args.out_width + 4, 4, args.flip, memory);
  const Weights down = resample_weights(args.height, args.out_height, args.out_height, 1, false, memory);
  const int64_t width = args.patch_width, bytes = 3 * width, stride = (bytes + 127) / 64 * 64;
  int64_t ring = 1;
  while (ring < 2 * down.pairs) ring *= 2;
  uint8_t* made = scratch_of<uint8_t>(memory, ring * stride);
  uint8_t* line = scratch_of<uint8_t>(memory, stride);
  uint8_t* edge = scratch_of<uint8_t>(memory, 3 * args.width + 12 * across.pairs + 64);
  const uint8_t** rows = scratch_of<const uint8_t*>(memory, 2 * down.pairs);
  const int64_t columns = args.out_width / width, area = args.patch_height * width;
  int64_t pixels = 0;
  for (int64_t k = 0; k < args.count; ++k) {
    const int64_t id = args.ids == nullptr ? k : args.ids[k];
    const int64_t top = id / columns * args.patch_height, left = id % columns * width;
    // of a row, the bytes that the windows of this patch reach
    const int64_t last = std::max(across.first[left], across.first[left + (width + 3) / 4 * 4 - 1]);
    const int64_t reach = 3 * (last + 4 * ((across.pairs + 1) / 2 - 1)) + 16;
    int64_t next = down.first[top];
    for (int64_t y = top; y < top + args.patch_height; ++y) {
      const int64_t first = down.first[y], beyond = first + down.count[y];
      for (; next < beyond; ++next, pixels += width) {
        const uint8_t* row = args.source + next * args.row;
        if (args.end - row < reach) {
          std::copy(row, row + 3 * args.width, edge);
          row = edge;
        }
        resample_row(row, across, left, left + width, made + (next & (ring - 1)) * stride);
      }
      for (int64_t j = 0; j < 2 * down.pairs; ++j)
        rows[j] = made + (std::min(first + j, beyond - 1) & (ring - 1)) * stride;
      uint8_t* out = args.out + (k * args.patch_height + y - top) * bytes;
      // up to 63 bytes past the row are written: those of the next one, which follows
      const bool direct = !args.planar && bytes >= 64 && y + 1 < args.out_height;
      uint8_t* to = direct ? out : line;
      resample_column(rows, down, y, bytes, to);
      if (args.planar) {
        uint8_t* plane = args.out + k * 3 * area + (y - top) * width;
        for (int64_t x = 0; x < width; ++x) {
          for (int c = 0; c < 3; ++c) plane[c * area + x] = line[3 * x + c];
        }
      } else if (!direct) {
        std::copy(line, line + bytes, out);
      }
      pixels += width;
    }
  }
  return pixels;
}
