// What surrounds the sweep of sweep_sm90.h: before it unit rows, target cosines and what phi needs, a warp a probe;
// after it the splits' sums, loss and gradient, a block a probe. In double wherever the work is N * D, as on the CPU:
// near +-1 an angular margin's slope magnifies the target cosine's rounding. Not yet run on a GPU.
#pragma once

#include <limits>

#include "../ring.h"
#include "sweep_sm90.h"

namespace sst_fast::cuda {

enum class Number : int { f64, f32, bf16, f16, f8 };  // f8: e4m3fn

// The fused loss, its tensors as pointers: contiguous, matrices at multiples of 16 bytes. csrc/arguments.h says what
// they mean.
struct Problem {
  int N, K, D, B, groups;
  Number embedding_type, queue_type, weight_type;
  const void *embedding, *prototypes, *window, *weight;
  const int64_t *target, *identity, *slot_identity, *window_identity, *window_start;
  const double *margin_rows, *scale_rows;
  int margin_parameters;  // rows of margin_rows
  Margin margin;
  double scale;
  int64_t ignore_index;
  bool mean, reduced, mask_empty, straight, float8_products, need_gradient;
};

// Results, as in csrc/arguments.h, and what is kept between the kernels.
struct Workspace {
  float *loss, *lse, *target_cosine, *hardest_cosine, *residual, *row_weight, *gradient, *target_slope;
  int64_t *hardest_slot, *beats_target, *negatives;
  void* unit;  // [N, D] as products take it
  Number unit_type;
  double *inverse_norm, *exact_cosine, *sine;  // sine: length of what the target has across the probe
  float *scale, *phi_rows, *each;              // each: the losses before weights
  int* target;                                 // kNoSlot where there is none, or the row is ignored
  RowSums* sums;                               // [splits, N]
  float* moment;                               // [splits, N, D]
  unsigned* finished;                          // blocks of combine_kernel
  int splits;
};

// --- numbers ---------------------------------------------------------------------------------------------------------

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// By name, as PyTorch compiles without the conversions of CUDA's own types.
__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_fp8_e4m3 x) {
  return wide(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3)));
}
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_fp8_e4m3& to) {
  to.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

template <typename T>
__device__ __forceinline__ float4 widened(const void* rows, int64_t at) {
  const auto four = *reinterpret_cast<const Four<T>*>(static_cast<const T*>(rows) + at);
  return {wide(four.at[0]), wide(four.at[1]), wide(four.at[2]), wide(four.at[3])};
}

// Four numbers from `at` on, a multiple of four.
__device__ __forceinline__ float4 read_four(const void* rows, Number type, int64_t at) {
  switch (type) {
    case Number::f64:
      break;  // no backend's rows
    case Number::f32:
      return widened<float>(rows, at);
    case Number::bf16:
      return widened<__nv_bfloat16>(rows, at);
    case Number::f16:
      return widened<__half>(rows, at);
    case Number::f8:
      return widened<__nv_fp8_e4m3>(rows, at);
  }
  return {0.0f, 0.0f, 0.0f, 0.0f};
}

template <typename T>
__device__ __forceinline__ void write_four(void* rows, int64_t at, float4 v) {
  Four<T> four;
  narrow(v.x, four.at[0]), narrow(v.y, four.at[1]), narrow(v.z, four.at[2]), narrow(v.w, four.at[3]);
  *reinterpret_cast<Four<T>*>(static_cast<T*>(rows) + at) = four;
}

__device__ __forceinline__ double read_one(const void* from, Number type, int64_t at) {
  switch (type) {
    case Number::f64:
      return static_cast<const double*>(from)[at];
    case Number::f32:
      return static_cast<const float*>(from)[at];
    case Number::bf16:
      return wide(static_cast<const __nv_bfloat16*>(from)[at]);
    case Number::f16:
      return wide(static_cast<const __half*>(from)[at]);
    case Number::f8:
      break;  // no weights
  }
  return 0;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// --- rows ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool ignored(const Problem& p, int64_t i) { return p.target[i] == p.ignore_index; }

// Of one probe, its parameters put in where they vary.
__device__ __forceinline__ Margin margin_of(const Problem& p, int64_t i) {
  Margin margin = p.margin;
  for (int q = 0; q < kParameters; q++)
    if (q < p.margin_parameters) margin.p[q] = p.margin_rows[int64_t(q) * p.N + i];
  return margin;
}

// The prototype that the probe's target cosine is taken with: of the queue, or what its group sees in the window.
struct TargetRow {
  const void* rows;
  int64_t at;
  bool known;

  __device__ __forceinline__ TargetRow(const Problem& p, int64_t i) {
    const int64_t y = p.target[i];
    known = y >= 0 && y < p.K;
    rows = p.prototypes, at = known ? y : 0;
    if (p.B == 0) return;
    const int64_t start = *p.window_start, inside = at < start ? at - start + p.K : at - start;
    if (inside < p.B) rows = p.window, at = i / (p.N / p.groups) * p.B + inside;
  }

  // NaN where the target is no slot: nothing waits for the host to say so.
  __device__ __forceinline__ float4 read(const Problem& p, int d) const {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return known ? read_four(rows, p.queue_type, at * p.D + d) : float4{nan, nan, nan, nan};
  }
};

constexpr int kPrepareThreads = 256;

// Grid [N / 8]: a warp a probe.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ Problem p, const __grid_constant__ Workspace w) {
  const int64_t i = int64_t(blockIdx.x) * (kPrepareThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.finished = 0;
  if (i >= p.N) return;
  const bool skipped = ignored(p, i);  // as a row of zeros, whatever it holds
  const TargetRow own(p, i);
  double square = 0, dot = 0;
  for (int d = 4 * lane; d < p.D && !skipped; d += 128) {
    const float4 x = read_four(p.embedding, p.embedding_type, i * p.D + d), y = own.read(p, d);
    square += double(x.x) * x.x + double(x.y) * x.y + double(x.z) * x.z + double(x.w) * x.w;
    dot += double(x.x) * y.x + double(x.y) * y.y + double(x.z) * y.z + double(x.w) * y.w;
  }
  const double inverse = skipped ? 0.0 : normaliser(sqrt(warp_sum(square)));
  const double cosine = warp_sum(dot) * inverse;
  const double unit = w.unit_type == Number::f8 ? inverse * double(kUnitOfBytes) : inverse;
  const double along = cosine * inverse;
  double across = 0;
  const auto add = [&](float y, float x) {
    const double part = double(y) - along * double(x);
    across += part * part;
  };
  for (int d = 4 * lane; d < p.D; d += 128) {
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!skipped) {
      x = read_four(p.embedding, p.embedding_type, i * p.D + d);
      const float4 y = own.read(p, d);
      add(y.x, x.x), add(y.y, x.y), add(y.z, x.z), add(y.w, x.w);
    }
    x = {float(x.x * unit), float(x.y * unit), float(x.z * unit), float(x.w * unit)};
    const int64_t at = i * p.D + d;
    if (w.unit_type == Number::f8)
      write_four<__nv_fp8_e4m3>(w.unit, at, x);
    else if (w.unit_type == Number::f16)
      write_four<__half>(w.unit, at, x);
    else
      write_four<__nv_bfloat16>(w.unit, at, x);
  }
  const double sine = sqrt(warp_sum(across));
  if (lane != 0) return;
  w.inverse_norm[i] = inverse;
  w.sine[i] = sine;
  w.exact_cosine[i] = cosine;
  w.target_cosine[i] = float(cosine);
  w.scale[i] = float(p.scale_rows ? p.scale_rows[i] : p.scale);
  w.target[i] = skipped || !own.known ? kNoSlot : int(p.target[i]);
  const PhiRow<double> row = phi_row<double>(margin_of(p, i), cosine, sine);
  for (int q = 0; q < kPhiRow; q++) w.phi_rows[int64_t(q) * p.N + i] = float(row.at[q]);
}

// --- the splits' sums, loss, gradient --------------------------------------------------------------------------------

constexpr int kMostCombineThreads = 512;

struct CombineShared {
  float share[kMaxSplits];  // what a split's moment is multiplied by
  float target_slope, along[kMostCombineThreads / 32];
  double sums[2][kMostCombineThreads / 32];
  bool last;
};

// Shared memory of a block [D / 4, parts]: a row of float4 for each part.
inline int combine_bytes(int threads) { return sizeof(CombineShared) + 16 + threads * 16; }

// A warp adds up what the splits have seen of one probe.
__device__ __forceinline__ RowSums add_splits(const Problem& p, const Workspace& w, int64_t i, int lane) {
  RowSums all = {kNever, 0.0f, kNever, 0.0f, -1, 0, 0, 0};
  for (int split = lane; split < w.splits; split += 32) {
    const RowSums part = w.sums[int64_t(split) * p.N + i];
    if (part.total > 0) all.shift = fmaxf(all.shift, part.shift);
    if (part.hardest > all.hardest || (part.hardest == all.hardest && part.slot > all.slot))
      all.hardest = part.hardest, all.slot = part.slot;
    all.hard_sum += part.hard_sum;
    all.beats += part.beats, all.live += part.live, all.hard += part.hard;
  }
#pragma unroll
  for (int step = 16; step; step /= 2) {
    all.shift = fmaxf(all.shift, __shfl_xor_sync(0xffffffffu, all.shift, step));
    const float other = __shfl_xor_sync(0xffffffffu, all.hardest, step);
    const int its_slot = __shfl_xor_sync(0xffffffffu, all.slot, step);
    if (other > all.hardest || (other == all.hardest && its_slot > all.slot)) all.hardest = other, all.slot = its_slot;
  }
  all.hard_sum = warp_sum(all.hard_sum);
  all.beats = warp_sum(all.beats), all.live = warp_sum(all.live), all.hard = warp_sum(all.hard);
  for (int split = lane; split < w.splits; split += 32) {
    const RowSums part = w.sums[int64_t(split) * p.N + i];
    all.total += part.total * sm90::power_of_two(fminf(part.shift - all.shift, 0.0f) * kLog2e);
  }
  all.total = warp_sum(all.total);
  return all;
}

struct RowLoss {
  float wrong, slope;  // 1 - probability of the target; derivative in the target cosine
};

// Writes one probe's results, all but the gradient.
__device__ __forceinline__ RowLoss finish_row(const Problem& p, const Workspace& w, int64_t i, const RowSums& all) {
  Value<double> psi = target_margin<double>(
      margin_of(p, i), w.exact_cosine[i], w.sine[i], all.hard ? double(all.hard_sum) / all.hard : 0.0);
  if (p.straight) psi.slope = 1;
  const double scale = p.scale_rows ? p.scale_rows[i] : p.scale, t = scale * psi.value;
  // The target never enters the sum it is subtracted from: nothing cancels as its probability nears 1.
  const double infinity = std::numeric_limits<double>::infinity();
  const double others = all.total == 0 ? -infinity : double(all.shift) + log(double(all.total));
  const double excess = others - t, small = exp(-fabs(excess));
  const double loss = excess > 0 ? excess + log1p(small) : excess <= 0 ? log1p(small) : excess;  // keeps a NaN
  const double wrong = (excess > 0 ? 1.0 : small) / (1 + small);
  w.each[i] = float(loss);
  w.lse[i] = float(loss + t);
  w.hardest_cosine[i] = all.slot < 0 ? float(-infinity) : all.hardest;
  w.hardest_slot[i] = all.slot;
  w.beats_target[i] = all.beats;
  w.negatives[i] = all.live;
  w.residual[i] = float(-wrong);
  const float slope = float(-wrong * scale * psi.slope);
  w.target_slope[i] = slope;
  return {float(wrong), slope};
}

// Sum of each thread's number over a block, in an order that does not depend on time; every thread gets it.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* of_warps, int thread, int threads) {
  value = warp_sum(value);
  if (thread % 32 == 0) of_warps[thread / 32] = value;
  __syncthreads();
  T all = 0;
  for (int warp = 0; warp < threads / 32; warp++) all += of_warps[warp];
  return all;
}

