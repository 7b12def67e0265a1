// What the sweep needs to know about rows before it begins: norms, target cosines, packed probes. N * D operations in
// double beside the sweep's 4 * N * K * D.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "../ring.h"
#include "checked_arguments.h"
#include "parallel.h"
#include "plan.h"

namespace sst_fast::cpu {

template <typename T>
const Sweep<T>& sweep_for(const CheckedArguments& p) {
  if constexpr (std::is_same_v<T, double>) {
    return sweeps().f64;
  } else {
    const bool pairs = format_of(p.embedding) == Format::bf16 && p.slots.D % 2 == 0 &&
                       (p.slots.format == Format::bf16 || p.slots.format == Format::f8);
    return pairs && sweeps().pairs ? *sweeps().pairs : sweeps().f32;
  }
}

inline auto allocate(int64_t bytes) {
  std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)), &std::free);
  TORCH_CHECK(memory, "margin_softmax: out of memory for ", bytes, " bytes");
  return memory;
}

// The probes' targets, wherever they lie.
struct Targets {
  Format format;

  explicit Targets(const CheckedArguments& p)
      : format(p.positive ? format_of(*p.positive) : p.slots.format),
        p(p),
        group_rows(p.window ? p.embedding.size(0) / p.window->size(0) : 1) {}

  bool in_window(int64_t slot) const { return p.window && inside(slot) < p.slots.window_size; }

  // How many rows probe i's target has.
  int64_t count() const { return p.positive ? 1 : p.slots.sub_centers; }

  // One of the rows [D] that probe i's target cosine may be taken with.
  const void* row(int64_t i, int64_t which) const {
    const int64_t slot = p.slot_of(i);
    if (p.positive) return at(p.positive->const_data_ptr(), i, p.positive->element_size());
    if (in_window(slot))
      return at(p.slots.window, i / group_rows * p.slots.window_size + inside(slot), p.prototypes.element_size());
    return at(p.slots.features, slot * p.slots.sub_centers + which, p.prototypes.element_size());
  }

 private:
  const CheckedArguments& p;
  int64_t group_rows;

  int64_t inside(int64_t slot) const { return (slot - p.slots.window_start + p.slots.K) % p.slots.K; }
  const void* at(const void* rows, int64_t row, int64_t bytes) const {
    return static_cast<const char*>(rows) + row * p.slots.D * bytes;
  }
};

// Of each probe, [N].
template <typename T>
struct ProbeRows {
  std::vector<double> inverse_norm, unit, cosine, sine, target_inverse_norm;
  std::vector<T> scale, cosine_t, phi;
  std::vector<int64_t> target, target_row;   // as in Probes
  std::vector<const void*> target_features;  // null: the probe is ignored, a row of zeros whatever it holds

  explicit ProbeRows(int64_t N)
      : inverse_norm(N),
        unit(N, 1.0),
        cosine(N),
        sine(N),
        target_inverse_norm(N),
        scale(N),
        cosine_t(N),
        phi(N * kPhiRow),
        target(N, -1),
        target_row(N, -1),
        target_features(N) {}

  // Rows [begin, end); scratch [2 D].
  void measure(const CheckedArguments& p, const Targets& targets, int64_t begin, int64_t end, double* scratch) {
    const Format format = format_of(p.embedding);
    const int64_t D = p.slots.D;
    const char* features = static_cast<const char*>(p.embedding.const_data_ptr());
    for (int64_t i = begin; i < end; i++) {
      scale[i] = T(p.scale_of(i));
      if (p.ignored[i]) continue;
      target[i] = p.slot_of(i);
      const auto measure = [&](int64_t which) {
        return sweeps().rows.measure(
            features + i * D * p.embedding.element_size(), format, targets.row(i, which), targets.format, D,
            p.normalize, scratch);
      };
      int64_t nearest = 0;
      Measured found = measure(0);
      for (int64_t which = 1; which < targets.count(); which++) {
        const Measured other = measure(which);
        if (other.cosine > found.cosine || std::isnan(other.cosine)) found = other, nearest = which;
      }
      target_row[i] = target[i] < 0 ? -1 : target[i] * p.slots.sub_centers + nearest;
      target_features[i] = targets.row(i, nearest);
      inverse_norm[i] = found.inverse_norm;
      unit[i] = found.unit;
      target_inverse_norm[i] = found.target_inverse_norm;
      cosine[i] = found.cosine;
      sine[i] = found.sine;
      cosine_t[i] = T(found.cosine);
      const auto row = phi_row<double>(p.margin_of(i), found.cosine, found.sine);
      for (int q = 0; q < kPhiRow; q++) phi[i * kPhiRow + q] = T(row.at[q]);
    }
  }

