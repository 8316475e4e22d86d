// CUDA's driver without a device, for test_plans.py: keeps the launches of Triton's launcher and of plans.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { most_functions = 4096, most_parameters = 160, most_launches = 4096 };

struct launch {
  uint64_t function;
  uint32_t grid[3], block[3], shared, attributes;
  uint64_t stream;
  // 1: by cuLaunchKernel, as plans do
  int32_t plain, count;
  uint64_t parameters[most_parameters];
};

// CUlaunchConfig of CUDA's driver API
struct config {
  uint32_t grid[3], block[3], shared;
  void *stream, *attributes;
  uint32_t count;
};

static int counts[most_functions], sizes[most_functions][most_parameters];
static int functions, launches, status;
static struct launch kept[most_launches];
static _Thread_local void* current;

// ---- called by the tests --------------------------------------------------------------------------------------------

// Return the handle of a new function, whose parameters have `size` bytes each.
uint64_t stub_function(int count, const int* size) {
  counts[functions] = count;
  memcpy(sizes[functions], size, count * sizeof *size);
  return ++functions;
}

// Copy the launches since the last call; return how many they are.
int stub_take(struct launch* taken) {
  int count = launches;
  memcpy(taken, kept, count * sizeof *kept);
  launches = 0;
  return count;
}

// Let each launch that follows return `value`.
void stub_fail(int value) {
  status = value;
}

// ---- called by Triton and by plans ----------------------------------------------------------------------------------

static struct launch* keep(uint64_t function, void** parameters) {
  struct launch* launch = &kept[launches++ % most_launches];
  memset(launch, 0, sizeof *launch);
  launch->function = function;
  launch->count = counts[function - 1];
  for (int i = 0; i < launch->count; i++) memcpy(&launch->parameters[i], parameters[i], sizes[function - 1][i]);
  return launch;
}

int cuLaunchKernelEx(const struct config* config, uint64_t function, void** parameters, void** extra) {
  (void)extra;
  struct launch* launch = keep(function, parameters);
  memcpy(launch->grid, config->grid, sizeof launch->grid);
  memcpy(launch->block, config->block, sizeof launch->block);
  launch->shared = config->shared;
  launch->attributes = config->count;
  launch->stream = (uintptr_t)config->stream;
  return status;
}

int cuLaunchKernel(uint64_t function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
  (void)extra;
  // CUDA_ERROR_INVALID_CONTEXT
  if (!current) return 201;
  struct launch* launch = keep(function, parameters);
  memcpy(launch->grid, (uint32_t[3]){x, y, z}, sizeof launch->grid);
  memcpy(launch->block, (uint32_t[3]){block_x, block_y, block_z}, sizeof launch->block);
  launch->shared = shared;
  launch->stream = (uintptr_t)stream;
  launch->plain = 1;
  return status;
}

// Triton asks for the address on the device of every tensor
int cuPointerGetAttribute(uint64_t* found, int attribute, uint64_t address) {
  (void)attribute;
  *found = address;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "an error of the stub";
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}

int cuDeviceGet(int* handle, int device) {
  *handle = device;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int handle) {
  (void)handle;
  *context = &status;
  return 0;
}
