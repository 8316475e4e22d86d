// Runs kernels on the CPU, one block at a time, each thread a fiber; finds what a GPU would let pass or hang on.
#include "runner.h"

#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../../../csrc/cuda/device.h"

namespace fastmim::cuda {

namespace {

constexpr uintptr_t kGlobal = uintptr_t{1} << 62, kShared = uintptr_t{1} << 61;
constexpr size_t kStack = 256 * 1024;
constexpr int64_t kSharedLimit = 227 * 1024;

std::map<uintptr_t, size_t> ranges;  // of global memory: first byte -> bytes
int64_t shared_limit_now = kSharedLimit;

// when a thread did something: barriers of the block and of its warp so far
struct Time {
  int64_t block = -1, warp = -1;
};

constexpr int kNobody = -1, kSeveralLanes = -2, kSeveralWarps = -3;

// what is known of one byte of shared memory
struct Byte {
  bool written = false, in_flight = false;
  int writer = kNobody, reader = kNobody, reader_warp = kNobody;
  Time write, read;
};

struct Copy {
  uintptr_t to;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  std::vector<Copy> copies;
};

// where lanes of a warp, or threads of a block, wait for each other
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  int64_t generation = 0;
  const void* in[kLanes];
  void* out[kLanes];
};

std::string kernel_name;
Shape shape;
int64_t current_block;
int current;
bool moved;
std::string failure;
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
std::vector<int64_t> warp_barriers;
Meeting whole;
std::vector<unsigned char> shared;
std::vector<Byte> bytes;
ucontext_t scheduler;
const std::function<void()>* body;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(kernel_name + ", block " + std::to_string(current_block) + ", thread " +
                           std::to_string(current) + ": " + what);
}

void pause() {
  swapcontext(&fibers[current].context, &scheduler);
}

void start() {
  try {
    (*body)();
    if (!fibers[current].copies.empty()) fail("ends with asynchronous copies that nobody waited for");
  } catch (const std::exception& error) {
    if (failure.empty()) failure = error.what();
  }
  fibers[current].done = moved = true;
}

void wait(Meeting& meeting, int64_t generation) {
  while (meeting.generation == generation) pause();
  moved = true;
}

Time now() {
  return {whole.generation, warp_barriers[current / kLanes]};
}

// whether a barrier lies between what thread `other` did at `then` and this thread, now
bool ordered(int other, const Time& then) {
  if (other == current || then.block < whole.generation) return true;
  return other >= 0 && other / kLanes == current / kLanes && then.warp < warp_barriers[current / kLanes];
}

void touch(size_t offset, size_t count, host::Access access) {
  for (size_t i = offset; i < offset + count; ++i) {
    Byte& byte = bytes[i];
    const auto place = [i] { return " byte " + std::to_string(i) + " of shared memory"; };
    if (access == host::Access::read) {
      if (byte.in_flight) fail("reads" + place() + " before the copy to it was waited for");
      if (!byte.written) fail("reads" + place() + ", which nobody has written");
      if (!ordered(byte.writer, byte.write)) {
        fail("reads" + place() + " without a barrier behind thread " + std::to_string(byte.writer) +
             ", which wrote it");
      }
      const bool own_warp = byte.reader_warp == current / kLanes && byte.reader != kSeveralWarps;
      const bool behind_barrier =
          byte.read.block < whole.generation || (own_warp && byte.read.warp < warp_barriers[current / kLanes]);
      if (behind_barrier || byte.reader == kNobody) {
        byte.reader = current, byte.reader_warp = current / kLanes;
      } else if (byte.reader_warp != current / kLanes) {
        byte.reader = kSeveralWarps;
      } else if (byte.reader != current && byte.reader != kSeveralWarps) {
        byte.reader = kSeveralLanes;
      }
      byte.read = now();
    } else {
      if (byte.written && !ordered(byte.writer, byte.write)) {
        fail("writes" + place() + " without a barrier behind thread " + std::to_string(byte.writer) +
             ", which wrote it");
      }
      const bool own_warp = byte.reader_warp == current / kLanes && byte.reader != kSeveralWarps;
      const bool behind_barrier =
          byte.read.block < whole.generation || (own_warp && byte.read.warp < warp_barriers[current / kLanes]);
      if (byte.reader != kNobody && byte.reader != current && !behind_barrier) {
        fail("writes" + place() + " without a barrier behind the threads of warp " + std::to_string(byte.reader_warp) +
             " and others that read it");
      }
      byte.written = true, byte.in_flight = false;
      byte.writer = current, byte.write = now();
      byte.reader = kNobody;
    }
  }
}