  Probes<T> block(const CheckedArguments& p, Range rows) const {
    const int64_t begin = rows.begin;
    Probes<T> probes{};
    probes.features =
        static_cast<const char*>(p.embedding.const_data_ptr()) + begin * p.slots.D * p.embedding.element_size();
    probes.format = format_of(p.embedding);
    probes.inverse_norm = &inverse_norm[begin];
    probes.unit = &unit[begin];
    probes.scale = &scale[begin];
    probes.target_cosine = &cosine_t[begin];
    probes.phi = &phi[begin * kPhiRow];
    probes.target = &target[begin];
    probes.target_row = &target_row[begin];
    probes.identity = p.identity ? numbers_of(p.identity) + begin : nullptr;
    probes.rows = rows.end - begin;
    return probes;
  }
};

// All blocks of probes, measured and packed.
template <typename T>
struct PackedProbes {
  ProbeRows<T> rows;
  std::vector<Probes<T>> blocks;

  PackedProbes(const CheckedArguments& p, const Targets& targets, const Blocks& all, bool for_prototypes)
      : rows(p.embedding.size(0)), blocks(all.count), packed(allocate(0)) {
    const int64_t D = p.slots.D;
    const auto& sweep = sweep_for<T>(p);
    const int64_t bytes = (sweep.pack_bytes(all.most(), D, for_prototypes) + 63) / 64 * 64;
    packed = allocate(all.count * bytes);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, all.most() * D));
    parallel_for(0, all.count, grain, [&](int64_t first, int64_t last) {
      std::vector<double> scratch(2 * D);
      for (int64_t b = first; b < last; b++) {
        const Range range = all.rows(b);
        rows.measure(p, targets, range.begin, range.end, scratch.data());
        blocks[b] = rows.block(p, range);
        sweep.pack(blocks[b], D, for_prototypes, packed.get() + b * bytes);
        blocks[b].packed = packed.get() + b * bytes;
      }
    });
  }

 private:
  decltype(allocate(0)) packed;
};

// The slots as the sweep takes them, and what their inverse norms are kept in.
template <typename T>
struct SlotRows {
  Slots<T> slots;

  explicit SlotRows(const CheckedArguments& p) {
    slots = {p.slots, nullptr, nullptr};
    if (!p.normalize) return;
    norms = inverse_norms(p.slots.features, p.slots.rows(), p);
    slots.inverse_norm = norms.data();
    if (!p.window) return;
    window_norms = inverse_norms(p.slots.window, p.window->size(0) * p.slots.window_size, p);
    slots.window_inverse_norm = window_norms.data();
  }

  // As the probes of one group see them.
  Slots<T> of_group(int64_t group, const CheckedArguments& p) const {
    Slots<T> mine = slots;
    if (!p.window) return mine;
    mine.window =
        static_cast<const char*>(mine.window) + group * mine.window_size * mine.D * p.prototypes.element_size();
    if (p.normalize) mine.window_inverse_norm += group * mine.window_size;
    return mine;
  }

 private:
  std::vector<T> norms, window_norms;  // inverse

  static std::vector<T> inverse_norms(const void* features, int64_t count, const CheckedArguments& p) {
    std::vector<T> inverse(count);
    parallel_for(
        0, count, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, p.slots.D)), [&](int64_t begin, int64_t end) {
          std::vector<double> found(end - begin);
          sweeps().rows.norms(features, p.slots.format, p.slots.D, begin, end, found.data());
          for (int64_t j = begin; j < end; j++) inverse[j] = T(normaliser(found[j - begin]));
        });
    return inverse;
  }
};

}  // namespace sst_fast::cpu
