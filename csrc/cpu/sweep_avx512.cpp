// The fused sweep for avx512; see simd/table.h.
#include <cmath>
#include <cstdint>

#include "../margin.h"
#include "../ring.h"
#include "sweep.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define SST_NAME "avx512"
#define SST_NAMESPACE avx512
#define SST_VECTOR_BYTES 64
#define SST_MR 6
#define SST_NV 4
#include "simd/table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
namespace sst_fast::cpu {
const Sweeps* sweeps_avx512() { return &avx512::table; }
}  // namespace sst_fast::cpu
#else
namespace sst_fast::cpu {
const Sweeps* sweeps_avx512() { return nullptr; }
}  // namespace sst_fast::cpu
#endif
