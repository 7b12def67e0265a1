// The fused loss on the CPU: rows are prepared, (block, chunk) tasks handed to the sweep, their sums combined.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../margin.h"
#include "../ops.h"
#include "combination.h"
#include "parallel.h"
#include "plan.h"
#include "preparation.h"
#include "sweep.h"

namespace sst_fast::cpu {

// SST_FAST_CPU=generic|avx2|avx512|avx512bf16 narrows the choice, for tests.
const Sweeps& sweeps() {
  static const Sweeps chosen = [] {
    const char* limit = std::getenv("SST_FAST_CPU");
    Sweeps best = *sweeps_generic();
    auto allowed = [&](const char* name) { return !limit || !*limit || std::strcmp(limit, name) == 0; };
#if defined(__x86_64__) || defined(_M_X64)
    if (sweeps_avx2() && allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      best = *sweeps_avx2();
    if (sweeps_avx512() && (allowed("avx512") || allowed("avx512bf16")) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = *sweeps_avx512();
      if (pairs_avx512() && allowed("avx512bf16") && __builtin_cpu_supports("avx512bf16"))
        best.name = "avx512bf16", best.pairs = pairs_avx512();
    }
#endif
    return best;
  }();
  return chosen;
}

namespace {

template <typename T>
Results allocate_results(const CheckedArguments& p) {
  constexpr auto wide = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
  const int64_t N = p.embedding.size(0);
  const auto value = [&] { return at::Tensor(at::detail::empty_cpu({N}, wide)); };
  const auto number = [&] { return at::Tensor(at::detail::empty_cpu({N}, at::kLong)); };
  Results out;
  out.loss = p.reduce() == Reduction::none ? value() : at::Tensor(at::detail::empty_cpu({}, wide));
  for (auto* t : {&out.lse, &out.target_cosine, &out.hardest_cosine, &out.residual, &out.row_weight, &out.target_slope})
    *t = value();
  for (auto* t : {&out.hardest_slot, &out.beats_target, &out.negatives}) *t = number();
  out.gradient = at::detail::empty_cpu({p.need_gradient ? N : 0, p.slots.D}, wide);
  out.scale_slope = at::detail::empty_cpu({p.need_scale_gradient ? N : 0}, wide);
  out.kept = at::detail::empty_cpu({0, 0}, at::kByte);
  return out;
}

template <typename T>
Results forward(const CheckedArguments& p) {
  const int64_t N = p.embedding.size(0), D = p.slots.D;
  Results out = allocate_results<T>(p);
  if (N == 0) {
    if (p.reduce() != Reduction::none) *out.loss.mutable_data_ptr<T>() = 0;
    return out;
  }
  const auto& sweep = sweep_for<T>(p);
  const Targets targets(p);
  const Blocks blocks(N, p.window ? p.window->size(0) : 1);
  const PackedProbes<T> probes(p, targets, blocks, false);
  const SlotRows<T> slots(p);
  Combination<T> combination(p, targets, probes.rows, out);

  const int64_t moment_bytes = p.need_gradient ? (sweep.moment_bytes(blocks.most(), D) + 63) / 64 * 64 : 0;
  const Chunks chunks(blocks.count, p.slots, moment_bytes);
  // Label smoothing needs the whole sum before it can weigh a slot: one more sweep. Otherwise moments come with the
  // sum.
  const bool twice = p.need_gradient && p.label_smoothing > 0;
  // With one chunk a block is finished by the task that swept it and needs no shared memory.
  const bool alone = chunks.count == 1;
  const auto shared_moments = allocate(alone ? 0 : blocks.count * chunks.count * moment_bytes);
  std::vector<Partial<T>> partials(blocks.count * chunks.count);

  // Work too small to be worth waking a thread is left to one.
  constexpr int64_t worth_a_thread = 1 << 19;  // multiplications
  const int64_t grain =
      1 + worth_a_thread / std::max<int64_t>(1, 2 * blocks.most() * std::min(p.slots.rows(), chunks.each) * D);
  const auto finish = [&](int64_t block, bool last, bool again, char* scratch) {
    const Partial<T>* parts = &partials[block * chunks.count];
    if (!again) combination.add_up(blocks.rows(block), parts, chunks.count);
    if (p.need_gradient && last)
      combination.finish(blocks.rows(block), probes.blocks[block], parts, chunks.count, again, scratch);
  };
  const auto sweep_all = [&](bool moments, bool again) {
    const bool last = again || !twice;
    parallel_for(0, blocks.count * chunks.count, grain, [&](int64_t first_task, int64_t last_task) {
      const auto scratch = allocate(sweep.scratch_bytes(D, false));
      const auto own_moment = allocate(alone ? moment_bytes : 0);
      const auto finishing = allocate(alone && p.need_gradient ? sweep.finish_bytes(D) : 0);
      for (int64_t task = first_task; task < last_task; task++) {
        const int64_t block = task / chunks.count;
        const Range chunk = chunks.range(task % chunks.count);
        Probes<T> mine = probes.blocks[block];
        const int64_t begin = blocks.rows(block).begin;
        if (again) mine.lse = out.lse.const_data_ptr<T>() + begin, mine.uniform = &combination.uniform[begin];
        char* moment = alone ? own_moment.get() : shared_moments.get() + task * moment_bytes;
        Partial<T> moments_only;  // the second sweep leaves the first one's sums alone
        Partial<T>& part = again ? moments_only : partials[task];
        part.moment = moments ? reinterpret_cast<T*>(moment) : nullptr;
        part.wants_phi = p.label_smoothing > 0;
        part.wants_weighed_phi = p.need_scale_gradient;
        sweep.run(
            p.margin.kind, mine, slots.of_group(blocks.group(block), p), chunk.begin, chunk.end, scratch.get(), part);
        partials[task].moment = part.moment;
        if (alone) finish(block, last, again, finishing.get());
      }
    });
    if (alone) return;
    const int64_t finish_grain = 1 + 32768 / std::max<int64_t>(1, blocks.most() * chunks.count * D);
    parallel_for(0, blocks.count, finish_grain, [&](int64_t first, int64_t end) {
      const auto finishing = allocate(p.need_gradient ? sweep.finish_bytes(D) : 0);
      for (int64_t block = first; block < end; block++) finish(block, last, again, finishing.get());
    });
  };
  sweep_all(p.need_gradient && !twice, false);
  if (twice) sweep_all(true, true);
  reduce(p, combination.loss.data(), out);
  return out;
}

template <typename T>
at::Tensor gradient_of_prototypes(
    const CheckedArguments& p, const at::Tensor& grad_rows, const at::Tensor& lse, const at::Tensor& negatives,
    const at::Tensor& target_slope) {
  const int64_t N = p.embedding.size(0), D = p.slots.D, K = p.slots.rows();
  at::Tensor gradient = at::empty({K, D}, p.prototypes.options());
  if (N == 0) return gradient.zero_();
  const auto& sweep = sweep_for<T>(p);
  const Targets targets(p);
  const Blocks all(N, 1);
  PackedProbes<T> probes(p, targets, all, true);
  SlotRows<T> slots(p);
  slots.slots.window_is_masked = p.window.has_value();
  const at::Tensor incoming = grad_rows.to(lse.scalar_type()).contiguous();
  const T *g = incoming.const_data_ptr<T>(), *slope = target_slope.const_data_ptr<T>();
  const int64_t* live = negatives.const_data_ptr<int64_t>();
  std::vector<T> uniform(N), factor(N), target_weight(N);
  // Where a probe is nearly parallel to its target an angular margin's slope is large and what the normalisation leaves
  // of it is small: it would drown in the rounding of the sweep's sums, and is added in double after them.
  std::vector<int64_t> parallel;
  for (int64_t i = 0; i < N; i++) {
    uniform[i] = T(p.label_smoothing / double(1 + live[i]));
    factor[i] = T(p.scale_of(i)) * g[i];
    // A target outside the prototypes gives them no gradient.
    const bool elsewhere = p.ignored[i] || p.positive || targets.in_window(p.slot_of(i));
    const bool apart = !elsewhere && p.normalize && probes.rows.sine[i] < 1.0 / 16;
    if (apart) parallel.push_back(i);
    target_weight[i] = elsewhere || apart ? T(0) : slope[i] * g[i];
  }
  for (int64_t b = 0; b < all.count; b++) {
    const int64_t begin = all.rows(b).begin;
    Probes<T>& block = probes.blocks[b];
    block.lse = lse.const_data_ptr<T>() + begin;
    block.uniform = &uniform[begin];
    block.factor = &factor[begin];
    block.target_weight = &target_weight[begin];
  }
  // Chunks of rows own theirs of the gradient.
  const int64_t unit = row_unit(p.slots.sub_centers, 192), chunk = 192 / unit * unit;
  const Format format = format_of(gradient);
  void* out = gradient.mutable_data_ptr();
  parallel_for(0, (K + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate(sweep.scratch_bytes(D, true));
    for (int64_t c = begin; c < end; c++)
      sweep.run_prototypes(
          p.margin.kind, probes.blocks.data(), all.count, slots.slots, c * chunk, std::min(K, (c + 1) * chunk),
          scratch.get(), format, out);
  });
  for (const int64_t i : parallel) {
    const int64_t y = probes.rows.target_row[i];
    const at::Tensor x = p.embedding.select(0, i).to(at::kDouble) * probes.rows.inverse_norm[i];
    const at::Tensor w = p.prototypes.select(0, y).to(at::kDouble) * probes.rows.target_inverse_norm[i];
    const double weight = double(slope[i]) * double(g[i]) * probes.rows.target_inverse_norm[i];
    gradient.select(0, y).add_((x - w * probes.rows.cosine[i]) * weight);
  }
  return gradient;
}

}  // namespace

const char* instruction_set() { return sweeps().name; }

Results margin_softmax(const Arguments& arguments) {
  const CheckedArguments p(arguments);
  return p.wide() ? forward<double>(p) : forward<float>(p);
}

at::Tensor prototype_gradient(
    const at::Tensor& grad_rows, const at::Tensor& lse, const at::Tensor& negatives, const at::Tensor& target_slope,
    const Arguments& arguments) {
  const CheckedArguments p(arguments);
  return p.wide() ? gradient_of_prototypes<double>(p, grad_rows, lse, negatives, target_slope)
                  : gradient_of_prototypes<float>(p, grad_rows, lse, negatives, target_slope);
}

at::Tensor scaled_rows(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& gradient, at::ScalarType dtype) {
  const int64_t N = gradient.size(0), D = gradient.size(1);
  at::Tensor out = at::detail::empty_cpu({N, D}, dtype);
  if (N == 0) return out;
  const at::Tensor incoming = grad_loss.to(at::kDouble).contiguous(), weight = row_weight.to(at::kDouble).contiguous();
  const double *g = incoming.const_data_ptr<double>(), *w = weight.const_data_ptr<double>();
  const bool same = incoming.dim() == 0;
  TORCH_CHECK(
      weight.numel() == N && (same || incoming.numel() == N), "margin_softmax: the incoming gradient does not fit");
  std::vector<double> factor(N);
  for (int64_t i = 0; i < N; i++) factor[i] = w[i] == 0 ? 0 : g[same ? 0 : i] * w[i];
  const Format from = format_of(gradient), to = format_of(out);
  const void* rows = gradient.const_data_ptr();
  void* scaled = out.mutable_data_ptr();
  parallel_for(0, N, std::max<int64_t>(1, 32768 / std::max<int64_t>(D, 1)), [&](int64_t begin, int64_t end) {
    sweeps().rows.scaled_rows(rows, from, D, begin, end, &factor[begin], scaled, to, 0, N);
  });
  return out;
}

}  // namespace sst_fast::cpu
