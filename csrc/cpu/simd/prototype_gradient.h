// The gradient of the prototypes: all probes over a chunk of rows, once the log-sum-exps are known.
#pragma once

#include "sweep.h"

namespace sst_fast::cpu::SST_NAMESPACE {

// Writes row j of the prototypes' gradient. `sum` [padded D] is what a unit row would get; where the row was normalised
// inside, the projection of that is still missing.
template <typename E>
static void write_gradient(
    const SlotTile<E>& tile, int64_t j, int64_t D, bool project, const SumOf<E>* sum, Format format, void* gradient) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  const int64_t at = (tile.first + j) * D;
  if (!project) return write(sum, D, gradient, format, at);
  T w[kPiece] = {};
  auto piece = [&](int64_t d0) {  // loads the row's features from d0 on
    const int64_t count = D - d0 < kPiece ? D - d0 : kPiece;
    for (int64_t d = 0; d < count; d++)
      if constexpr (Element<E>::kEach == 1)
        w[d] = tile.w[j * D + d0 + d];
      else
        w[d] = element<T>(tile.w, Format::bf16, j * D + d0 + d);
    return count;
  };
  double along = 0;
  for (int64_t d0 = 0; d0 < D; d0 += kPiece) {
    const int64_t count = piece(d0);
    V dot{};
    int64_t d = 0;
    for (; d + lanes<T> <= count; d += lanes<T>) dot += load(sum + d0 + d) * load(w + d);
    for (int l = 0; l < lanes<T>; l++) along += double(dot[l]);
    for (; d < count; d++) along += double(sum[d0 + d]) * double(w[d]);
  }
  const T inverse = tile.factor[j], share = T(along * double(inverse) * double(inverse));
  for (int64_t d0 = 0; d0 < D; d0 += kPiece) {
    const int64_t count = piece(d0);
    for (int64_t d = 0; d < count; d++) w[d] = (sum[d0 + d] - share * w[d]) * inverse;
    write(w, count, gradient, format, at + d0);
  }
}

// Product 3, for trainable prototypes: gradient_j[d] = sum_i P[j][i] x_i[d], where P at the target is the probe's
// `target_weight`.
template <typename E>
static void run_prototypes(
    Kind kind, const Probes<SumOf<E>>* blocks, int64_t blocks_count, const Slots<SumOf<E>>& slots, int64_t first,
    int64_t last, void* scratch, Format format, void* gradient) {
  typedef SumOf<E> T;
  constexpr int NV = kPanel, W = NV * lanes<T>, each = Element<E>::kEach;
  static_assert(kBlock % W == 0);
  const int64_t D = slots.D, wide = padded(D, W), step = even_tile(last - first, D, slots.sub_centers);
  char* at = static_cast<char*>(scratch);
  T *weights = take<T>(at, kMaxTile * kBlock), *parts = take<T>(at, 2 * kMaxTile * W);
  E* copy = take<E>(at, tile_rows(D) * D / each);
  T* sums = take<T>(at, tile_rows(D) * wide);
  Lanes<T> lane;
  SlotTile<E> tile;
  for (int64_t j0 = first; j0 < last; j0 += step) {
    load_tile(slots, j0, last - j0 < step ? last - j0 : step, last, true, copy, tile);
    for (int64_t block = 0; block < blocks_count; block++) {
      const Probes<T>& probes = blocks[block];
      load_lanes(probes, padded(probes.rows, W), lane);
      // In pairs rows are not normalised: their weights are.
      if constexpr (each > 1)
        for (int64_t i = 0; i < padded(probes.rows, W); i++) lane.factor[i] *= lane.inverse[i];
      T* exact = wants_exact<E>(lane, probes.rows) ? parts : nullptr;
      for (int64_t i0 = 0; i0 < probes.rows; i0 += W) {
        tile_cosines<E, NV>(tile, static_cast<const E*>(probes.packed) + i0 * D / each, D, weights + i0, kBlock, exact);
        with_phi(kind, [&](auto phi) {
          using Phi = decltype(phi);
          mask_cosines<E, NV, Phi, false>(slots, tile, lane, i0, false, weights + i0, kBlock, nullptr, nullptr);
          weigh<E, NV, Phi, true>(slots, tile, lane, i0, false, false, weights + i0, kBlock, nullptr);
        });
      }
      for (int64_t i = 0; i < probes.rows; i++) {
        const int64_t j = probes.target_row[i] - j0;
        if (j >= 0 && j < tile.count)
          weights[j * kBlock + i] = each == 1 ? probes.target_weight[i] : probes.target_weight[i] * lane.inverse[i];
      }
      const E *left = weights_along_probes<E>(weights, tile.count), *rows = packed_rows<E>(probes, D);
      for (int64_t d = 0; d < wide; d += W)
        multiply<E, NV>(
            left, kBlock / each, 1, tile.count, rows + d * kBlock / each, W, (probes.rows + each - 1) / each, sums + d,
            wide, block > 0);
    }
    for (int64_t j = 0; j < tile.count; j++)
      write_gradient<E>(tile, j, D, slots.inverse_norm != nullptr, sums + j * wide, format, gradient);
  }
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
