// The extension's operations, one declaration each. Shapes and dtypes are checked in Python (sst_fast/functional.py,
// sst_fast/queue.py); what is checked again here is what memory safety needs.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "arguments.h"

namespace sst_fast {

// Calls f with scalar_t the dtype of a queue.
#define SST_DISPATCH_QUEUE(TYPE, ...)                                             \
  AT_DISPATCH_SWITCH(                                                             \
      TYPE, "enqueue",                                                            \
      AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, __VA_ARGS__) \
          AT_DISPATCH_CASE(at::kFloat8_e4m3fn, __VA_ARGS__))

namespace cpu {

Results margin_softmax(const Arguments&);

// Gradient [K, D] for the prototypes, in their dtype, given that of each row's own loss [N] and what the forward pass
// found. Slots that a window replaces have no part in the loss and get zeros.
at::Tensor prototype_gradient(
    const at::Tensor& grad_rows, const at::Tensor& lse, const at::Tensor& negatives, const at::Tensor& target_slope,
    const Arguments&);

// Rows of `gradient` [N, D] times grad_loss (0-d or [N]) times row_weight [N], rounded to `dtype`; zeros where
// row_weight is 0.
at::Tensor scaled_rows(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& gradient, at::ScalarType dtype);

void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);
// Unit rows of features [H, B, D] in `dtype`, the slot that is written next (0-d), and the B slots from there on.
std::tuple<at::Tensor, at::Tensor, at::Tensor> window(
    const at::Tensor& features, const at::Tensor& state, int64_t size, at::ScalarType dtype);

const char* instruction_set();

}  // namespace cpu

#ifdef SST_FAST_CUDA
namespace cuda {
void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);
std::tuple<at::Tensor, at::Tensor, at::Tensor> window(
    const at::Tensor& features, const at::Tensor& state, int64_t size, at::ScalarType dtype);

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
