// The kernels for portable. Headers come before the pragma: what they define is shared by all instruction sets.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "../common/philox.h"
#include "kernels.h"

#define FASTMIM_ISA portable
#define FASTMIM_VL 4
#include "isa.inl"

namespace fastmim::cpu {
const Kernels portable_kernels = FASTMIM_KERNELS("portable");
}
