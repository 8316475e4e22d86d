// Plans: what an op of Triton kernels allocates and launches for arguments of one layout, replayed without Python.
//
// The kernels of such an op are compiled, and their grids and scalars computed, in Python (fastmim/kernels). All of
// that depends on the layout of the arguments alone: dtypes, shapes, strides, alignment, shared memory and scalars. The
// second time that a layout is met, Python records what it does (fastmim/kernels/_plans.py); from then on the plan is
// replayed.
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "driver.h"

namespace fastmim::plans {
namespace {

using Stack = torch::jit::Stack;

// layouts of one op that are kept; all are forgotten when there are more
constexpr size_t most_layouts = 4096;
constexpr size_t most_parameters = 128;

// ---- what is recorded -----------------------------------------------------------------------------------------------

// Where a kernel's parameter comes from: a constant, or an address in an argument of the op or in a new tensor.
enum class Source : int { constant, argument, result, scratch };

struct Parameter {
  Source source;
  size_t index;
  // the constant's bytes, or the offset of the address in bytes
  uint64_t value;
};

struct Launch {
  Function function;
  std::array<unsigned, 3> grid;
  unsigned threads;
  unsigned shared;
  std::vector<Parameter> parameters;
};

struct Result {
  std::vector<int64_t> shape;
  at::ScalarType dtype;
};

struct Plan {
  at::Device device;
  std::vector<Result> results;
  // bytes of what is allocated beside the results
  std::vector<int64_t> scratch;
  std::vector<Launch> launches;
};

struct Known {
  int calls = 0;
  bool refused = false;
  std::shared_ptr<const Plan> plan;
};

// The plans of an op, by the layout of its arguments.
struct Plans {
  std::mutex mutex;
  std::unordered_map<std::string, Known> layouts;
};

// A layout whose plan Python is asked to record in the call that follows.
struct Request {
  std::shared_ptr<Plans> plans;
  std::string layout;
  at::Device device;
};

thread_local std::optional<Request> requested;

// ---- layouts --------------------------------------------------------------------------------------------------------

template <typename T>
void append(std::string& layout, T value) {
  layout.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void append_all(std::string& layout, at::IntArrayRef values) {
  append(layout, static_cast<int32_t>(values.size()));
  layout.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

// The layout of an op's arguments, and the device on which they all lie.
struct Layout {
  std::string bytes;
  std::optional<at::Device> device;
  c10::SmallVector<const at::Tensor*, 16> tensors;
};

// Append which earlier tensor has the same storage, and the distance to it: a plan may take the address of one from the
// other.
void append_sharing(Layout& layout, const at::Tensor& tensor) {
  const void* storage = tensor.storage().data();
  int8_t earlier = -1;
  int64_t distance = 0;
  // one without values has no address
  if (tensor.numel()) {
    for (size_t i = 0; i < layout.tensors.size(); i++) {
      if (!layout.tensors[i]->numel() || layout.tensors[i]->storage().data() != storage) continue;
      earlier = static_cast<int8_t>(i);
      distance = static_cast<const char*>(tensor.const_data_ptr()) -
                 static_cast<const char*>(layout.tensors[i]->const_data_ptr());
      break;
    }
  }
  append(layout.bytes, earlier);
  append(layout.bytes, distance);
}

bool append_tensor(Layout& layout, const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || !tensor.has_storage() || tensor.is_meta() ||
      tensor.is_conj() || tensor.is_neg()) {
    return false;
  }
  if (!layout.device) layout.device = tensor.device();
  if (tensor.device() != *layout.device) return false;
  append(layout.bytes, 't');
  append(layout.bytes, static_cast<int8_t>(tensor.scalar_type()));
  append(layout.bytes, static_cast<int8_t>(tensor.device().type()));
  append(layout.bytes, tensor.device().index());
  // Triton compiles for addresses that are multiples of 16, in an argument or in a part of it
  append(layout.bytes, static_cast<int8_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16));
  append_sharing(layout, tensor);
  append_all(layout.bytes, tensor.sizes());
  append_all(layout.bytes, tensor.strides());
  layout.tensors.push_back(&tensor);
  return true;
}

// Append a description of an argument that a plan may depend on; return whether there is one.
bool append_argument(Layout& layout, const c10::IValue& value) {
  if (value.isTensor()) return append_tensor(layout, value.toTensor());
  std::string& bytes = layout.bytes;
  if (value.isNone()) {
    append(bytes, 'n');
  } else if (value.isBool()) {
    append(bytes, value.toBool() ? '1' : '0');
  } else if (value.isInt()) {
    append(bytes, 'i');
    append(bytes, value.toInt());
  } else if (value.isDouble()) {
    append(bytes, 'd');
    append(bytes, value.toDouble());
  } else if (value.isIntList()) {
    append(bytes, 'l');
    append_all(bytes, value.toIntVector());
  } else {
    return false;
  }
  return true;
}

// Describe the arguments of a call; return whether a plan can depend on nothing else.
bool describe(Layout& layout, at::ArrayRef<c10::IValue> arguments) {
  layout.bytes.reserve(512);
  for (const auto& argument : arguments) {
    if (!append_argument(layout, argument)) return false;
  }
  return layout.device.has_value();
}

// ---- replay ---------------------------------------------------------------------------------------------------------

void launch(const Launch& made, at::ArrayRef<c10::IValue> arguments, const std::vector<at::Tensor>& results,
            const std::vector<at::Tensor>& scratch, Stream stream) {
  std::array<uint64_t, most_parameters> values;
  std::array<void*, most_parameters> pointers;
  for (size_t i = 0; i < made.parameters.size(); i++) {
    const auto& [source, index, value] = made.parameters[i];
    const at::Tensor* tensor = source == Source::argument  ? &arguments[index].toTensor()
                               : source == Source::result  ? &results[index]
                               : source == Source::scratch ? &scratch[index]
                                                           : nullptr;
    values[i] = value + (tensor ? reinterpret_cast<uintptr_t>(tensor->mutable_data_ptr()) : 0);
    pointers[i] = &values[i];
  }
  launch_kernel(made.function, made.grid, made.threads, made.shared, stream, pointers.data());
}

void replay(const Plan& plan, Stack& stack, size_t count) {
  const c10::OptionalDeviceGuard guard(plan.device);
  const auto options = at::TensorOptions().device(plan.device);
  std::vector<at::Tensor> results, scratch;
  results.reserve(plan.results.size());
  scratch.reserve(plan.scratch.size());
  for (const auto& [shape, dtype] : plan.results) results.push_back(at::empty(shape, options.dtype(dtype)));
  for (const auto bytes : plan.scratch) scratch.push_back(at::empty({bytes}, options.dtype(at::kByte)));
  const auto arguments = torch::jit::last(stack, count);
  if (!plan.launches.empty()) {
    Stream stream = nullptr;
    if (plan.device.is_cuda()) {
      const c10::impl::VirtualGuardImpl devices(plan.device.type());
      stream = devices.getStreamNativeHandle(devices.getStream(plan.device));
    }
    ensure_context(plan.device.index());
    for (const auto& made : plan.launches) launch(made, arguments, results, scratch, stream);
  }
  torch::jit::drop(stack, count);
  for (auto& result : results) stack.emplace_back(std::move(result));
}

// The kernel of an op: replays the plan of its arguments' layout, or calls `recorded`, the same op in Python.
struct Served : c10::OperatorKernel {
  explicit Served(std::string recorded) : recorded(std::move(recorded)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const at::AutoDispatchBelowAutograd guard;
    const size_t count = op.schema().arguments().size();
    Layout layout;
    bool asks = false;
    if (describe(layout, torch::jit::last(*stack, count))) {
      std::shared_ptr<const Plan> plan;
      {
        const std::lock_guard lock(plans->mutex);
        if (plans->layouts.size() > most_layouts) plans->layouts.clear();
        Known& known = plans->layouts[layout.bytes];
        plan = known.plan;
        asks = !plan && !known.refused && ++known.calls >= 2;
      }
      if (plan) return replay(*plan, *stack, count);
    }
    // Python takes the request of this call, or none: not one that an earlier call left, which failed before
    requested.reset();
    if (asks) requested = Request{plans, std::move(layout.bytes), *layout.device};
    call_python(stack);
  }

