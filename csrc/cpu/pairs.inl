// Two adjacent bf16 values in a word, and vectors of such words as the factors of a product. Of AVX-512.

struct Pair {
  Bf16 first, second;
};

typedef uint16_t Halves __attribute__((vector_size(VL * 4)));

FASTMIM_HD Int load(const Pair* from) {
  return *reinterpret_cast<const UnalignedInt*>(from);
}
FASTMIM_HD void store(Pair* to, Int value) {
  *reinterpret_cast<UnalignedInt*>(to) = value;
}
FASTMIM_HD Int splat(Pair value) {
  int32_t word;
  memcpy(&word, &value, sizeof(word));
  return word - Int{};
}

FASTMIM_HD __mmask32 first_halves(int64_t count) {
  return count < 2 * VL ? (1u << count) - 1 : ~0u;
}
// VL words of bf16 values, of which `count` are in memory and the others 0 or not stored
FASTMIM_HD Int load_first(const Bf16* from, int64_t count) {
  return (Int)_mm512_maskz_loadu_epi16(first_halves(count), from);
}
FASTMIM_HD void store_first(Bf16* to, Int value, int64_t count) {
  _mm512_mask_storeu_epi16(to, first_halves(count), (__m512i)value);
}

#if defined(FASTMIM_EMULATE_BF16)
// emulation, for tests on a processor without the instructions, which take subnormals for zeros and return none
FASTMIM_HD Vec flushed(Vec x) {
  return (Vec)((Int)x & (((Int)x & 0x7f800000) == 0 ? 0x80000000 - Int{} : ~Int{}));
}
// sum + first * first + second * second
FASTMIM_HD Vec add_product(Vec sum, Int left, Int right) {
  const Vec first = flushed((Vec)(left << 16)) * flushed((Vec)(right << 16));
  const Vec second = flushed((Vec)(left >> 16 << 16)) * flushed((Vec)(right >> 16 << 16));
  return flushed(flushed(flushed(sum) + first) + second);
}
// 2 VL neighbours rounded to bf16
FASTMIM_HD Int narrowed(Vec low, Vec high) {
  const Half first = upper(rounded_to_bf16(flushed(low))), second = upper(rounded_to_bf16(flushed(high)));
  return (Int)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
}
#else
FASTMIM_HD Vec add_product(Vec sum, Int left, Int right) {
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}
FASTMIM_HD Int narrowed(Vec low, Vec high) {
  return (Int)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#endif

template <int FIRST, int... C>
FASTMIM_HD Halves interleaved(Halves a, Halves b, std::integer_sequence<int, C...>) {
  return __builtin_shufflevector(a, b, (FIRST + C / 2 + C % 2 * 2 * VL)...);
}

// words of (count / 2, columns) from rows of `ld` values, of two rows each; count even, columns a multiple of VL, rows
// padded to one of 2 VL
static void zip(const Bf16* rows, int64_t ld, int64_t count, int64_t columns, Pair* to) {
  constexpr auto lanes = std::make_integer_sequence<int, 2 * VL>{};
  const auto words = [](const Bf16* from) { return (Halves)load(reinterpret_cast<const Pair*>(from)); };
  for (int64_t r = 0; r < count; r += 2, to += columns)
    for (int64_t c = 0; c < columns; c += 2 * VL) {
      const Halves first = words(rows + r * ld + c), second = words(rows + (r + 1) * ld + c);
      store(to + c, (Int)interleaved<0>(first, second, lanes));
      if (c + VL < columns) store(to + c + VL, (Int)interleaved<VL>(first, second, lanes));
    }
}
