// The arithmetic of the ring buffer, shared by CPU and CUDA code.
#pragma once

#include "margin.h"  // SST_HD

namespace sst_fast {

// state[kPosition]: slot that is written next; state[kFill]: number of slots that hold a feature.
constexpr int kPosition = 0, kFill = 1;

SST_HD int64_t ring_slot(int64_t start, int64_t offset, int64_t K) {
  const int64_t slot = start + offset;  // 0 <= start < K, 0 <= offset <= K
  return slot < K ? slot : slot - K;
}

SST_HD int64_t ring_oldest(int64_t position, int64_t fill, int64_t K) {
  return position >= fill ? position - fill : position - fill + K;
}

// A shorter row has no direction: its cosine is 0 with everything, and its gradient is 0.
constexpr double kMinNorm = 1e-12;

// Factor that makes a row of this norm a unit row; a vanishing row becomes zero.
template <typename T>
SST_HD T normaliser(T norm) {
  return norm < T(kMinNorm) ? T(0) : T(1) / norm;
}

}  // namespace sst_fast
