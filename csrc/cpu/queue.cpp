// The gallery queue on the CPU: a ring written in place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "../ring.h"
#include "storage.h"

namespace sst_fast::cpu {

void enqueue(
    const at::Tensor& features_, const at::Tensor& identities_, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group) {
  const at::Tensor features =
      (group ? features_.select(0, *group->to(at::kLong).const_data_ptr<int64_t>()) : features_).contiguous();
  const at::Tensor identities = identities_.contiguous();
  const int64_t B = features.size(0), D = features.size(1), K = queue.size(0);
  TORCH_CHECK(queue.is_contiguous() && queue.size(1) == D && B <= K, "enqueue: shapes disagree");
  int64_t* ring = state.mutable_data_ptr<int64_t>();
  const int64_t start = ring[kPosition];
  TORCH_CHECK(start >= 0 && start < K, "enqueue: the queue's position is outside the queue");

  const auto& rows = sweeps().f64;
  const Storage from_storage = storage_of(features), to_storage = storage_of(queue);
  at::parallel_for(0, B, std::max<int64_t>(1, 32768 / D), [&](int64_t begin, int64_t end) {
    std::vector<double> scale(end - begin, 1.0);
    if (!unit) {
      rows.norms(features.const_data_ptr(), from_storage, D, begin, end, scale.data());
      for (double& norm : scale) norm = normaliser(norm);
    }
    rows.scaled_rows(
        features.const_data_ptr(), from_storage, D, begin, end, scale.data(), queue.mutable_data_ptr(), to_storage,
        start, K);
  });
  const int64_t* from = identities.const_data_ptr<int64_t>();
  int64_t* to = queue_identities.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; b++) to[ring_slot(start, b, K)] = from[b];
  ring[kPosition] = ring_slot(start, B, K);
  ring[kFill] = ring[kFill] + B < K ? ring[kFill] + B : K;
}

at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state) {
  const int64_t K = queue_identities.size(0);
  int64_t* ring = state.mutable_data_ptr<int64_t>();
  // More than there are: slots that hold nothing give identity -1.
  at::Tensor out = at::empty({count}, queue_identities.options());
  int64_t* gone = out.mutable_data_ptr<int64_t>();
  int64_t* identities = queue_identities.mutable_data_ptr<int64_t>();
  const int64_t oldest = ring_oldest(ring[kPosition], ring[kFill], K);
  for (int64_t b = 0; b < count; b++) {
    gone[b] = -1;
    if (b >= ring[kFill]) continue;
    const int64_t slot = ring_slot(oldest, b, K);
    gone[b] = identities[slot];
    identities[slot] = -1;
  }
  ring[kFill] = ring[kFill] > count ? ring[kFill] - count : 0;
  return out;
}

WindowTensors window(
    at::TensorList groups, const at::Tensor& identities_, const at::Tensor& state, int64_t size, at::ScalarType dtype) {
  const at::Tensor identities = identities_.contiguous();
  const int64_t H = groups.size(), B = identities.numel(), D = groups[0].size(1);
  const int64_t position = state.const_data_ptr<int64_t>()[kPosition];
  TORCH_CHECK(position >= 0 && position < size && B <= size, "window: the queue's position is outside the queue");
  const auto numbers = [&](at::IntArrayRef shape) { return at::empty(shape, state.options()); };
  WindowTensors out{
      at::empty({H, B, D}, groups[0].options().dtype(dtype)), numbers({}), numbers({H * B}), numbers({H * B}),
      numbers({B})};
  auto& [unit, start, targets, owners, held] = out;
  *start.mutable_data_ptr<int64_t>() = position;
  int64_t *slot = targets.mutable_data_ptr<int64_t>(), *owner = owners.mutable_data_ptr<int64_t>(),
          *seen = held.mutable_data_ptr<int64_t>();
  const int64_t* identity = identities.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; b++) {
    TORCH_CHECK_VALUE(
        identity[b] >= 0, "identities must be >= 0 (-1 marks an empty slot), got ", identity[b], " at row ", b);
    seen[b] = identity[b];
    for (int64_t h = 0; h < H; h++) slot[h * B + b] = ring_slot(position, b, size), owner[h * B + b] = identity[b];
  }
  const auto& rows = sweeps().f64;
  const Storage to = storage_of(unit);
  for (int64_t h = 0; h < H; h++) {
    const at::Tensor features = groups[h].contiguous();
    TORCH_CHECK(features.size(0) == B && features.size(1) == D, "window: shapes disagree");
    const Storage from = storage_of(features);
    char* group = static_cast<char*>(unit.mutable_data_ptr()) + h * B * D * unit.element_size();
    at::parallel_for(0, B, std::max<int64_t>(1, 32768 / D), [&](int64_t begin, int64_t end) {
      std::vector<double> scale(end - begin);
      rows.norms(features.const_data_ptr(), from, D, begin, end, scale.data());
      for (int64_t b = begin; b < end; b++) {
        const double norm = scale[b - begin];
        // A row that is not finite is the target of its own probe, whose loss tells of it, but nobody's negative.
        if (!std::isfinite(norm)) seen[b] = -1;
        scale[b - begin] = normaliser(norm);
      }
      rows.scaled_rows(features.const_data_ptr(), from, D, begin, end, scale.data(), group, to, 0, B);
    });
  }
  return out;
}

}  // namespace sst_fast::cpu
