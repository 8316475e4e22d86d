// Kernels with one fault each, that the runner has to find; kernel 0 has none.
#include <torch/library.h>

#include "../../../csrc/cuda/device.h"
#include "tensors.h"

namespace fastmim::cuda {

namespace {

struct Fault {
  std::string name;
  float* data;
  int64_t count;
};

void faulty_kernel(Fault args) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const std::string& name = args.name;
  const int t = thread();
  if (name == "none") {
    store(shared + t, load(args.data + t));
    sync_block();
    store(args.data + t, load(shared + 63 - t));
  } else if (name == "tensor overrun") {
    load(args.data + args.count);
  } else if (name == "tensor misaligned") {
    load(reinterpret_cast<const Words*>(args.data + 1));
  } else if (name == "shared overrun") {
    store(shared + 64, 1.0f);
  } else if (name == "never written") {
    load(shared + t);
  } else if (name == "no barrier between warps") {
    store(shared + t, 1.0f);
    sync_warp();
    load(shared + 63 - t);
  } else if (name == "no barrier between lanes") {
    store(shared + t, 1.0f);
    load(shared + (t ^ 1));
  } else if (name == "written while read") {
    store(shared + t, 1.0f);
    sync_block();
    load(shared + 63 - t);
    store(shared + t, 2.0f);
  } else if (name == "copy not awaited") {
    if (t < 16) copy_async(shared + 4 * t, args.data, true);
    sync_block();
    load(shared + 4);
  } else if (name == "copy never awaited") {
    if (t == 0) copy_async(shared, args.data, true);
  } else if (name == "lanes apart") {
    if (t % 2) sync_warp();
    if (t % 2 == 0) from_lane(1.0f, 1);
  } else if (name == "barrier not reached by all") {
    if (t < 32) sync_block();
  } else if (name == "plain pointer") {
    float value = 0;
    load(&value);
  }
}

at::Tensor faulty(const std::string& name, at::Tensor data) {
  const Place place(data);
  launch("faulty", faulty_kernel, {1, 64, 256}, place.stream,
         Fault{name, static_cast<float*>(address(data)), data.numel()});
  return data;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmim_host, library) {
  library.def("faulty", faulty);
  library.def("set_shared_limit", [](int64_t bytes) { host::set_shared_limit(bytes); });
}

}  // namespace fastmim::cuda
