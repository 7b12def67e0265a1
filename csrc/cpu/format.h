// The format of a tensor's numbers, as the sweeps name it.
#pragma once

#include <ATen/core/Tensor.h>

#include "sweep.h"

namespace sst_fast::cpu {

inline Format format_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Format::f64;
    case at::kFloat:
      return Format::f32;
    case at::kBFloat16:
      return Format::bf16;
    case at::kHalf:
      return Format::f16;
    case at::kFloat8_e4m3fn:
      return Format::f8;
    default:
      TORCH_CHECK(false, "dtype ", t.scalar_type(), " has no CPU kernel");
  }
}

}  // namespace sst_fast::cpu
