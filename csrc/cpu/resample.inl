// Bicubic, antialiased resampling of RGB bytes, in PyTorch's fixed point: a horizontal pass to bytes, then a vertical
// one.

// 16 bytes of a line are of 6 pixels, whose windows then begin within 8 of the input
static inline bool is_near(double scale) {
  return FASTMIM_VL == 16 && scale <= 1.6;
}

#if FASTMIM_VL == 16
// resample_rows, 16 bytes at a time from windows of 32; `place` holds the two words of each byte's first pair
template <int pairs>
static void resample_near(const uint8_t* rows, int64_t stride, int64_t count, const Weights& to, const int32_t* place,
                          int64_t begin, int64_t end, uint8_t* out, int64_t out_stride) {
  const __m512i half = _mm512_set1_epi32(1 << (to.shift - 1)), zero = _mm512_setzero_si512();
  const __m128i shift = _mm_cvtsi32_si128(to.shift);
  for (int64_t at = 3 * begin; at < 3 * end; at += 16) {
    const int32_t start = 3 * std::min(to.first[at / 3], to.first[(at + 15) / 3]);
    const __m512i words = _mm512_sub_epi16(_mm512_loadu_si512(place + at), _mm512_set1_epi16(int16_t(start)));
    __m512i weights[pairs];
    for (int p = 0; p < pairs; ++p) weights[p] = _mm512_loadu_si512(to.weight + p * to.stride + at);
    const uint8_t* row = rows + start;
    uint8_t* target = out + at - 3 * begin;
    for (int64_t i = 0; i < count; ++i, row += stride, target += out_stride) {
      __m512i sum = half;
      for (int p = 0; p < pairs; ++p) {
        const auto window = reinterpret_cast<const __m256i*>(row + 6 * p);
        const __m512i pixels = _mm512_cvtepu8_epi16(_mm256_loadu_si256(window));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_permutexvar_epi16(words, pixels), weights[p]));
      }
      const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_sra_epi32(sum, shift), zero));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
    }
  }
}
#endif

#if FASTMIM_VL >= 8
static inline __m256i load_two(const void* a, const void* b) {
  return _mm256_loadu2_m128i(static_cast<const __m128i*>(b), static_cast<const __m128i*>(a));
}

// resample_rows, four pixels at a time, each from windows of 16 bytes; `known` pairs, or 0
template <int known>
static void resample_far(const uint8_t* rows, int64_t stride, int64_t count, const Weights& to, int64_t begin,
                         int64_t end, uint8_t* out, int64_t out_stride) {
  const __m256i low = _mm256_broadcastsi128_si256(
                    _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1)),
                high = _mm256_broadcastsi128_si256(
                    _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
  // of the pixels 0, 2, 1 and 3
  const __m128i packed = _mm_setr_epi8(0, 1, 2, 8, 9, 10, 4, 5, 6, 12, 13, 14, -1, -1, -1, -1);
  const __m128i shift = _mm_cvtsi32_si128(to.shift);
  const __m256i half = _mm256_set1_epi32(1 << (to.shift - 1));
  const int64_t pairs = known ? known : to.pairs;
  for (int64_t row = 0; row < count; ++row, rows += stride, out += out_stride) {
    uint8_t* target = out;
    for (int64_t x = begin; x < end; x += 4, target += 12) {
      __m256i sum[2];
      for (int i = 0; i < 2; ++i) {
        const uint8_t *a = rows + 3 * to.first[x + 2 * i], *b = rows + 3 * to.first[x + 2 * i + 1];
        const int32_t* w = to.weight + 4 * (x + 2 * i);
        sum[i] = half;
        for (int64_t p = 0; p < pairs; p += 2, a += 12, b += 12) {
          const __m256i pixels = load_two(a, b), first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, low), first));
          w += to.stride;
          if (p + 1 == pairs) break;
          const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, high), second));
          w += to.stride;
        }
        sum[i] = _mm256_sra_epi32(sum[i], shift);
      }
      const __m256i words = _mm256_packs_epi32(sum[0], sum[1]);
      const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm_shuffle_epi8(bytes, packed));
    }
  }
}
#endif

