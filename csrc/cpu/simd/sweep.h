// The forward sweep: one block of probes over a chunk of slots.
#pragma once

#include "weights.h"

namespace sst_fast::cpu::SST_NAMESPACE {

// The rows of a chunk in tiles of about the same size, so that none is too small to be worth its pass over the moments.
static int64_t even_tile(int64_t count, int64_t D, int64_t sub_centers) {
  const int64_t unit = row_unit(sub_centers, tile_rows(D)), most = tile_rows(D) / unit * unit;
  const int64_t tiles = (count + most - 1) / most;
  return padded((count + tiles - 1) / tiles, unit);
}

template <typename E>
static int64_t scratch_bytes(int64_t D, bool for_prototypes) {
  typedef SumOf<E> T;
  const int64_t tile = tile_rows(D), width = kPanel * lanes<T>;
  const int64_t cosines = kMaxTile * (for_prototypes ? kBlock : width), parts = 2 * kMaxTile * width;
  const int64_t sums = for_prototypes ? tile * padded(D, width) : 0;
  const int64_t copies = tile * D * int64_t(sizeof(E));  // in pairs two of them, of half the bytes
  return int64_t(sizeof(T)) * (cosines + parts + sums) + copies + 5 * 64;
}

template <typename E>
static int64_t moment_bytes(int64_t rows, int64_t D) {
  typedef SumOf<E> T;
  return int64_t(sizeof(T)) * padded(rows, panel_vectors<T>(rows) * lanes<T>) * D;
}

template <typename E, int NV, typename Phi>
static void sweep(
    const Probes<SumOf<E>>& probes, const Slots<SumOf<E>>& slots, int64_t first, int64_t last, void* scratch,
    Partial<SumOf<E>>& out) {
  typedef SumOf<E> T;
  constexpr int each = Element<E>::kEach;
  constexpr int W = NV * lanes<T>;  // probes in a panel
  const int64_t D = slots.D, step = even_tile(last - first, D, slots.sub_centers);

  char* at = static_cast<char*>(scratch);
  T *cosines = take<T>(at, kMaxTile * W), *parts = take<T>(at, 2 * kMaxTile * W);
  E* copy = take<E>(at, tile_rows(D) * D / each);
  E* pairs = take<E>(at, each == 1 ? 0 : tile_rows(D) * D / each);

  Lanes<T> lane;
  load_lanes(probes, padded(probes.rows, W), lane);
  if (!wants_exact<E>(lane, probes.rows)) parts = nullptr;
  RunningSums<T> sums;
  sums.clear(padded(probes.rows, W));

  SlotTile<E> tile;
  for (int64_t j0 = first; j0 < last; j0 += step) {
    load_tile(slots, j0, last - j0 < step ? last - j0 : step, last, false, copy, tile);
    const E* left = out.moment ? along_slots(tile, D, pairs) : nullptr;
    for (int64_t i0 = 0; i0 < probes.rows; i0 += W) {
      T* moment = out.moment ? out.moment + i0 * D : nullptr;
      tile_cosines<E, NV>(tile, static_cast<const E*>(probes.packed) + i0 * D / each, D, cosines, W, parts);
      if (probes.lse) {
        mask_cosines<E, NV, Phi, false>(slots, tile, lane, i0, false, cosines, W, nullptr, nullptr);
        weigh<E, NV, Phi, true>(slots, tile, lane, i0, true, false, cosines, W, nullptr);
      } else {
        typename Vector<T>::type highest[NV];
        mask_cosines<E, NV, Phi, true>(slots, tile, lane, i0, out.wants_phi, cosines, W, &sums, highest);
        raise<T, NV>(highest, i0, D, sums, j0 == first ? nullptr : moment);
        weigh<E, NV, Phi, false>(slots, tile, lane, i0, true, out.wants_weighed_phi, cosines, W, &sums);
      }
      if (moment)
        multiply<E, NV>(
            left, 1, D, D, weights_along_slots<E, NV>(cosines, tile.count), W, (tile.count + each - 1) / each, moment,
            W, j0 != first);
    }
  }
  for (int64_t i = 0; i < probes.rows; i++) {
    out.shift[i] = sums.shift[i];
    out.sum[i] = sums.total[i];
    out.phi[i] = sums.phi[i];
    out.weighed_phi[i] = sums.weighed_phi[i];
    out.hard_sum[i] = sums.hard_sum[i];
    out.hard[i] = sums.hard[i];
    out.live[i] = lane.live[i] / slots.sub_centers;  // what masks a row masks its whole slot
    out.hardest[i] = lane.hardest[i];
    out.hardest_slot[i] = lane.hardest_slot[i];
    out.beats[i] = lane.beats[i];
  }
}

template <typename E>
static void run(
    Kind kind, const Probes<SumOf<E>>& probes, const Slots<SumOf<E>>& slots, int64_t first, int64_t last, void* scratch,
    Partial<SumOf<E>>& out) {
  with_phi(kind, [&](auto phi) {
    with_panel<SumOf<E>>(probes.rows, [&](auto vectors) {
      sweep<E, decltype(vectors)::value, decltype(phi)>(probes, slots, first, last, scratch, out);
    });
  });
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
