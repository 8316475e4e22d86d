// Random masking by rank: a token's rank is the number of smaller noises in its row, ties by index.

// integers in the order of floats; both zeros are one
FASTMIM_HD int32_t ordered(float value) {
  const int32_t bits = static_cast<int32_t>(bits_of(value + 0.0f));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// rank[i] = how many keys come before key i, by comparing all with all; both arrays are padded to whole vectors
static void rank_by_count(int32_t* keys, int64_t count, int32_t* rank) {
  const int64_t end = padded(count);
  std::fill(keys + count, keys + end, INT32_MAX);  // not smaller than any key
  Int lane;
  for (int n = 0; n < VL; ++n) lane[n] = n;
  for (int64_t i = 0; i < end; i += VL) {
    const Int own = load(keys + i);
    Int before = {};
#pragma GCC unroll 8
    for (int64_t j = 0; j < i; ++j) before -= keys[j] <= own;
    for (int n = 0; n < VL; ++n) before -= (keys[i + n] < own) | ((keys[i + n] == own) & (lane > n));
#pragma GCC unroll 8
    for (int64_t j = i + VL; j < count; ++j) before -= keys[j] < own;
    store(rank + i, before);
  }
}

// the same for long rows, by a stable radix sort of `keys`, which it leaves in disorder; the spares are as long as both
static void rank_by_sort(int32_t* keys, int64_t count, int32_t* rank, int32_t* order, int32_t* spare_keys,
                         int32_t* spare_order) {
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  for (int shift = 0; shift < 32; shift += 8) {
    const int32_t sign = shift == 24 ? 128 : 0;
    int32_t place[257] = {0};
    for (int64_t i = 0; i < count; ++i) ++place[((keys[i] >> shift & 255) ^ sign) + 1];
    for (int digit = 0; digit < 256; ++digit) place[digit + 1] += place[digit];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t to = place[(keys[i] >> shift & 255) ^ sign]++;
      spare_keys[to] = keys[i];
      spare_order[to] = order[i];
    }
    std::swap(keys, spare_keys);
    std::swap(order, spare_order);
  }
  for (int64_t i = 0; i < count; ++i) rank[order[i]] = static_cast<int32_t>(i);
}

static bool random_masking(const Masking& args, int64_t begin, int64_t end) {
  const int64_t count = args.num_patches;
  Scratch memory;
  float* noise = memory.take(count);
  int32_t *keys = reinterpret_cast<int32_t*>(memory.take(padded(count) + 4)),
          *rank = reinterpret_cast<int32_t*>(memory.take(padded(count))),
          *order = reinterpret_cast<int32_t*>(memory.take(count)),
          *spare_keys = reinterpret_cast<int32_t*>(memory.take(count)),
          *spare_order = reinterpret_cast<int32_t*>(memory.take(count));
  int32_t bad = 0;
  for (int64_t b = begin; b < end; ++b) {
    if (args.noise.data != nullptr) {
      load_row(args.noise.type, at(args.noise, b * args.noise.stride[0]), args.noise.stride[1], noise, count);
      for (int64_t i = 0; i < count; ++i) {
        keys[i] = ordered(noise[i]);
        bad |= noise[i] != noise[i];
      }
    } else {
      for (int64_t i = 0; i < (count + 3) / 4; ++i) {
        uint32_t words[4];
        philox(static_cast<uint64_t>(args.seeds[b]), static_cast<uint32_t>(i), words);
        for (int n = 0; n < 4; ++n) keys[4 * i + n] = static_cast<int32_t>(words[n] ^ 0x80000000u);
      }
    }
    if (count <= 32 * VL) {
      rank_by_count(keys, count, rank);
    } else {
      rank_by_sort(keys, count, rank, order, spare_keys, spare_order);
    }
    for (int64_t i = 0; i < count; ++i) order[rank[i]] = static_cast<int32_t>(i);
    std::copy_n(rank, count, args.ids_restore + b * count);
    std::copy_n(order, args.len_keep, args.ids_keep + b * args.len_keep);
    std::copy_n(order + args.len_keep, args.len_predict, args.ids_predict + b * args.len_predict);
  }
  return bad == 0;
}