  void call_python(Stack* stack) const {
    c10::Dispatcher::singleton().findSchemaOrThrow(recorded.c_str(), "").callBoxed(stack);
  }

  std::string recorded;
  std::shared_ptr<Plans> plans = std::make_shared<Plans>();
};

// ---- Python ---------------------------------------------------------------------------------------------------------

std::optional<Request> take_request() {
  return std::exchange(requested, std::nullopt);
}

void refuse(const Request& request) {
  const std::lock_guard lock(request.plans->mutex);
  request.plans->layouts[request.layout].refused = true;
}

using PyParameter = std::tuple<int, size_t, uint64_t>;
using PyLaunch = std::tuple<uint64_t, std::array<unsigned, 3>, unsigned, unsigned, std::vector<PyParameter>>;

void keep(const Request& request, const std::vector<at::Tensor>& results, std::vector<int64_t> scratch,
          const std::vector<PyLaunch>& launches) {
  auto plan = std::make_shared<Plan>(Plan{request.device, {}, std::move(scratch), {}});
  for (const auto& result : results) {
    if (result.device() != request.device) return refuse(request);
    plan->results.push_back({result.sizes().vec(), result.scalar_type()});
  }
  for (const auto& [function, grid, threads, shared, parameters] : launches) {
    if (parameters.size() > most_parameters) return refuse(request);
    Launch made{reinterpret_cast<Function>(function), grid, threads, shared, {}};
    for (const auto& [source, index, value] : parameters) {
      made.parameters.push_back({static_cast<Source>(source), index, value});
    }
    plan->launches.push_back(std::move(made));
  }
  const std::lock_guard lock(request.plans->mutex);
  request.plans->layouts[request.layout].plan = std::move(plan);
}

// Serve `op` on a type of devices (a dispatch key) by plans; `recorded` is the name of the same op in Python.
void serve(const std::string& op, const std::string& recorded, const std::string& device) {
  static std::vector<std::unique_ptr<torch::Library>> libraries;
  const auto name = op.substr(op.find(':') + 2);
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, op.substr(0, op.find(':')),
                                                       c10::parseDispatchKey(device), __FILE__, __LINE__));
  libraries.back()->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Served>(recorded)));
}

}  // namespace
}  // namespace fastmim::plans

PYBIND11_MODULE(_PLANS, module) {
  using namespace fastmim::plans;
  module.attr("torch_version") = TORCH_VERSION;
  pybind11::class_<Request>(module, "Request").def("keep", &keep).def("refuse", &refuse);
  module.def("take_request", &take_request, "the layout whose plan is wanted, or None");
  module.def("serve", &serve);
}
