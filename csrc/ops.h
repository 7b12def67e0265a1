// The extension's operations, one declaration each. Shapes and dtypes are checked in Python (sst_fast/functional.py,
// sst_fast/queue.py); what is checked again here is what memory safety needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "margin.h"

namespace sst_fast {

using OptionalTensor = std::optional<at::Tensor>;

inline Margin make_margin(int64_t kind, const std::vector<double>& parameters) {
  TORCH_CHECK(kind >= 0 && kind < kKinds, "unknown margin ", kind);
  TORCH_CHECK(parameters.size() <= kParameters, "a margin has at most ", kParameters, " parameters");
  Margin margin{static_cast<Kind>(kind), {}};
  for (size_t i = 0; i < parameters.size(); i++) margin.p[i] = parameters[i];
  return margin;
}

namespace cpu {

// -> loss [N], gradient of each row's loss for embedding [N, D] (or [0]), log-sum-exp [N], target cosine [N],
//    hardest negative cosine [N], its slot [N], number of slots above the target cosine [N]
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> margin_softmax(
    const at::Tensor& embedding, const at::Tensor& prototypes, const at::Tensor& target, const OptionalTensor& identity,
    const OptionalTensor& slot_identity, const OptionalTensor& window, const OptionalTensor& window_identity,
    const OptionalTensor& window_start, int64_t kind, const std::vector<double>& parameters, double scale,
    bool mask_empty, bool need_gradient);

void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);

const char* instruction_set();

}  // namespace cpu

#ifdef SST_FAST_CUDA
namespace cuda {
void enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state);
at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state);
}  // namespace cuda
#endif

}  // namespace sst_fast
