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

// The lines of a channel within a patch, all its axes but the last, in two loops.
struct Lines {
  int64_t frames, frame_stride, lines, line_stride, width, step;
};

FASTMIM_HD Lines lines_of(const Patches& p) {
  const int last = p.axes - 1;
  return {last == 2 ? p.patch[0] : 1,
          last == 2 ? p.stride[0] : 0,
          last > 0 ? p.patch[last - 1] : 1,
          last > 0 ? p.stride[last - 1] : 0,
          p.patch[last],
          p.stride[last]};
}

// Patches that are read together: `start[i]` is the first pixel of patch i in each channel, `out[i]` its first value.
struct Group {
  int64_t count;
  const int64_t* start;
  float* const* out;
};

// run(a line's first pixel, its first value) for the lines of a channel of each patch; the values of a channel start
// at `offset` from those of the patch, and are `value_step` apart
template <typename T, typename Run>
FASTMIM_HD void by_lines(const Group& group, const Lines of, const T* channel, int64_t offset, int64_t value_step,
                         const Run& run) {
  const Group patches = group;
  if (of.frames * of.lines == 1) {
    for (int64_t i = 0; i < patches.count; ++i) run(channel + patches.start[i], patches.out[i] + offset);
    return;
  }
  for (int64_t patch = 0; patch < patches.count; ++patch) {
    const T* frame = channel + patches.start[patch];
    float* out = patches.out[patch] + offset;
    for (int64_t i = 0; i < of.frames; ++i, frame += of.frame_stride) {
      const T* line = frame;
      for (int64_t j = 0; j < of.lines; ++j, line += of.line_stride, out += of.width * value_step) run(line, out);
    }
  }
}

// Normalises lines of at least VL neighbouring pixels to neighbouring values. A line's last vector ends with it: one
// that the compiler makes of T is longer than most lines. WIDTH is that of the lines where it is known.
template <bool PLAIN, int64_t WIDTH, typename T>
__attribute__((noinline)) static void read_dense(const Group& group, Lines of, const T* channel, int64_t offset,
                                                 float mean, float std) {
  const Vec shift = splat(mean), deviation = splat(std);
  if (WIDTH > 0) of.width = WIDTH;
  const int64_t last = of.width - VL;
  by_lines(group, of, channel, offset, 1, [&](const T* from, float* to) FASTMIM_STEP {
    const auto step = [&](int64_t i) FASTMIM_STEP {
      const Vec value = pixels(from + i);
      store(to + i, PLAIN ? value : (value - shift) / deviation);
    };
    for (int64_t i = 0; i < last; i += VL) step(i);
    step(last);
  });
}

// normalised values of channel c: value i is written at `offset` + i * value_step from those of the patch
template <typename T>
static void read_channel(const Patches& p, const Lines& of, int64_t c, const Group& group, int64_t offset,
                         int64_t value_step) {
  const T* channel = static_cast<const T*>(p.images) + c * p.channel_stride;
  const float mean = p.mean[c], std = p.std[c];
  const bool plain = mean == 0 && std == 1;
  if (of.step == 1 && value_step == 1 && of.width >= VL) {
    if (plain) return read_dense<true, 0>(group, of, channel, offset, mean, std);
    if (of.width == 16) return read_dense<false, 16>(group, of, channel, offset, mean, std);
    return read_dense<false, 0>(group, of, channel, offset, mean, std);
  }
  by_lines(group, of, channel, offset, value_step, [&](const T* from, float* to) FASTMIM_STEP {
    if constexpr (std::is_same_v<T, float>) {
      if (of.step == 1 && value_step == 1 && plain) {
        __builtin_memcpy(to, from, of.width * sizeof(float));
        return;
      }
    }
    if constexpr (sizeof(T) == 1) {
      const float* table = p.table + c * 256;
      for (int64_t i = 0; i < of.width; ++i) to[i * value_step] = table[from[i * of.step]];
    } else {
      for (int64_t i = 0; i < of.width; ++i) to[i * value_step] = (pixel(from[i * of.step]) - mean) / std;
    }
  });
}

// normalised values: value i of channel c is written at c * channel_step + i * value_step from those of the patch
static void read_patches(const Patches& p, const Group& group, int64_t channel_step, int64_t value_step) {
  const Lines of = lines_of(p);
  const auto read = [&](auto stored) {
    for (int64_t c = 0; c < p.channels; ++c)
      read_channel<decltype(stored)>(p, of, c, group, c * channel_step, value_step);
  };
  if (p.pixels == Pixels::uint8) return read(uint8_t());
  if (p.pixels == Pixels::uint16) return read(uint16_t());
  in_type(p.type, read);
}

static void read_patch(const Patches& p, int64_t start, float* out, int64_t channel_step, int64_t value_step) {
  read_patches(p, {1, &start, &out}, channel_step, value_step);
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
  // a channel of several patches at a time: its pixels are near each other
  constexpr int64_t kGroup = 32;
  const Patches& p = args.patches;
  const int64_t values = patch_values(p), most = written_in_place(args.out) ? kGroup : 1;
  Scratch memory;
  float *scratch = memory.take(values), *out[kGroup];
  int64_t start[kGroup];
  for (int64_t row = begin; row < end; row += most) {
    const int64_t count = std::min(most, end - row);
    for (int64_t i = 0; i < count; ++i) {
      start[i] = patch_start(p, (row + i) / args.rows, args.ids[row + i]);
      out[i] = target_of(args.out, row + i, scratch);
    }
    read_patches(p, {count, start, out}, values / p.channels, 1);
    if (most == 1) finish(args.out, row, values, scratch);
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