// Pixels begin..end of rows of the input. Reads up to 6 * pairs + 32 bytes from the first of a pixel on, and writes up
// to 16 bytes past the last.
static void resample_rows(const uint8_t* rows, int64_t stride, int64_t count, const Weights& to, const int32_t* place,
                          int64_t begin, int64_t end, uint8_t* out, int64_t out_stride) {
#if FASTMIM_VL == 16
  if (is_near(to.scale)) {
    if (to.pairs == 1) return resample_near<1>(rows, stride, count, to, place, begin, end, out, out_stride);
    if (to.pairs == 2) return resample_near<2>(rows, stride, count, to, place, begin, end, out, out_stride);
    if (to.pairs == 3) return resample_near<3>(rows, stride, count, to, place, begin, end, out, out_stride);
    return resample_near<4>(rows, stride, count, to, place, begin, end, out, out_stride);
  }
#endif
#if FASTMIM_VL >= 8
  if (to.pairs == 2) return resample_far<2>(rows, stride, count, to, begin, end, out, out_stride);
  if (to.pairs == 3) return resample_far<3>(rows, stride, count, to, begin, end, out, out_stride);
  if (to.pairs == 4) return resample_far<4>(rows, stride, count, to, begin, end, out, out_stride);
  return resample_far<0>(rows, stride, count, to, begin, end, out, out_stride);
#else
  for (int64_t row = 0; row < count; ++row, rows += stride, out += out_stride) {
    for (int64_t x = begin; x < end; ++x) {
      const uint8_t* pixel = rows + 3 * to.first[x];
      int32_t sum[3];
      std::fill_n(sum, 3, 1 << (to.shift - 1));
      for (int64_t p = 0; p < to.pairs; ++p, pixel += 6) {
        const int32_t w = to.weight[p * to.stride + 4 * x];
        for (int c = 0; c < 3; ++c) sum[c] += pixel[c] * int16_t(w) + pixel[3 + c] * (w >> 16);
      }
      for (int c = 0; c < 3; ++c) out[3 * (x - begin) + c] = uint8_t(std::clamp(sum[c] >> to.shift, 0, 255));
    }
  }
#endif
}

#if FASTMIM_VL == 16
using Bytes = __m512i;
#define FASTMIM_SIMD(name) _mm512_##name
static inline Bytes load_bytes(const uint8_t* at) {
  return _mm512_loadu_si512(at);
}
static inline void store_bytes(uint8_t* at, Bytes value) {
  _mm512_storeu_si512(at, value);
}
#elif FASTMIM_VL == 8
using Bytes = __m256i;
#define FASTMIM_SIMD(name) _mm256_##name
static inline Bytes load_bytes(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const Bytes*>(at));
}
static inline void store_bytes(uint8_t* at, Bytes value) {
  _mm256_storeu_si256(reinterpret_cast<Bytes*>(at), value);
}
#endif