void transposed_or_not(const char* what, uint32_t (&to)[4], const void* row, bool transposed) {
  // each lane reads the row whose address it gives
  const Words own = load(static_cast<const Words*>(row));
  host::meet(what, &own, to, [transposed](const void* const* rows, void* const* results) {
    uint16_t value[4][8][8];
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(value[lane / 8][lane % 8], rows[lane], 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < 4; ++m) {
        const uint16_t low = transposed ? value[m][2 * t][g] : value[m][g][2 * t];
        const uint16_t high = transposed ? value[m][2 * t + 1][g] : value[m][g][2 * t + 1];
        static_cast<uint32_t*>(results[lane])[m] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

void run_block() {
  shared.assign(shape.shared, 0xff);
  bytes.assign(shape.shared, Byte{});
  warps.assign(shape.threads / kLanes, Meeting{});
  warp_barriers.assign(shape.threads / kLanes, 0);
  whole = Meeting{};
  if (fibers.size() < static_cast<size_t>(shape.threads)) fibers.resize(shape.threads);
  for (int i = 0; i < shape.threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
  }
  // backwards every other time: what depends on the order of threads shows
  for (bool backwards = current_block % 2 == 1;; backwards = !backwards) {
    moved = false;
    bool running = false;
    for (int i = 0; i < shape.threads && failure.empty(); ++i) {
      current = backwards ? shape.threads - 1 - i : i;
      if (fibers[current].done) continue;
      running = true;
      swapcontext(&scheduler, &fibers[current].context);
    }
    if (!failure.empty()) throw std::runtime_error(failure);
    if (!running) return;
    if (!moved) {
      std::string where;
      for (const Meeting& meeting : warps) {
        if (meeting.arrived) where += std::string(" ") + meeting.what + " (" + std::to_string(meeting.arrived) + ")";
      }
      if (whole.arrived) where += " sync_block (" + std::to_string(whole.arrived) + ")";
      fail("waits for ever: threads of the block stand at" + where);
    }
  }
}

}  // namespace

namespace host {

unsigned char* checked(const void* pointer, size_t count, Access access) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const char* verb = access == Access::read ? "reads" : "writes";
  if (address % count)
    fail(std::string(verb) + " " + std::to_string(count) + " bytes at an address that is no multiple");
  if (address & kShared) {
    address &= ~kShared;
    if (address + count > shared.size()) {
      fail(std::string(verb) + " byte " + std::to_string(address) + " of " + std::to_string(shared.size()) +
           " bytes of shared memory");
    }
    touch(address, count, access);
    return shared.data() + address;
  }
  if (!(address & kGlobal)) fail(std::string(verb) + " through a pointer that no tensor gave");
  address &= ~kGlobal;
  const bool inside = std::any_of(ranges.begin(), ranges.end(), [=](const auto& range) {
    return address >= range.first && address + count <= range.first + range.second;
  });
  if (!inside) {
    fail(std::string(verb) + " " + std::to_string(count) + " bytes outside of all tensors");
  }
  return reinterpret_cast<unsigned char*>(address);
}

void record_copy(void* to, const void* from, bool valid) {
  Copy copy{reinterpret_cast<uintptr_t>(to), {}};
  if (valid) std::memcpy(copy.bytes, checked(from, 16, Access::read), 16);
  checked(to, 16, Access::write);
  for (int i = 0; i < 16; ++i) bytes[(copy.to & ~kShared) + i].in_flight = true;
  fibers[current].copies.push_back(copy);
}

void meet(const char* what, const void* in, void* out,
          const std::function<void(const void* const*, void* const*)>& together) {
  Meeting& meeting = warps[current / kLanes];
  if (meeting.arrived && std::strcmp(meeting.what, what)) {
    fail(std::string("is at ") + what + " while lanes of its warp are at " + meeting.what);
  }
  meeting.what = what;
  meeting.in[current % kLanes] = in, meeting.out[current % kLanes] = out;
  const int64_t generation = meeting.generation;
  moved = true;
  if (++meeting.arrived < kLanes) return wait(meeting, generation);
  together(meeting.in, meeting.out);
  meeting.arrived = 0;
  ++meeting.generation;
}

void run(const char* name, const Shape& wanted, const std::function<void()>& kernel) {
  kernel_name = name, shape = wanted, body = &kernel;
  failure.clear();
  current_block = current = 0;
  if (shape.threads % kLanes || shape.threads < kLanes || shape.threads > 1024) fail("has a block of no whole warps");
  if (shape.shared > shared_limit_now) fail("asks for " + std::to_string(shape.shared) + " bytes of shared memory");
  for (; current_block < shape.blocks; ++current_block) run_block();
}

void* shown(const void* first, size_t count) {
  if (first == nullptr) return nullptr;
  size_t& known = ranges[reinterpret_cast<uintptr_t>(first)];
  known = std::max(known, count);
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(first) | kGlobal);
}

void forget_all() {
  ranges.clear();
}

void set_shared_limit(int64_t limit) {
  shared_limit_now = limit;
}

}  // namespace host

int thread() {
  return current;
}

int64_t block() {
  return current_block;
}

int64_t blocks() {
  return shape.blocks;
}

void sync_block() {
  const int64_t generation = whole.generation;
  moved = true;
  if (++whole.arrived < shape.threads) return wait(whole, generation);
  whole.arrived = 0;
  ++whole.generation;
}

void sync_warp() {
  host::meet("sync_warp", nullptr, nullptr,
             [](const void* const*, void* const*) { ++warp_barriers[current / kLanes]; });
}

float from_lane(float value, int mask) {
  struct In {
    float value;
    int mask;
  } in{value, mask};
  float out;
  host::meet("from_lane", &in, &out, [](const void* const* lanes, void* const* results) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const In& own = *static_cast<const In*>(lanes[lane]);
      *static_cast<float*>(results[lane]) = static_cast<const In*>(lanes[lane ^ own.mask])->value;
    }
  });
  return out;
}

void load_matrices(uint32_t (&to)[4], const void* row) {
  transposed_or_not("load_matrices", to, row, false);
}

void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  transposed_or_not("load_matrices_transposed", to, row, true);
}

void wait_for_copies() {
  std::vector<Copy> copies;
  copies.swap(fibers[current].copies);
  for (const Copy& copy : copies) {
    std::memcpy(host::checked(reinterpret_cast<void*>(copy.to), 16, host::Access::write), copy.bytes, 16);
  }
}

unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(kShared);
}

int64_t shared_limit() {
  return shared_limit_now;
}

}  // namespace fastmim::cuda
