// The storage of a tensor, as the sweeps name it.
#pragma once

#include <ATen/core/Tensor.h>

#include "sweep.h"

namespace sst_fast::cpu {

inline Storage storage_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Storage::f64;
    case at::kFloat:
      return Storage::f32;
    case at::kBFloat16:
      return Storage::bf16;
    case at::kHalf:
      return Storage::f16;
    case at::kFloat8_e4m3fn:
      return Storage::f8;
    default:
      TORCH_CHECK(false, "margin_softmax: dtype ", t.scalar_type(), " has no CPU kernel");
  }
}

}  // namespace sst_fast::cpu
