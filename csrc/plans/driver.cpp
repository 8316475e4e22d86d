#include "driver.h"

#include <dlfcn.h>

#include <c10/util/Exception.h>

namespace fastmim::plans {
namespace {

// CUresult
using Status = int;

struct Driver {
  Status (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                   void**);
  Status (*describe)(Status, const char**);
  Status (*current)(void**);
  Status (*set_current)(void*);
  Status (*get)(int*, int);
  Status (*retain)(void**, int);
};

template <typename F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  TORCH_CHECK(function, "libcuda.so.1 has no ", name);
}

const Driver& driver() {
  static const Driver found = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    TORCH_CHECK(library, "libcuda.so.1 can't be loaded: ", dlerror());
    Driver functions{};
    find(library, "cuLaunchKernel", functions.launch);
    find(library, "cuGetErrorString", functions.describe);
    find(library, "cuCtxGetCurrent", functions.current);
    find(library, "cuCtxSetCurrent", functions.set_current);
    find(library, "cuDeviceGet", functions.get);
    find(library, "cuDevicePrimaryCtxRetain", functions.retain);
    return functions;
  }();
  return found;
}

void check(Status status, const char* what) {
  if (status == 0) return;
  const char* text = nullptr;
  driver().describe(status, &text);
  TORCH_CHECK(false, "CUDA error in ", what, ": ", text ? text : "unknown", " (", status, ")");
}

}  // namespace

void ensure_context(int device) {
  void* context = nullptr;
  check(driver().current(&context), "cuCtxGetCurrent");
  if (context) return;
  int handle = 0;
  check(driver().get(&handle, device), "cuDeviceGet");
  check(driver().retain(&context, handle), "cuDevicePrimaryCtxRetain");
  check(driver().set_current(context), "cuCtxSetCurrent");
}

void launch_kernel(Function function, const std::array<unsigned, 3>& grid, unsigned threads, unsigned shared,
                   Stream stream, void** parameters) {
  const auto& [x, y, z] = grid;
  check(driver().launch(function, x, y, z, threads, 1, 1, shared, stream, parameters, nullptr), "cuLaunchKernel");
}

}  // namespace fastmim::plans
