// Random masking by rank: a token's rank is the number of smaller noises in its row, ties by index.

// unsigned integers in the order of floats; both zeros are one
FASTMIM_HD uint32_t ordered(float value) {
  const uint32_t bits = bits_of(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// order[r] = index of rank r, by a stable radix sort of `keys`, which it leaves in disorder; `spare` is as long as both
static void sort_by_key(uint32_t* keys, int64_t count, int32_t* order, uint32_t* spare_keys, int32_t* spare_order) {
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  for (int shift = 0; shift < 32; shift += 8) {
    int32_t place[257] = {0};
    for (int64_t i = 0; i < count; ++i) ++place[(keys[i] >> shift & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) place[digit + 1] += place[digit];
    for (int64_t i = 0; i < count; ++i) {
      const int32_t to = place[keys[i] >> shift & 255]++;
      spare_keys[to] = keys[i];
      spare_order[to] = order[i];
    }
    std::swap(keys, spare_keys);
    std::swap(order, spare_order);
  }
}

static void random_masking(const Masking& args, int64_t begin, int64_t end) {
  const int64_t count = args.num_patches;
  Scratch memory;
  float* noise = memory.take(count + 4);
  uint32_t *keys = reinterpret_cast<uint32_t*>(memory.take(count + 4)),
           *spare_keys = reinterpret_cast<uint32_t*>(memory.take(count));
  int32_t *order = reinterpret_cast<int32_t*>(memory.take(count)),
          *spare_order = reinterpret_cast<int32_t*>(memory.take(count));
  for (int64_t b = begin; b < end; ++b) {
    if (args.noise.data != nullptr) {
      load_row(args.noise.type, at(args.noise, b * args.noise.stride[0]), args.noise.stride[1], noise, count);
      for (int64_t i = 0; i < count; ++i) keys[i] = ordered(noise[i]);
    } else {
      for (int64_t i = 0; i < (count + 3) / 4; ++i) {
        philox(static_cast<uint64_t>(args.seeds[b]), static_cast<uint32_t>(i), keys + 4 * i);
      }
    }
    sort_by_key(keys, count, order, spare_keys, spare_order);
    const int64_t last = args.len_keep + args.len_predict;
    for (int64_t rank = 0; rank < count; ++rank) args.ids_restore[b * count + order[rank]] = rank;
    for (int64_t rank = 0; rank < args.len_keep; ++rank) args.ids_keep[b * args.len_keep + rank] = order[rank];
    for (int64_t rank = args.len_keep; rank < last; ++rank) {
      args.ids_predict[b * args.len_predict + rank - args.len_keep] = order[rank];
    }
  }
}
