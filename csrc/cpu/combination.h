// From the sums of a block's chunks to losses, statistics and gradients, and from rows to the reduced loss.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "preparation.h"

namespace sst_fast::cpu {

template <typename T>
struct Combination {
  std::vector<T> loss, uniform;  // [N]: of the row alone; the share of label smoothing that each slot gets

  Combination(const CheckedArguments& p, const Targets& targets, const ProbeRows<T>& rows, const Results& out)
      : loss(rows.scale.size()),
        uniform(loss.size()),
        p(p),
        targets(targets),
        rows(rows),
        shift(loss.size()),
        sum(loss.size()),
        wrong(loss.size()),
        slope(loss.size()),
        lse(values(out.lse)),
        target_cosine(values(out.target_cosine)),
        hardest_cosine(values(out.hardest_cosine)),
        residual(values(out.residual)),
        target_slope(values(out.target_slope)),
        scale_slope(values(out.scale_slope)),
        gradient(values(out.gradient)),
        hardest_slot(numbers(out.hardest_slot)),
        beats_target(numbers(out.beats_target)),
        negatives(numbers(out.negatives)) {}

  // Losses and statistics of a block.
  void add_up(Range block, const Partial<T>* parts, int64_t chunks) {
    for (int64_t i = block.begin; i < block.end; i++) add_up_row(i, i - block.begin, parts, chunks);
  }

  // The gradient of a block. `again`: moments of the second sweep, which are weighed already.
  void finish(
      Range block, const Probes<T>& probes, const Partial<T>* parts, int64_t chunks, bool again, char* scratch) const {
    std::vector<const T*> moment(chunks);
    std::vector<T> share(chunks * kBlock);
    double scale[kBlock], weight[kBlock];
    for (int64_t c = 0; c < chunks; c++) moment[c] = parts[c].moment;
    for (int64_t i = block.begin; i < block.end; i++) {
      const int64_t r = i - block.begin;
      scale[r] = p.scale_of(i);
      weight[r] = slope[i] * rows.target_inverse_norm[i];
      for (int64_t c = 0; c < chunks; c++) {
        const bool counts = sum[i] > 0 && (again || parts[c].sum[r] > 0);
        const double mine = again ? 1.0 : std::exp(parts[c].shift[r] - shift[i]) / sum[i] * wrong[i];
        share[c * kBlock + r] = std::isnan(sum[i]) ? T(sum[i]) : counts ? T(mine) : T(0);
      }
    }
    const Moments<T> moments{moment.data(), share.data(), chunks, scale, weight, &rows.target_features[block.begin],
                             targets.format};
    sweep_for<T>(p).finish(probes, moments, p.slots.D, scratch, gradient + block.begin * p.slots.D);
  }

 private:
  const CheckedArguments& p;
  const Targets& targets;
  const ProbeRows<T>& rows;
  std::vector<double> shift, sum, wrong, slope;
  T *lse, *target_cosine, *hardest_cosine, *residual, *target_slope, *scale_slope, *gradient;
  int64_t *hardest_slot, *beats_target, *negatives;

  static T* values(const at::Tensor& t) { return t.mutable_data_ptr<T>(); }
  static int64_t* numbers(const at::Tensor& t) { return t.mutable_data_ptr<int64_t>(); }

  void add_up_row(int64_t i, int64_t r, const Partial<T>* parts, int64_t chunks) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    double highest = -infinity, total = 0, phi = 0, weighed_phi = 0, hard_sum = 0;
    bool poisoned = std::isnan(rows.cosine[i]);
    T top = parts[0].hardest[r];
    int64_t slot = parts[0].hardest_slot[r], above = 0, hard = 0, live = 0;
    for (int64_t c = 0; c < chunks; c++) {
      poisoned |= std::isnan(parts[c].sum[r]);
      if (parts[c].sum[r] > 0) highest = std::max(highest, parts[c].shift[r]);
      if (parts[c].hardest[r] > top) top = parts[c].hardest[r], slot = parts[c].hardest_slot[r];
      above += parts[c].beats[r];
      live += parts[c].live[r];
      hard += parts[c].hard[r];
      hard_sum += parts[c].hard_sum[r];
      phi += parts[c].phi[r];
    }
    for (int64_t c = 0; c < chunks; c++)
      if (parts[c].sum[r] > 0) {
        const double share = std::exp(parts[c].shift[r] - highest);
        total += share * parts[c].sum[r];
        weighed_phi += share * parts[c].weighed_phi[r];
      }
    // others = log sum exp of the other slots; excess = others - t. Never sums the target with them, so nothing
    // cancels as its probability nears 1: loss = log(1 + e^excess), 1 - p = e^excess / (1 + e^excess).
    auto psi =
        target_margin<double>(p.margin_of(i), rows.cosine[i], rows.sine[i], hard ? hard_sum / double(hard) : 0.0);
    if (p.straight_through) psi.slope = 1;
    const double scale = p.scale_of(i), t = scale * psi.value;
    const double others = poisoned ? nan : total > 0 ? highest + std::log(total) : -infinity;
    const double excess = others - t;
    const double small = std::exp(-std::abs(excess));
    const double plain = std::isnan(excess) ? nan : std::max(excess, 0.0) + std::log1p(small);
    const double smoothed = p.label_smoothing / double(1 + live);
    shift[i] = highest;
    sum[i] = poisoned ? nan : total;
    wrong[i] = excess > 0 ? 1 / (1 + small) : small / (1 + small);
    uniform[i] = T(smoothed);
    loss[i] = T(plain - (smoothed > 0 ? smoothed * (scale * phi - double(live) * t) : 0));
    lse[i] = T(plain + t);
    target_cosine[i] = T(rows.cosine[i]);
    hardest_cosine[i] = top;
    hardest_slot[i] = slot;
    beats_target[i] = above;
    negatives[i] = live;
    const double in_target = -(wrong[i] - p.label_smoothing + smoothed);
    residual[i] = T(in_target);
    slope[i] = scale * psi.slope * in_target;
    target_slope[i] = T(slope[i]);
    if (p.need_scale_gradient)
      scale_slope[i] =
          T((total > 0 ? wrong[i] / total * weighed_phi : 0) - (smoothed > 0 ? smoothed * phi : 0) +
            in_target * psi.value);
  }
};

// What each row's loss is multiplied by before the rows are summed, and the reduced loss.
template <typename T>
void reduce(const CheckedArguments& p, const T* each, Results& out) {
  const int64_t N = p.embedding.size(0);
  T *weights = out.row_weight.mutable_data_ptr<T>(), *loss = out.loss.mutable_data_ptr<T>();
  const at::Tensor wide = p.weight ? p.weight->to(at::kDouble) : at::Tensor();
  const double* given = p.weight ? wide.const_data_ptr<double>() : nullptr;
  double total = 0;
  for (int64_t i = 0; i < N; i++) {
    const double weight = p.ignored[i] ? 0.0 : given ? given[i] : 1.0;
    weights[i] = T(weight);
    total += weight;
  }
  const bool mean = p.reduce() == Reduction::mean, none = p.reduce() == Reduction::none;
  double sum = 0;
  for (int64_t i = 0; i < N; i++) {
    if (mean && total != 0) weights[i] = T(double(weights[i]) / total);
    const double product = weights[i] == 0 ? 0.0 : double(weights[i]) * double(each[i]);
    if (none) loss[i] = T(product);
    sum += product;
  }
  if (!none) *loss = T(sum);
}

}  // namespace sst_fast::cpu
