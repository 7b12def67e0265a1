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

// The slots that a batch is about to take: unit rows [H, B, D] of the H groups' features [B, D] in `dtype`; the first
// slot, 0-d; slot and identity of every group's rows, [H * B]; the identities that others see, [B], -1 where a row is
// not finite.
using WindowTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BestTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

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

// unit: the features are unit rows already. group, 0-d: which of features [H, B, D] is written.
void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);
WindowTensors window(
    at::TensorList groups, const at::Tensor& identities, const at::Tensor& state, int64_t size, at::ScalarType dtype);

// Adds float32 scores to counts by bin, int64 [65536], and those in bins with a slot (slots: int16 [65536], else -1) to
// counts by value, int64 [65536 for each slot]. Several threads may add to the same counts.
void count_scores(const at::Tensor& scores, const at::Tensor& slots, at::Tensor& by_bin, at::Tensor& by_value);

// The highest of each row and column of float32 scores [R, C], and how many of it are at least `wanted`: [R], int32
// [R], [C], int32 [C]. One thread: blocks run side by side.
BestTensors best_scores(const at::Tensor& scores, const at::Tensor& wanted_rows, const at::Tensor& wanted_columns);

const char* instruction_set();

}  // namespace cpu

#ifdef SST_FAST_CUDA
namespace cuda {
void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);
WindowTensors window(
    at::TensorList groups, const at::Tensor& identities, const at::Tensor& state, int64_t size, at::ScalarType dtype);

// On Hopper; what sst_fast/backends/hopper.py has refused is not checked again.
Results margin_softmax(const Arguments&);
}  // namespace cuda
#endif

// The operators, called through PyTorch's dispatcher.
ResultTuple call_margin_softmax(
    const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive,
    const std::vector<OptionalTensor>& tensors, const std::vector<int64_t>& integers,
    const std::vector<double>& numbers, const std::string& backend);
WindowTensors call_window(
    const std::vector<at::Tensor>& groups, const at::Tensor& identities, const at::Tensor& state, int64_t size,
    at::ScalarType dtype);
void call_enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group);

}  // namespace sst_fast
