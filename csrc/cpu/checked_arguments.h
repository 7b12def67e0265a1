// The loss's arguments as its CPU kernel takes them: contiguous, and every number checked that serves as an index.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../arguments.h"
#include "format.h"
#include "sweep.h"

namespace sst_fast::cpu {

inline const int64_t* numbers_of(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

// The arguments, made contiguous and checked as far as memory safety needs.
struct CheckedArguments : Arguments {
  Queue slots{};
  std::vector<char> ignored;  // [N]

  explicit CheckedArguments(const Arguments& arguments) : Arguments(arguments) {
    const auto make = [](OptionalTensor& t) {
      if (t) t = t->contiguous();
    };
    embedding = embedding.contiguous(), prototypes = prototypes.contiguous();
    make(positive);
#define SST_FIELD(name) make(name);
    SST_TENSORS(SST_FIELD)
#undef SST_FIELD
    check();
    slots.features = prototypes.const_data_ptr();
    slots.format = format_of(prototypes);
    slots.identity = numbers_of(slot_identity);
    slots.sub_centers = sub_centers;
    slots.K = prototypes.size(0) / sub_centers;
    slots.D = prototypes.size(1);
    slots.mask_empty = mask_empty;
    slots.unit_slope = straight_through && Kind(kind) != Kind::filtered;
    if (window) {
      slots.window = window->const_data_ptr();
      slots.window_size = window->size(1);
      slots.window_identity = numbers_of(window_identity);
      slots.window_start = *window_start->const_data_ptr<int64_t>();
    }
    check_targets();
  }

  int64_t slot_of(int64_t row) const { return target ? target->const_data_ptr<int64_t>()[row] : -1; }

 private:
  void check() const {
    const int64_t N = embedding.size(0), rows = prototypes.size(0), D = prototypes.size(1);
    TORCH_CHECK(embedding.size(1) == D && (target || positive), "margin_softmax: shapes disagree");
    TORCH_CHECK(rows > 0 && rows < (int64_t(1) << 31), "margin_softmax: K must be in [1, 2^31)");
    TORCH_CHECK(
        sub_centers > 0 && sub_centers <= kMaxSubCenters && rows % sub_centers == 0 && (!window || sub_centers == 1),
        "margin_softmax: sub_centers does not fit");
    const int64_t K = rows / sub_centers;
    const auto expect = [&](const OptionalTensor& t, const char* name, at::ScalarType dtype, int64_t count) {
      TORCH_CHECK(
          !t || (t->scalar_type() == dtype && t->numel() == count && t->device().is_cpu()), "margin_softmax: ", name,
          " does not fit");
    };
    expect(target, "target", at::kLong, N);
    expect(identity, "identity", at::kLong, N);
    expect(slot_identity, "slot_identity", at::kLong, K);
    expect(window_start, "window.start", at::kLong, 1);
    expect(scale_rows, "scale", at::kDouble, N);
    TORCH_CHECK(!weight || weight->numel() == N, "margin_softmax: weight does not fit");
    TORCH_CHECK(
        !positive || (positive->dim() == 2 && positive->size(0) == N && positive->size(1) == D),
        "margin_softmax: positive does not fit");
    TORCH_CHECK(
        !margin_rows || (margin_rows->scalar_type() == at::kDouble && margin_rows->size(0) <= kParameters &&
                         margin_rows->size(1) == N),
        "margin_softmax: the margin's parameters do not fit");
    if (!window) return;
    TORCH_CHECK(
        window_start && window->dim() == 3 && window->size(2) == D && window->size(1) <= K && window->size(0) > 0 &&
            N % window->size(0) == 0 && window->scalar_type() == prototypes.scalar_type() &&
            (!slot_identity || window_identity),
        "margin_softmax: the window does not fit");
    expect(window_identity, "window.identities", at::kLong, window->size(1));
    const int64_t start = *window_start->const_data_ptr<int64_t>();
    TORCH_CHECK_INDEX(start >= 0 && start < K, "window.start is ", start, ", expected a slot in [0, ", K, ")");
  }

  void check_targets() {
    const int64_t N = embedding.size(0), K = slots.K;
    ignored.assign(N, 0);
    for (int64_t i = 0; i < N && target; i++) {
      const int64_t y = slot_of(i);
      ignored[i] = y == ignore_index;
      TORCH_CHECK_INDEX(
          ignored[i] || (y >= (positive ? -1 : 0) && y < K), "target[", i, "] is ", y, ", expected a ",
          slots.sub_centers == 1 ? "row number of prototypes" : "class number", " in [0, ", K, ")");
    }
  }
};

}  // namespace sst_fast::cpu
