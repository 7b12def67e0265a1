// The arithmetic of the ring buffer, shared by CPU and CUDA code.
#pragma once

#include "margin.h"  // SST_HD

namespace sst_fast {

// The ring's state, int64 [4]: the slot that is written next; the number of slots that hold a feature; a counter of the
// CUDA kernel's, 0 between launches; how many rows were rejected because they were not finite.
constexpr int kPosition = 0, kFill = 1, kTickets = 2, kRejected = 3, kState = 4;

// Where nobody can raise an exception: a number outside [0, count) is taken as the nearest in it.
SST_HD int64_t held_in(int64_t number, int64_t count) { return number < 0 ? 0 : number < count ? number : count - 1; }

// Position and fill likewise: what lies outside the ring is taken as its nearest end.
SST_HD int64_t ring_position(const volatile int64_t* state, int64_t K) { return held_in(state[kPosition], K); }

SST_HD int64_t ring_fill(const volatile int64_t* state, int64_t K) { return held_in(state[kFill], K + 1); }

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
