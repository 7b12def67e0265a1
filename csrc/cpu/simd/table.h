// The sweeps, written once with the compiler's vector types and compiled once per instruction set.
//
// The including file defines SST_VECTOR_BYTES, SST_MR and SST_NV (micro-tile: SST_MR x SST_NV vectors of
// accumulators) and SST_NAMESPACE, after all other headers and inside the target pragma; SST_BF16 where the processor
// multiplies pairs of bfloat16. Nothing in this folder may call a function of the standard library that another file
// could also instantiate: the linker would be free to keep the copy compiled for the wider instruction set.
//
// For each tile of slots, held in cache:
//   1. C[j][i] = w_j . x_i             product 1: vectors run over probes i, slots j are broadcast
//   2. P[j][i] = exp(z_ji - shift_i)   masks, sum, statistics
//   3. O[d][i] += sum_j w_j[d] P[j][i] product 2: the same micro-kernel, same tile, other strides
// Because vectors run over probes, the queue is never packed or transposed, each probe keeps to its own lane (a
// NaN poisons nobody else) and the order of additions depends on shapes alone.
//
// T is the type of sums, E what products multiply: T itself, or a Pair of neighbours along the sum. In pairs, product 1
// is exact but for its sum: probes are bfloat16 as they came, and cosines are divided by the norm afterwards. For
// product 2 neighbouring slots of the tile are interleaved once, and P is rounded to bfloat16.
//
// A block of probes is packed once (probes.h); a task loads tiles of a chunk (slots.h), finds cosines (cosines.h),
// weighs them (weights.h) and accumulates moments (sweep.h), from which the gradient is finished (probe_gradient.h).
#pragma once

#include "probe_gradient.h"
#include "prototype_gradient.h"
#include "sweep.h"
#ifndef SST_BF16
#include "rows.h"
#endif

namespace sst_fast::cpu::SST_NAMESPACE {

template <typename E>
constexpr Sweep<SumOf<E>> entry = {pack_bytes<E>,   pack<E>, scratch_bytes<E>, moment_bytes<E>,
                                   finish_bytes<E>, run<E>,  finish<E>,        run_prototypes<E>};

#ifdef SST_BF16
static const Sweep<float> table = entry<Pair>;
#else
static const Sweeps table = {SST_NAME, {norms, scaled_rows, measure}, entry<float>, entry<double>, nullptr};
#endif

}  // namespace sst_fast::cpu::SST_NAMESPACE
