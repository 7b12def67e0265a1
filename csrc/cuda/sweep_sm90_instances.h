// All sweeps of one kind of queue: compiled in a source file each, side by side, as each takes its time.
#pragma once

#include "sweep_sm90.h"

namespace sst_fast::cuda {

template <typename Queue>
SweepKernel sweep_kernel_of(int D, Kind kind, bool moment) {
  return with_phi(kind, [&](auto phi) -> SweepKernel {
    using Phi = decltype(phi);
    const auto of = [&](auto dim) -> SweepKernel {
      constexpr int dims = decltype(dim)::value;
      const int bytes = sizeof(Shared<Element<Queue>, dims>) + 1024;  // to begin at a multiple of 1,024
      return {moment ? sweep_kernel<Queue, dims, Phi, true> : sweep_kernel<Queue, dims, Phi, false>, bytes};
    };
    if constexpr (!kBytes<Queue>)
      if (D == 128) return of(std::integral_constant<int, 128>());
    if (D == 256) return of(std::integral_constant<int, 256>());
    if (D == 512) return of(std::integral_constant<int, 512>());
    return {};
  });
}

}  // namespace sst_fast::cuda