// Lines begin..end of `bytes` each, from rows of which the first is number `start`. Reads and writes up to a multiple
// of 64 bytes.
static void resample_lines(const uint8_t* rows, int64_t stride, int64_t start, const Weights& to, int64_t begin,
                           int64_t end, int64_t bytes, uint8_t* out, int64_t out_stride) {
  const int32_t half = 1 << (to.shift - 1);
#ifdef FASTMIM_SIMD
  const Bytes zero = FASTMIM_SIMD(set1_epi32)(0);
  const __m128i shift = _mm_cvtsi32_si128(to.shift);
#endif
  for (int64_t y = begin; y < end; ++y, out += out_stride) {
    const uint8_t* first = rows + (to.first[y] - start) * stride;
    const int32_t* weight = to.weight + y;
#ifdef FASTMIM_SIMD
    for (int64_t at = 0; at < bytes; at += sizeof(Bytes)) {
      Bytes sum0 = FASTMIM_SIMD(set1_epi32)(half), sum1 = sum0, sum2 = sum0, sum3 = sum0;
      const uint8_t* row = first + at;
      for (int64_t p = 0; p < to.pairs; ++p, row += 2 * stride) {
        const Bytes w = FASTMIM_SIMD(set1_epi32)(weight[p * to.stride]);
        const Bytes a = load_bytes(row), b = load_bytes(row + stride);
        const Bytes low = FASTMIM_SIMD(unpacklo_epi8)(a, b), high = FASTMIM_SIMD(unpackhi_epi8)(a, b);
#define FASTMIM_ADD(sum, words) sum = FASTMIM_SIMD(add_epi32)(sum, FASTMIM_SIMD(madd_epi16)(words, w))
        FASTMIM_ADD(sum0, FASTMIM_SIMD(unpacklo_epi8)(low, zero));
        FASTMIM_ADD(sum1, FASTMIM_SIMD(unpackhi_epi8)(low, zero));
        FASTMIM_ADD(sum2, FASTMIM_SIMD(unpacklo_epi8)(high, zero));
        FASTMIM_ADD(sum3, FASTMIM_SIMD(unpackhi_epi8)(high, zero));
#undef FASTMIM_ADD
      }
      sum0 = FASTMIM_SIMD(sra_epi32)(sum0, shift), sum1 = FASTMIM_SIMD(sra_epi32)(sum1, shift);
      sum2 = FASTMIM_SIMD(sra_epi32)(sum2, shift), sum3 = FASTMIM_SIMD(sra_epi32)(sum3, shift);
      const Bytes low = FASTMIM_SIMD(packs_epi32)(sum0, sum1), high = FASTMIM_SIMD(packs_epi32)(sum2, sum3);
      store_bytes(out + at, FASTMIM_SIMD(packus_epi16)(low, high));
    }
#else
    for (int64_t at = 0; at < bytes; at += 64) {
      int32_t sum[64];
      std::fill_n(sum, 64, half);
      const uint8_t* row = first + at;
      for (int64_t p = 0; p < to.pairs; ++p, row += 2 * stride) {
        const int32_t w = weight[p * to.stride], low = int16_t(w), high = w >> 16;
        for (int i = 0; i < 64; ++i) sum[i] += row[i] * low + row[stride + i] * high;
      }
      for (int i = 0; i < 64; ++i) out[at + i] = uint8_t(std::clamp(sum[i] >> to.shift, 0, 255));
    }
#endif
  }
}

// lines (height, width, 3) as planes (3, height, width)
static void deinterleave(const uint8_t* lines, int64_t stride, int64_t height, int64_t width, int64_t plane,
                         int64_t room, uint8_t* out) {
#if FASTMIM_VL >= 8
  // byte i of a plane is byte 3 * i + c of 48, of which each shuffle finds those in its own 16
  __m128i found[3][3];
  const __m128i at = _mm_setr_epi8(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
  for (int c = 0; c < 3; ++c) {
    for (int part = 0; part < 3; ++part) {
      const __m128i place = _mm_add_epi8(at, _mm_set1_epi8(char(c - 16 * part)));
      found[c][part] = _mm_or_si128(place, _mm_cmpgt_epi8(place, _mm_set1_epi8(15)));
    }
  }
#endif
  for (int64_t y = 0; y < height; ++y, lines += stride, out += width) {
    int64_t x = 0;
#if FASTMIM_VL >= 8
    // what is written past a line is overwritten by the next one
    const int64_t end = std::min(width, (height - y) * width + room - 15);
    for (; x < end; x += 16) {
      const __m128i* from = reinterpret_cast<const __m128i*>(lines + 3 * x);
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), d = _mm_loadu_si128(from + 2);
      for (int c = 0; c < 3; ++c) {
        const __m128i bytes =
            _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, found[c][0]), _mm_shuffle_epi8(b, found[c][1])),
                         _mm_shuffle_epi8(d, found[c][2]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * plane + x), bytes);
      }
    }
#endif
    for (; x < width; ++x) {
      for (int c = 0; c < 3; ++c) out[c * plane + x] = lines[3 * x + c];
    }
  }
}

// Fetch into the second cache the pixels under a part of the result. A function that only fetches has no effect that
// GCC knows of, and calls of it would be removed.
__attribute__((always_inline)) static inline void resample_fetch(const Resample& args, const Weights& across,
                                                                 const Weights& down, int64_t left, int64_t width,
                                                                 int64_t top, int64_t height) {
  const int64_t right = left + width - 1, bottom = top + height - 1;
  const int64_t begin = 3 * std::min(across.first[left], across.first[right]),
                last = 3 * std::max(across.first[left] + across.count[left], across.first[right] + across.count[right]);
  const char* row = reinterpret_cast<const char*>(args.source + down.first[top] * args.row);
  for (int64_t i = down.first[top]; i < down.first[bottom] + down.count[bottom]; ++i, row += args.row) {
    for (int64_t at = begin; at < last; at += 64) __builtin_prefetch(row + at, 0, 2);
    __builtin_prefetch(row + last - 1, 0, 2);
  }
}