// The last block to arrive: rows' weights and the reduced loss.
__device__ __forceinline__ void reduce(
    const Problem& p, const Workspace& w, CombineShared& shared, int thread, int threads) {
  const auto weight_of = [&](int64_t i) {
    return ignored(p, i) ? 0.0 : p.weight ? read_one(p.weight, p.weight_type, i) : 1.0;
  };
  double total = 0;
  for (int64_t i = thread; i < p.N; i += threads) total += weight_of(i);
  total = block_sum(total, shared.sums[0], thread, threads);
  double sum = 0;
  for (int64_t i = thread; i < p.N; i += threads) {
    const double weight = p.mean && total != 0 ? weight_of(i) / total : weight_of(i);
    const double product = weight == 0 ? 0.0 : weight * __ldcg(w.each + i);
    w.row_weight[i] = float(weight);
    if (!p.reduced) w.loss[i] = float(product);
    sum += product;
  }
  sum = block_sum(sum, shared.sums[1], thread, threads);
  if (p.reduced && thread == 0) *w.loss = float(sum);
}

// Grid [N]. With a gradient threads are [D / 4, parts], where a part takes every parts-th split, otherwise [32, 4].
template <bool kMoment>
__global__ void __launch_bounds__(kMostCombineThreads)
    combine_kernel(const __grid_constant__ Problem p, const __grid_constant__ Workspace w) {
  unsigned char* const raw = sm90::shared_memory();
  auto& shared = *reinterpret_cast<CombineShared*>(raw);
  auto* const moments = reinterpret_cast<float4*>(raw + (sizeof(CombineShared) + 15) / 16 * 16);
  const int64_t i = blockIdx.x;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  if (thread < 32) {
    const RowSums all = add_splits(p, w, i, thread);
    RowLoss row = {0.0f, 0.0f};
    if (thread == 0) row = finish_row(p, w, i, all);
    const float wrong = __shfl_sync(0xffffffffu, row.wrong, 0);
    if (thread == 0) shared.target_slope = row.slope;
    if constexpr (kMoment)
      for (int split = thread; split < w.splits; split += 32) {
        const float its_shift = w.sums[int64_t(split) * p.N + i].shift;
        const float fade = sm90::power_of_two(fminf(its_shift - all.shift, 0.0f) * kLog2e);
        shared.share[split] = all.total == 0 ? 0.0f : fade / all.total * wrong;
      }
  }
  __syncthreads();
  if constexpr (kMoment) {
    // For the unit probe: scale * (mean of phi' w over the other slots) + slope * target, then the projection of the
    // normalisation.
    const int d = 4 * threadIdx.x;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int split = threadIdx.y; split < w.splits; split += blockDim.y) {
      const float4 part = *reinterpret_cast<const float4*>(w.moment + (int64_t(split) * p.N + i) * p.D + d);
      const float share = shared.share[split];
      sum.x += share * part.x, sum.y += share * part.y, sum.z += share * part.z, sum.w += share * part.w;
    }
    moments[thread] = sum;
    __syncthreads();
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f}, hat = x;
    float along = 0.0f;
    const auto inverse = float(w.inverse_norm[i]);
    if (threadIdx.y == 0) {
      for (int part = 1; part < blockDim.y; part++) {
        const float4 other = moments[part * blockDim.x + threadIdx.x];
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
      }
      float4 own = {0.0f, 0.0f, 0.0f, 0.0f};
      if (!ignored(p, i)) {
        own = TargetRow(p, i).read(p, d);
        x = read_four(p.embedding, p.embedding_type, i * p.D + d);
      }
      const float scale = w.scale[i], slope = shared.target_slope;
      sum = {
          scale * sum.x + slope * own.x, scale * sum.y + slope * own.y, scale * sum.z + slope * own.z,
          scale * sum.w + slope * own.w};
      const double norm = w.inverse_norm[i];
      hat = {float(x.x * norm), float(x.y * norm), float(x.z * norm), float(x.w * norm)};
      along = sum.x * hat.x + sum.y * hat.y + sum.z * hat.z + sum.w * hat.w;
    }
    along = block_sum(along, shared.along, thread, threads);
    if (threadIdx.y == 0)
      *reinterpret_cast<float4*>(w.gradient + i * p.D + d) = {
          (sum.x - along * hat.x) * inverse, (sum.y - along * hat.y) * inverse, (sum.z - along * hat.z) * inverse,
          (sum.w - along * hat.w) * inverse};
  }
  if (thread == 0) {
    __threadfence();
    shared.last = atomicAdd(w.finished, 1u) + 1 == unsigned(gridDim.x);
  }
  __syncthreads();
  if (shared.last) reduce(p, w, shared, thread, threads);
}

}  // namespace sst_fast::cuda
