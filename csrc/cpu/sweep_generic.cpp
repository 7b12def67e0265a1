// The fused sweep for generic; see simd/table.h.
#include <cmath>
#include <cstdint>

#include "../margin.h"
#include "../ring.h"
#include "sweep.h"

#define SST_NAME "generic"
#define SST_NAMESPACE generic
#define SST_VECTOR_BYTES 16
#define SST_MR 4
#define SST_NV 2
#include "simd/table.h"

namespace sst_fast::cpu {
const Sweeps* sweeps_generic() { return &generic::table; }
}  // namespace sst_fast::cpu
