// Reading the pixels of patches, normalised: what patches.cu and loss.cu share.
//
// A thread owns a run: VALUES pixels that lie side by side in a line of a patch, 16 bytes of each channel where
// channels lie apart (planes), 16 bytes of pixels with all their channels where channels are fastest (INTERLEAVED).
#pragma once

#include "kernels.h"
#include "values.h"

namespace fastmim::cuda {

enum class Pixels : int { scalar, planes, interleaved };

constexpr int kInterleavedChannels = 3;

// pixels in a run, of P bytes each: as many as 16 bytes hold
template <typename T, Pixels FORM>
constexpr int kRun = FORM == Pixels::scalar ? 1 : 16 / static_cast<int>(sizeof(T));

// what a run holds: pixels of one channel or of all three
template <typename T, Pixels FORM>
constexpr int kRunValues = kRun<T, FORM> * (FORM == Pixels::interleaved ? kInterleavedChannels : 1);

// what each of 256 uint8 values of a channel is read as, in shared memory; barrier by the caller
FASTMIM_DEVICE float* write_table(const Patches& p, float* table) {
  for (int i = thread(); i < p.channels * 256; i += kWarpsOfReaders * kLanes) {
    const int c = i / 256;
    float value = static_cast<float>(i % 256) / 255.0f;
    if (p.mean != nullptr) value -= load(p.mean + c);
    if (p.std != nullptr) value /= load(p.std + c);
    store(table + i, value);
  }
  return table;
}

}  // namespace fastmim::cuda
