// The loss's arguments: the one structure that operators, autograd and every kernel take. sst_fast/arguments.py is its
// counterpart in Python and says what each field means.
//
// An operator's schema has no structures, so the fields travel in three lists (tensors, integers, numbers) in the order
// in which they are listed here; Python lists the same names, and a test compares them.
//
// Sizes: N probes, K slots of S rows (sub-centres, usually one) each, D features, B slots in the batch window, H groups
// of probes, P parameters of the margin.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "margin.h"

namespace sst_fast {

using OptionalTensor = std::optional<at::Tensor>;

// target int64 [N], a slot, or -1 beside `positive`; weight [N]; identity int64 [N];
// slot_identity int64 [K], -1 = empty; window [H, B, D], prototypes' dtype; window_identity int64 [B]; window_start
// int64 0-d; margin_rows float64 [P, N] and scale_rows float64 [N] take the place of parameters and scale where they
// vary from row to row.
#define SST_TENSORS(field)                                                                              \
  field(target) field(weight) field(identity) field(slot_identity) field(window) field(window_identity) \
      field(window_start) field(margin_rows) field(scale_rows)
// sub_centers: S; there is no window unless it is 1. Flags are 0 or 1. float8_products: products may be rounded to
// float8. keep_weights: those of all slots may be kept for the prototypes' gradient. need_scale_gradient,
// need_gradient: find the derivative in the scale, the embeddings' gradient.
#define SST_INTEGERS(field)                                                                              \
  field(kind) field(reduction) field(ignore_index) field(sub_centers) field(mask_empty) field(normalize) \
      field(straight_through) field(float8_products) field(keep_weights) field(need_scale_gradient)      \
          field(need_gradient)
// After these come the margin's parameters.
#define SST_NUMBERS(field) field(scale) field(label_smoothing)

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

struct Arguments {
  at::Tensor embedding;     // [N, D], not normalised
  at::Tensor prototypes;    // [K S, D]; slot k has rows k S to k S + S - 1, and its cosine is the largest of theirs
  OptionalTensor positive;  // [N, D]: the targets themselves, where they are not rows of the prototypes
#define SST_FIELD(name) OptionalTensor name;
  SST_TENSORS(SST_FIELD)
#undef SST_FIELD
#define SST_FIELD(name) int64_t name = 0;
  SST_INTEGERS(SST_FIELD)
#undef SST_FIELD
#define SST_FIELD(name) double name = 0;
  SST_NUMBERS(SST_FIELD)
#undef SST_FIELD
  Margin margin{};

  Arguments(
      const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive,
      const c10::List<OptionalTensor>& tensors, at::IntArrayRef integers, at::ArrayRef<double> numbers);

  Reduction reduce() const { return static_cast<Reduction>(reduction); }
  // float64 inputs are computed in float64, all others in float32 at least.
  bool wide() const { return embedding.scalar_type() == at::kDouble || prototypes.scalar_type() == at::kDouble; }
  Margin margin_of(int64_t row) const;
  double scale_of(int64_t row) const;
  // Bytes of a weight that is kept.
  int64_t kept_size() const { return wide() ? 8 : prototypes.element_size(); }
};

// Names of the fields in the order in which they travel: {tensors, integers, numbers}.
std::vector<std::vector<std::string>> argument_names();

// What the loss gives. All but the loss itself are constants to autograd.
struct Results {
  at::Tensor loss;            // [N], or 0-d where it is reduced; float32, or float64 where the inputs are
  at::Tensor lse;             // [N], like all below: log-sum-exp of the row's logits
  at::Tensor target_cosine;   //
  at::Tensor hardest_cosine;  // of the slots that are neither target nor masked; -inf if there is none
  at::Tensor hardest_slot;    // int64; -1 if there is none
  at::Tensor beats_target;    // int64: how many of them exceed the target
  at::Tensor residual;        // derivative of the row's loss in its target logit
  at::Tensor row_weight;      // what the row's loss is multiplied by before the rows are summed; 0 where ignored
  at::Tensor gradient;        // [N, D] of the row's own loss for its embedding, float32 at least; or [0, D]
  at::Tensor negatives;       // int64: number of slots that are neither target nor masked
  at::Tensor target_slope;    // derivative of the row's loss in its target cosine
  at::Tensor scale_slope;     // derivative of the row's loss in its scale; or [0]
  at::Tensor kept;            // bytes [N, kept_bytes(K S)] that the backend keeps for the prototypes' gradient; or none
};
constexpr int kResults = 13;
// Of a row of kept weights, one for each row of the prototypes: those of whole tiles, in the prototypes' dtype, or
// float64 where that is what is computed in, and 128 bytes that end in a float32 or float64.
constexpr int64_t kTileSlots = 128;
template <typename Size>
Size kept_bytes(Size rows, int64_t bytes) {
  return (rows + (kTileSlots - 1)) / kTileSlots * kTileSlots * bytes + 128;
}
using ResultTuple = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
    at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline ResultTuple as_tuple(Results r) {
  return {r.loss,       r.lse,      r.target_cosine, r.hardest_cosine, r.hardest_slot, r.beats_target, r.residual,
          r.row_weight, r.gradient, r.negatives,     r.target_slope,   r.scale_slope,  r.kept};
}

}  // namespace sst_fast
