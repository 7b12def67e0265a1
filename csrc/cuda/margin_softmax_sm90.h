// The fused loss on Hopper: the plan, the memory between its three kernels, and their launches. `Device` launches and
// describes tensors to the copy engine: a GPU in margin_softmax_sm90.cu, CPU threads in tests/sm90_on_cpu.cpp.
#pragma once

#include <algorithm>

#include "rows_sm90.h"

namespace sst_fast::cuda {

struct Size {
  int x, y;
};

inline SweepPlan plan_of(const Problem& p, int processors) {
  const bool converts = p.queue_type == Number::f8 && !p.float8_products;  // read by threads, for one block
  return plan_sweep(p.N / p.groups, p.groups, p.K, p.B, p.D, processors, !converts);
}

inline int64_t bytes_of(Number type) {
  return type == Number::f64 ? 8 : type == Number::f32 ? 4 : type == Number::f8 ? 1 : 2;
}

// Fills in what is kept between the kernels, one after the other from `memory` on; returns the bytes that takes, which
// is all that happens if `memory` is null.
inline int64_t lay_out(const Problem& p, const SweepPlan& plan, char* memory, Workspace& w) {
  int64_t used = 0;
  const auto place = [&](auto*& pointer, int64_t count, int64_t size) {
    if (memory) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
    used += (count * size + 255) / 256 * 256;
  };
  const int64_t N = p.N, parts = plan.splits * N;
  w.splits = plan.splits;
  w.unit_type = p.queue_type == Number::f8 && !p.float8_products ? Number::f16 : p.queue_type;
  place(w.unit, N * p.D, bytes_of(w.unit_type));
  place(w.inverse_norm, N, 8);
  place(w.exact_cosine, N, 8);
  place(w.sine, N, 8);
  place(w.scale, N, 4);
  place(w.phi_rows, kPhiRow * N, 4);
  place(w.each, N, 4);
  place(w.target, N, 4);
  place(w.finished, 1, 4);
  place(w.sums, parts, sizeof(RowSums));
  place(w.moment, p.need_gradient ? parts * p.D : 0, 4);
  return used;
}

// w: results, and what lay_out() has filled in. N > 0.
template <typename Device>
void margin_softmax(Device& device, const Problem& p, const SweepPlan& plan, const Workspace& w) {
  constexpr int kRowsOfBlock = kPrepareThreads / 32;
  device.launch(prepare_kernel, Size{(p.N + kRowsOfBlock - 1) / kRowsOfBlock, 1}, Size{kPrepareThreads, 1}, 0, 1, p, w);

  const bool converts = w.unit_type != p.queue_type;
  const auto x_map = device.describe(w.unit, w.unit_type, p.N, p.D, 1);
  const auto w_map = converts ? x_map : device.describe(p.prototypes, p.queue_type, p.K, p.D, 2);
  const auto window_map =
      converts || p.B == 0 ? w_map : device.describe(p.window, p.queue_type, int64_t(p.groups) * p.B, p.D, 2);
  SweepArguments a{};
  a.prototypes = p.prototypes, a.window = p.window, a.window_start = p.window_start, a.target = w.target;
  a.identity = p.slot_identity ? p.identity : nullptr;
  a.slot_identity = p.slot_identity, a.window_identity = p.window_identity;
  a.cosine = w.target_cosine, a.scale = w.scale, a.phi_rows = w.phi_rows, a.sums = w.sums, a.moment = w.moment;
  a.N = p.N, a.K = p.K, a.B = p.B, a.rows_in_group = p.N / p.groups, a.blocks_in_group = plan.blocks_in_group;
  a.tiles = (p.K + kSlots - 1) / kSlots + (p.B + kSlots - 1) / kSlots, a.tiles_in_split = plan.tiles_in_split;
  a.mask_empty = p.mask_empty, a.straight = p.straight && p.margin.kind != Kind::filtered;
  a.npc = p.margin.kind == Kind::npc;
  const SweepKernel sweep = [&] {
    const auto of = [&](auto queue) { return sweep_kernel_of<decltype(queue)>(p.D, p.margin.kind, p.need_gradient); };
    switch (p.queue_type) {
      case Number::bf16:
        return of(__nv_bfloat16());
      case Number::f16:
        return of(__half());
      case Number::f8:
        return p.float8_products ? of(Float8Products()) : of(__nv_fp8_e4m3());
      case Number::f64:
      case Number::f32:
        break;
    }
    return SweepKernel{};
  }();
  device.launch(
      sweep.kernel, Size{p.groups * plan.blocks_in_group, plan.splits}, Size{kThreads, 1}, sweep.shared_bytes,
      plan.cluster, x_map, w_map, window_map, a, uint32_t(plan.cluster));

  const int columns = p.need_gradient ? p.D / 4 : 32;
  // Eight loads of a thread under way at once; four warps at least, for the sum over rows at the end.
  const int parts = std::clamp((plan.splits + 7) / 8, std::max(1, 128 / columns), kMostCombineThreads / columns);
  device.launch(
      p.need_gradient ? combine_kernel<true> : combine_kernel<false>, Size{p.N, 1}, Size{columns, parts},
      combine_bytes(columns * parts), 1, p, w);
}

}  // namespace sst_fast::cuda
