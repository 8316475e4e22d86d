// Two adjacent bf16 values in a word, and vectors of such words as the factors of a product.

struct Pair {
  Bf16 first, second;
};

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

// sum + first * first + second * second
#if defined(FASTMIM_EMULATE_BF16)
// emulation, for tests on a processor without the instruction, which takes subnormals for zeros and returns none
FASTMIM_HD Vec flushed(Vec x) {
  return (Vec)((Int)x & (((Int)x & 0x7f800000) == 0 ? 0x80000000 - Int{} : ~Int{}));
}
FASTMIM_HD Vec add_product(Vec sum, Int left, Int right) {
  const Vec first = flushed((Vec)(left << 16)) * flushed((Vec)(right << 16));
  const Vec second = flushed((Vec)(left >> 16 << 16)) * flushed((Vec)(right >> 16 << 16));
  return flushed(flushed(flushed(sum) + first) + second);
}
#else
FASTMIM_HD Vec add_product(Vec sum, Int left, Int right) {
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}
#endif

FASTMIM_HD Bf16 as_bf16(Bf16 value) {
  return value;
}
FASTMIM_HD Bf16 as_bf16(float value) {
  return narrow<Bf16>(value);
}

// words of (count / 2, columns) from rows of `ld` values, of two rows each; count even
template <typename T>
static void zip(const T* __restrict rows, int64_t ld, int64_t count, int64_t columns, Pair* __restrict to) {
  for (int64_t r = 0; r < count; r += 2, to += columns)
    for (int64_t c = 0; c < columns; ++c) to[c] = {as_bf16(rows[r * ld + c]), as_bf16(rows[(r + 1) * ld + c])};
}

// a row of bf16 as it is
FASTMIM_HD void load_row(Type, const void* from, int64_t stride, Bf16* to, int64_t count) {
  const Bf16* source = static_cast<const Bf16*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = source[i * stride];
}
