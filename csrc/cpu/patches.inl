// Patches read from an image in place, and written back to one.

// VL pixels before mean and deviation, as `pixel`
template <typename T>
FASTMIM_HD Vec pixels(const T* from) {
  const Vec value = load(from);
  if constexpr (!std::is_integral_v<T>) return value;
  // x / 255 and x / 65535 for every x of the type, bit by bit: the first product is exact
  constexpr float most = sizeof(T) == 1 ? 0x1.01p-8f : 0x1p-16f,
                  rest = sizeof(T) == 1 ? 0x1.010102p-24f : 0x1.0001p-32f;
  return value * most + value * rest;
}

// normalised values: value i of channel c is written to out[c * channel_step + i * value_step]
template <typename T>
FASTMIM_HD void read_patch_as(const Patches& p, int64_t start, float* out, int64_t channel_step, int64_t value_step) {
  const T* image = static_cast<const T*>(p.images) + start;
  const int64_t width = p.patch[p.axes - 1], step = p.stride[p.axes - 1], lines = patch_area(p) / width;
  for (int64_t c = 0; c < p.channels; ++c) {
    const Vec mean = splat(p.mean[c]), std = splat(p.std[c]);
    const bool plain = p.mean[c] == 0 && p.std[c] == 1;
    for (int64_t line = 0; line < lines; ++line) {
      const T* source = image + patch_line(p, c, line);
      float* target = out + c * channel_step + line * width * value_step;
      // a vector that the compiler makes of T is longer than most lines; the last one here ends with the line
      if (step == 1 && value_step == 1 && width >= VL) {
        for (int64_t i = 0; i < width; i += VL) {
          const int64_t first = i < width - VL ? i : width - VL;
          const Vec value = pixels(source + first);
          store(target + first, plain ? value : (value - mean) / std);
        }
        continue;
      }
      if constexpr (std::is_same_v<T, float>) {
        if (step == 1 && value_step == 1 && plain) {
          __builtin_memcpy(target, source, width * sizeof(float));
          continue;
        }
      }
      if constexpr (sizeof(T) == 1) {
        const float* table = p.table + c * 256;
        for (int64_t i = 0; i < width; ++i) target[i * value_step] = table[source[i * step]];
      } else {
        for (int64_t i = 0; i < width; ++i) target[i * value_step] = (pixel(source[i * step]) - p.mean[c]) / p.std[c];
      }
    }
  }
}

static void read_patch(const Patches& p, int64_t start, float* out, int64_t channel_step, int64_t value_step) {
  if (p.pixels == Pixels::uint8) return read_patch_as<uint8_t>(p, start, out, channel_step, value_step);
  if (p.pixels == Pixels::uint16) return read_patch_as<uint16_t>(p, start, out, channel_step, value_step);
  if (p.type == Type::f32) return read_patch_as<float>(p, start, out, channel_step, value_step);
  if (p.type == Type::bf16) return read_patch_as<Bf16>(p, start, out, channel_step, value_step);
  return read_patch_as<F16>(p, start, out, channel_step, value_step);
}

// Prefetches the lines of a patch: they are too far apart in the image for the hardware to do so.
static void prefetch_patch(const Patches& p, int64_t start) {
  const int64_t size = p.pixels == Pixels::uint8 ? 1 : p.pixels == Pixels::floating && p.type == Type::f32 ? 4 : 2;
  const char* image = static_cast<const char*>(p.images) + start * size;
  const int64_t width = p.patch[p.axes - 1], lines = patch_area(p) / width;
  const int64_t last = (width - 1) * p.stride[p.axes - 1] * size;
  // interleaved channels are in the same cache lines
  const int64_t channels = p.channel_stride * size < 64 ? 1 : p.channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t line = 0; line < lines; ++line) {
      const char* from = image + patch_line(p, c, line) * size;
      __builtin_prefetch(from);
      if (last >= 48) __builtin_prefetch(from + last);
    }
  }
}

static void gather_patches(const GatherPatches& args, int64_t begin, int64_t end) {
  const int64_t values = patch_values(args.patches), area = values / args.patches.channels;
  Scratch memory;
  float* scratch = memory.take(values);
  for (int64_t row = begin; row < end; ++row) {
    float* out = target_of(args.out, row, scratch);
    if (row + 1 < end)
      prefetch_patch(args.patches, patch_start(args.patches, (row + 1) / args.rows, args.ids[row + 1]));
    read_patch(args.patches, patch_start(args.patches, row / args.rows, args.ids[row]), out, area, 1);
    finish(args.out, row, values, scratch);
  }
}

template <typename T>
FASTMIM_HD void write_patch_as(const Patches& p, int64_t start, const float* from) {
  T* image = static_cast<T*>(const_cast<void*>(p.images)) + start;
  const int64_t width = p.patch[p.axes - 1], step = p.stride[p.axes - 1], lines = patch_area(p) / width;
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t offset = patch_line(p, c, line);
      for (int64_t i = 0; i < width; ++i) image[offset + i * step] = narrow<T>(*from++ / p.std[c]);
    }
  }
}

static void scatter_patches(const ScatterPatches& args, int64_t begin, int64_t end) {
  const Patches& p = args.patches;
  const int64_t values = patch_values(p);
  Scratch memory;
  float* scratch = memory.take(values);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / args.rows, k = row % args.rows;
    load_row(args.grad.type, at(args.grad, b * args.grad.stride[0] + k * args.grad.stride[1]), args.grad.stride[2],
             scratch, values);
    const int64_t start = patch_start(p, b, args.ids[row]);
    if (p.type == Type::f32) write_patch_as<float>(p, start, scratch);
    if (p.type == Type::bf16) write_patch_as<Bf16>(p, start, scratch);
    if (p.type == Type::f16) write_patch_as<F16>(p, start, scratch);
  }
}
