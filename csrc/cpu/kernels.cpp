// The choice of an instruction set for this process, and checks on values that several ops share.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "tensors.h"

namespace fastmim::cpu {

namespace {

const Kernels& choose() {
  std::vector<const Kernels*> able{&portable_kernels};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) able.push_back(&avx2_kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    able.push_back(&avx512_kernels);
    if (const Kernels* bf16 = avx512_bf16_kernels()) able.push_back(bf16);
  }
#endif
  const char* wanted = std::getenv("FASTMIM_ISA");
  if (wanted == nullptr) return *able.back();
  std::string names;
  for (const Kernels* set : able) {
    if (std::string(wanted) == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  TORCH_CHECK_VALUE(false, "FASTMIM_ISA must be one of ", names, " on this processor; got ", wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

Tensor checked_ids(const char* name, const Tensor& ids, int64_t limit) {
  const Tensor rows = ids.contiguous();
  const int64_t* id = rows.const_data_ptr<int64_t>();
  const int64_t batch = rows.size(0), count = rows.size(1);
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_VALUE(0 <= id[i] && id[i] < limit, name, " must be in 0..", limit - 1, "; got ", id[i]);
  }
  // a mark per position where rows are dense in it, a sort where they are sparse
  const bool dense = limit <= 64 * count;
  std::vector<int64_t> seen(dense ? limit : count, -1);
  for (int64_t b = 0; b < batch; ++b, id += count) {
    bool repeated = false;
    if (dense) {
      for (int64_t k = 0; k < count; ++k) {
        repeated |= seen[id[k]] == b;
        seen[id[k]] = b;
      }
    } else {
      std::copy(id, id + count, seen.begin());
      std::sort(seen.begin(), seen.end());
      repeated = std::adjacent_find(seen.begin(), seen.end()) != seen.end();
    }
    TORCH_CHECK_VALUE(!repeated, name, " must not repeat an id within a row; got a duplicate in row ", b);
  }
  return rows;
}

}  // namespace fastmim::cpu
