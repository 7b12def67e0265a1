// The extension's operations, one declaration each. Shapes and dtypes are checked in Python (sst_fast/functional.py,
// sst_fast/queue.py); what is checked again here is what memory safety needs.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "margin.h"

namespace sst_fast {

// Calls f with scalar_t the dtype of a queue.
#define SST_DISPATCH_QUEUE(TYPE, ...)                                             \
  AT_DISPATCH_SWITCH(                                                             \
      TYPE, "enqueue",                                                            \
      AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, __VA_ARGS__) \
          AT_DISPATCH_CASE(at::kFloat8_e4m3fn, __VA_ARGS__))

using OptionalTensor = std::optional<at::Tensor>;

namespace cpu {

// -> loss [N], gradient of each row's loss for embedding [N, D] (or [0, D]), log-sum-exp [N], target cosine [N],
// hardest
//    negative cosine [N], its slot [N], number of slots above the target cosine [N], number of negatives [N],
//    derivative of the loss in the target cosine [N]
// margin_rows [P, N] and scale_rows [N], float64, take the place of parameters and scale where they vary from row to
// row.
std::vector<at::Tensor> margin_softmax(
    const at::Tensor& embedding, const at::Tensor& prototypes, const at::Tensor& target, const OptionalTensor& identity,
    const OptionalTensor& slot_identity, const OptionalTensor& window, const OptionalTensor& window_identity,
    const OptionalTensor& window_start, const OptionalTensor& margin_rows, const OptionalTensor& scale_rows,
    int64_t kind, const std::vector<double>& parameters, double scale, bool mask_empty, bool normalize,
    double label_smoothing, bool straight_through, bool need_gradient);

// Gradient [K, D] for the prototypes, in their dtype, given that of the loss [N] and what margin_softmax returned.
at::Tensor prototype_gradient(
    const at::Tensor& grad_loss, const at::Tensor& lse, const at::Tensor& negatives, const at::Tensor& target_slope,
    const at::Tensor& embedding, const at::Tensor& prototypes, const at::Tensor& target, const OptionalTensor& identity,
    const OptionalTensor& slot_identity, const OptionalTensor& margin_rows, const OptionalTensor& scale_rows,
    int64_t kind, const std::vector<double>& parameters, double scale, bool mask_empty, bool normalize,
    double label_smoothing, bool straight_through);

void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);

const char* instruction_set();

}  // namespace cpu

inline Margin make_margin(int64_t kind, const std::vector<double>& parameters) {
  TORCH_CHECK(kind >= 0 && kind < kKinds, "unknown margin ", kind);
  TORCH_CHECK(parameters.size() <= kParameters, "a margin has at most ", kParameters, " parameters");
  Margin margin{static_cast<Kind>(kind), {}};
  for (size_t i = 0; i < parameters.size(); i++) margin.p[i] = parameters[i];
  return margin;
}

#ifdef SST_FAST_CUDA
namespace cuda {
void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);

// The loss's sweep on Hopper: partial results of each split of the tiles, as kernels/margin_softmax.py combines them.
// out, each [splits, N]: shift, total, hard_sum (float32), hard, live (int32), hardest (float32), slot, beats (int32);
// moment [splits, N, D] float32, or empty where no gradient is wanted. kernels/hopper.py plans and checks.
void sweep(
    const at::Tensor& unit, const at::Tensor& prototypes, const OptionalTensor& window,
    const OptionalTensor& window_start, const at::Tensor& target, const OptionalTensor& identity,
    const OptionalTensor& slot_identity, const OptionalTensor& window_identity, const at::Tensor& cosine,
    const at::Tensor& scales, const at::Tensor& phi_rows, const std::vector<at::Tensor>& out, const at::Tensor& moment,
    int64_t tiles_in_split, int64_t cluster, int64_t kind, bool mask_empty, bool straight_through);
}  // namespace cuda
#endif

}  // namespace sst_fast