// A crop, whole or some of its patches. Each patch is resampled alone; the whole crop is one patch. It is made a few
// lines at a time, from rows that the horizontal pass has made. Returns the number of pixels that both passes made.
static int64_t resample(const Resample& args) {
  char* memory = args.scratch;
  const int64_t copies = is_near(double(args.width) / double(args.out_width)) ? 3 : 4;
  const Weights down = resample_weights(args.height, args.out_height, args.down, memory);
  const Weights once = resample_weights(args.width, args.out_width, args.across, memory);
  const Weights across = resample_copied(once, copies, args.flip, memory);
  int32_t* place = scratch_of<int32_t>(memory, 3 * (args.out_width + kResampleMargin));
  for (int64_t x = 0; x < args.out_width + kResampleMargin; ++x) {
    for (int c = 0; c < 3; ++c) {
      const uint32_t byte = 3 * across.first[x] + c;
      place[3 * x + c] = int32_t((byte & 0xFFFF) | (byte + 3) << 16);
    }
  }
  const int64_t width = args.patch_width, bytes = 3 * width, stride = resample_stride(width);
  const int64_t reads = 6 * across.pairs + 32, most = resample_rows_held(args.height, args.out_height);
  uint8_t* made = scratch_of<uint8_t>(memory, most * stride);
  uint8_t* lines = scratch_of<uint8_t>(memory, kResampleLines * stride);
  uint8_t* edge = scratch_of<uint8_t>(memory, 3 * args.width + reads);
  const int64_t columns = args.out_width / width, area = args.patch_height * width;
  int64_t pixels = 0;
  for (int64_t k = 0, fetched = 0; k < args.count; ++k) {
    for (; args.ids != nullptr && fetched < std::min(k + 3, args.count); ++fetched) {
      const int64_t id = args.ids[fetched], top = id / columns * args.patch_height, left = id % columns * width;
      resample_fetch(args, across, down, left, width, top, args.patch_height);
    }
    const int64_t id = args.ids == nullptr ? k : args.ids[k];
    const int64_t top = id / columns * args.patch_height, left = id % columns * width, bottom = top + args.patch_height;
    const int64_t last = std::max(across.first[left], across.first[left + width + kResampleMargin - 1]);
    uint8_t* out = args.out + 3 * area * k;
    // rows start..next-1 are in `made`
    int64_t start = down.first[top], next = start;
    for (int64_t begin = top; begin < bottom; begin += kResampleLines) {
      const int64_t end = std::min(begin + kResampleLines, bottom), stop = down.first[end - 1] + down.count[end - 1];
      const int64_t kept = std::max<int64_t>(next - down.first[begin], 0);
      if (kept < next - start) std::copy_n(made + (next - start - kept) * stride, kept * stride, made);
      start = down.first[begin];
      next = std::max(next, start);
      pixels += (stop - next + end - begin) * width;
      // but for the last rows of the memory, from which more would be read than there is
      const int64_t spare = args.end - args.source - reads - 3 * last;
      const int64_t inside = std::clamp(spare < 0 ? 0 : spare / args.row + 1, next, stop);
      const auto make = [&](const uint8_t* from, int64_t row, int64_t count) {
        resample_rows(from, args.row, count, across, place, left, left + width, made + (row - start) * stride, stride);
      };
      make(args.source + next * args.row, next, inside - next);
      for (int64_t row = inside; row < stop; ++row) {
        std::copy_n(args.source + row * args.row, 3 * args.width, edge);
        make(edge, row, 1);
      }
      next = stop;
      // up to 63 bytes past a line are written: directly only where other lines follow
      const int64_t direct = args.planar ? begin : std::clamp(bottom - (63 + bytes - 1) / bytes, begin, end);
      resample_lines(made, stride, start, down, begin, direct, bytes, out + (begin - top) * bytes, bytes);
      resample_lines(made, stride, start, down, direct, end, bytes, lines, stride);
      if (args.planar) {
        deinterleave(lines, stride, end - begin, width, area, (bottom - end) * width, out + (begin - top) * width);
      } else {
        for (int64_t y = direct; y < end; ++y)
          std::copy_n(lines + (y - direct) * stride, bytes, out + (y - top) * bytes);
      }
    }
  }
  return pixels;
}
