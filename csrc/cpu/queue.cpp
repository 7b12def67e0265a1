// The gallery queue on the CPU: a ring written in place.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "../ring.h"
#include "format.h"
#include "parallel.h"

namespace sst_fast::cpu {

namespace {

// The ring's state, checked: every slot that is read or written follows from it.
int64_t* ring_of(const at::Tensor& state, int64_t K, const char* operation) {
  TORCH_CHECK(
      state.numel() == kState && state.is_contiguous(), operation, ": state must hold ", kState, " numbers, got ",
      state.numel());
  int64_t* ring = state.mutable_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(
      ring[kPosition] >= 0 && ring[kPosition] < K && ring[kFill] >= 0 && ring[kFill] <= K, operation,
      ": state must hold a position in [0, ", K, ") and a fill in [0, ", K, "], got ", ring[kPosition], " and ",
      ring[kFill]);
  return ring;
}

// The rows to write: all, or those of one group.
at::Tensor rows_of(const at::Tensor& features, const OptionalTensor& group) {
  if (!group) return features.contiguous();
  TORCH_CHECK_TYPE(
      group->scalar_type() == at::kLong && group->numel() == 1 && group->is_cpu(),
      "enqueue: group must be one int64 number on the cpu, got ", group->scalar_type(), " ", group->sizes(), " on ",
      group->device());
  const int64_t number = *group->const_data_ptr<int64_t>(), H = features.size(0);
  TORCH_CHECK_INDEX(number >= 0 && number < H, "enqueue: group must be in [0, ", H, "), got ", number);
  return features.select(0, number).contiguous();
}

int64_t rows_for_a_thread(int64_t D) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(D, 1)); }

}  // namespace

void enqueue(
    const at::Tensor& features_, const at::Tensor& identities_, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group) {
  const at::Tensor features = rows_of(features_, group);
  const at::Tensor identities = identities_.contiguous();
  const int64_t B = features.size(0), D = features.size(1), K = queue.size(0);
  TORCH_CHECK(
      queue.is_contiguous() && queue_identities.is_contiguous() && queue.size(1) == D && B <= K &&
          identities.numel() == B && queue_identities.numel() == K,
      "enqueue: shapes disagree");
  int64_t* ring = ring_of(state, K, "enqueue");
  const int64_t start = ring[kPosition];

  const auto& rows = sweeps().rows;
  const Format from_format = format_of(features), to_format = format_of(queue);
  const int64_t* from = identities.const_data_ptr<int64_t>();
  int64_t* to = queue_identities.mutable_data_ptr<int64_t>();
  std::vector<double> scale(B);
  std::atomic<int64_t> rejected{0};
  parallel_for(0, B, rows_for_a_thread(D), [&](int64_t begin, int64_t end) {
    rows.norms(features.const_data_ptr(), from_format, D, begin, end, &scale[begin]);
    for (int64_t b = begin; b < end; b++) {
      // A row that is not finite would make every later loss NaN: its slot stays empty.
      const bool finite = std::isfinite(scale[b]);
      rejected += !finite;
      to[ring_slot(start, b, K)] = finite ? from[b] : -1;
      scale[b] = !finite ? 0 : unit ? 1 : normaliser(scale[b]);
    }
    rows.scaled_rows(
        features.const_data_ptr(), from_format, D, begin, end, &scale[begin], queue.mutable_data_ptr(), to_format,
        start, K);
  });
  ring[kRejected] += rejected;
  ring[kPosition] = ring_slot(start, B, K);
  ring[kFill] = ring[kFill] + B < K ? ring[kFill] + B : K;
}

at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state) {
  const int64_t K = queue_identities.size(0);
  TORCH_CHECK(queue_identities.is_contiguous() && count >= 0 && count <= K, "dequeue: count must be in [0, ", K, "]");
  int64_t* ring = ring_of(state, K, "dequeue");
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
  const int64_t position = ring_of(state, size, "window")[kPosition];
  TORCH_CHECK(B <= size, "window: shapes disagree");
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
  const auto& rows = sweeps().rows;
  const Format to = format_of(unit);
  for (int64_t h = 0; h < H; h++) {
    const at::Tensor features = groups[h].contiguous();
    TORCH_CHECK(features.size(0) == B && features.size(1) == D, "window: shapes disagree");
    const Format from = format_of(features);
    char* group = static_cast<char*>(unit.mutable_data_ptr()) + h * B * D * unit.element_size();
    parallel_for(0, B, rows_for_a_thread(D), [&](int64_t begin, int64_t end) {
      std::vector<double> scale(end - begin);
      rows.norms(features.const_data_ptr(), from, D, begin, end, scale.data());
      for (int64_t b = begin; b < end; b++) {
        const double norm = scale[b - begin];
        // A row that is not finite is the target of its own probe, whose loss tells of it, but nobody's negative.
        if (!std::isfinite(norm)) seen[b] = -1;
        scale[b - begin] = std::isfinite(norm) ? normaliser(norm) : std::numeric_limits<double>::quiet_NaN();
      }
      rows.scaled_rows(features.const_data_ptr(), from, D, begin, end, scale.data(), group, to, 0, B);
    });
  }
  return out;
}

}  // namespace sst_fast::cpu
