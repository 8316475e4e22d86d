#include "resample.h"

#include <omp.h>

#include <atomic>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fastmim::cpu {

namespace py = pybind11;

namespace {

// Memory that Python owns, contiguous, or only its rows: the axes from `first` on
py::buffer_info contiguous(const char* name, const py::buffer& buffer, int64_t item, bool writable = false,
                           int64_t first = 0) {
  py::buffer_info info = buffer.request(writable);
  bool dense = info.itemsize == item;
  for (int64_t axis = info.ndim - 1, step = item; axis >= first; step *= info.shape[axis--])
    dense &= info.shape[axis] < 2 || info.strides[axis] == step;
  TORCH_CHECK_VALUE(dense, name, " must be contiguous, of ", item, " bytes a value");
  return info;
}

// Bytes of scratch, rounded up generously. The weights of an axis are computed in memory that is used for those of the
// next one, and then for the copies.
int64_t scratch_bytes(const Resample& args) {
  const auto computing = [](int64_t in, int64_t out) { return 8 * (resample_taps(in, out) + 2) * out; };
  const int64_t rows = resample_rows_held(args.height, args.out_height), size = args.out_width + kResampleMargin;
  const int64_t taps = resample_taps(args.width, args.out_width);
  return computing(args.width, args.out_width) + computing(args.height, args.out_height) +
         (8 + 8 * (taps + 1) + 12) * size + (rows + kResampleLines) * resample_stride(args.patch_width) +
         3 * args.width + 3 * taps + 20 * 64;
}

// Weights by the sizes of the input and of the output. Crops of a dataset have few sizes, and computing the weights of
// one takes as long as resampling ten patches.
class Tables {
 public:
  // valid until clear_if_large()
  char* find(int64_t in, int64_t out) {
    const int64_t size = out + kResampleMargin, bytes = 4 * size * (2 + (resample_taps(in, out) + 1) / 2) + 4 * 64;
    std::vector<char>& table = tables_[{in, out}];
    if (table.empty()) {
      table.resize(bytes);
      held_ += bytes;
    }
    return table.data();
  }
  void clear_if_large() {
    if (held_ < kMost) return;
    tables_.clear();
    held_ = 0;
  }

 private:
  static constexpr int64_t kMost = 1 << 22;
  std::map<std::pair<int64_t, int64_t>, std::vector<char>> tables_;
  int64_t held_ = 0;
};

struct Threads {
  explicit Threads(int wanted) : before(at::get_num_threads()) { omp_set_num_threads(wanted); }
  ~Threads() { omp_set_num_threads(before); }
  int before;
};

}  // namespace

int64_t resample(const py::list& sources, const py::buffer& boxes, const py::object& ids, const py::buffer& out,
                 int64_t height, int64_t width, int64_t patch_height, int64_t patch_width, int threads) {
  std::vector<py::buffer_info> memory;
  for (const py::handle& source : sources) memory.push_back(contiguous("source", source.cast<py::buffer>(), 1));
  const py::buffer_info box_info = contiguous("boxes", boxes, 8), target = contiguous("out", out, 1, true, 1);
  constexpr int64_t kBox = 6;
  const bool whole = ids.is_none();
  py::buffer_info patches;
  if (!whole) patches = contiguous("ids", ids.cast<py::buffer>(), 8);
  TORCH_CHECK_VALUE(box_info.ndim == 2 && box_info.shape[1] == kBox && (whole || patches.ndim == 2),
                    "boxes must be (n, 6), and ids (n, k)");
  TORCH_CHECK_VALUE(height > 0 && width > 0 && patch_height > 0 && patch_width > 0 && threads > 0 &&
                        height % patch_height == 0 && width % patch_width == 0,
                    "sizes must be positive, and patches must divide the crop");
  const int64_t crops = box_info.shape[0], limit = height / patch_height * (width / patch_width),
                count = whole ? limit : patches.shape[1], bytes = count * patch_height * patch_width * 3;
  TORCH_CHECK_VALUE(target.size == crops * bytes && (whole ? limit == 1 : patches.shape[0] == crops), "out must have ",
                    crops * bytes, " bytes, got ", target.size);
  const int64_t step = crops > 1 && target.ndim > 0 ? target.strides[0] : bytes;
  TORCH_CHECK_VALUE(step >= bytes, "rows of out must not overlap");
  std::vector<Resample> all(crops);
  for (int64_t i = 0; i < crops; ++i) {
    const int64_t* box = static_cast<const int64_t*>(box_info.ptr) + i * kBox;
    const int64_t place = box[0], start = box[1], row = box[2], rows = box[3], columns = box[4];
    TORCH_CHECK_VALUE(0 <= place && place < int64_t(memory.size()) && rows > 0 && columns > 0 && start >= 0 &&
                          row >= 3 * columns && start + (rows - 1) * row + 3 * columns <= memory[place].size,
                      "boxes must lie within their sources; box ", i, " does not");
    const uint8_t* source = static_cast<const uint8_t*>(memory[place].ptr);
    const int64_t* id = whole ? nullptr : static_cast<const int64_t*>(patches.ptr) + i * count;
    for (int64_t k = 0; !whole && k < count; ++k)
      TORCH_CHECK_VALUE(0 <= id[k] && id[k] < limit, "ids must be in 0..", limit - 1, "; got ", id[k]);
    all[i] = {source + start,
              source + memory[place].size,
              row,
              columns,
              rows,
              width,
              height,
              box[5] != 0,
              patch_width,
              patch_height,
              count,
              id,
              !whole,
              static_cast<uint8_t*>(target.ptr) + i * step,
              nullptr,
              nullptr,
              nullptr};
  }
  const py::gil_scoped_release release;
  std::atomic<int64_t> pixels = 0;
  const auto run = [&](int64_t begin, int64_t end) {
    thread_local std::vector<char> scratch;
    thread_local Tables tables;
    for (int64_t i = begin; i < end; ++i) {
      const size_t needed = scratch_bytes(all[i]);
      if (scratch.size() < needed) scratch.resize(needed);
      tables.clear_if_large();
      all[i].across = tables.find(all[i].width, all[i].out_width);
      all[i].down = tables.find(all[i].height, all[i].out_height);
      all[i].scratch = scratch.data();
      pixels += kernels().resample(all[i]);
    }
  };
  if (threads == 1 || crops < 2) {
    run(0, crops);
  } else {
    const Threads guard(threads);
    at::parallel_for(0, crops, 1, run);
  }
  return pixels;
}

}  // namespace fastmim::cpu
