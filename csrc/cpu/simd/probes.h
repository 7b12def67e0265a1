// A block of probes as the sweep holds them: packed for the products, a lane each for everything else.
#pragma once

#include "products.h"

namespace sst_fast::cpu::SST_NAMESPACE {

constexpr int kPanel = SST_NV;  // vectors in the widest panel of probes

// A block's probes, one lane each, padded with lanes that match nothing.
template <typename T>
struct Lanes {
  typedef typename Vector<T>::integer Int;
  static constexpr int kCount = kBlock + kPanel * lanes<T>;
  T inverse[kCount];  // what the lane's cosines are multiplied by
  T scale[kCount], target_cosine[kCount], phi[kPhiRow][kCount], lse[kCount], uniform[kCount], factor[kCount];
  T hardest[kCount];
  Int target[kCount], id_low[kCount], id_high[kCount], hardest_slot[kCount], beats[kCount], live[kCount];
  bool identities;
};

// `count`: a multiple of the panel's width.
template <typename T>
static void load_lanes(const Probes<T>& probes, int64_t count, Lanes<T>& to) {
  typedef typename Vector<T>::integer Int;
  to.identities = probes.identity != nullptr;
  for (int64_t i = 0; i < count; i++) {
    const bool real = i < probes.rows;
    to.inverse[i] = real ? T(probes.inverse_norm[i] * probes.unit[i]) : T(0);
    to.scale[i] = real ? probes.scale[i] : T(1);
    to.target_cosine[i] = real ? probes.target_cosine[i] : T(0);
    for (int q = 0; q < kPhiRow; q++) to.phi[q][i] = real ? probes.phi[i * kPhiRow + q] : T(0);
    to.lse[i] = real && probes.lse ? probes.lse[i] : T(0);
    to.uniform[i] = real && probes.uniform ? probes.uniform[i] : T(0);
    to.factor[i] = real ? (probes.factor ? probes.factor[i] : T(1)) : T(0);
    to.target[i] = real ? Int(probes.target[i]) : Int(-1);
    // Identities are compared as two 32-bit halves; a negative one (never a slot's, -1 apart) matches nothing.
    const int64_t id = real && probes.identity ? probes.identity[i] : -2;
    to.id_low[i] = Int(int32_t(id & 0xffffffff));
    to.id_high[i] = Int(int32_t(id >> 32));
    to.hardest[i] = T(-kInfinityF);
    to.hardest_slot[i] = -1;
    to.beats[i] = to.live[i] = 0;
  }
}

// Some features of probe i as products see them: normalised, or in pairs divided by a power of two, which is exact.
// Zero beyond the last feature or probe, and in rows without a direction, whatever they hold.
constexpr int kPiece = 64;  // features at a time: a panel's pieces stay in the first-level cache while they are packed

template <typename E>
static void probe_features(const Probes<SumOf<E>>& probes, int64_t D, int64_t i, int64_t d0, SumOf<E>* to) {
  const int64_t count = D - d0 < kPiece ? D - d0 : kPiece;
  for (int64_t d = 0; d < kPiece; d++) to[d] = 0;
  if (i >= probes.rows || probes.inverse_norm[i] == 0) return;
  const double factor = Element<E>::kEach == 1 ? probes.inverse_norm[i] : 1 / probes.unit[i];
  with_format(probes.format, [&](auto format) {
    for (int64_t d = 0; d < count; d++)
      to[d] = SumOf<E>(element<double>(probes.features, decltype(format)::value, i * D + d0 + d) * factor);
  });
}

// Probes as [panel][d][probe], neighbouring features in pairs.
template <typename E>
static void pack_columns(const Probes<SumOf<E>>& probes, int64_t D, int64_t width, E* x) {
  constexpr int each = Element<E>::kEach;
  SumOf<E> some[kPiece];
  for (int64_t i0 = 0; i0 < probes.rows; i0 += width)
    for (int64_t d0 = 0; d0 < D; d0 += kPiece)
      for (int64_t i = 0; i < width; i++) {
        probe_features<E>(probes, D, i0 + i, d0, some);
        E* column = x + (i0 * D + d0 * width) / each + i;
        for (int64_t d = 0; d < kPiece && d0 + d < D; d += each)
          column[d / each * width] = as_element<E>(some[d], some[d + each - 1]);
      }
}

// Vectors in a panel of probes. Few probes: narrower panels, so that fewer lanes idle.
template <typename T>
static int panel_vectors(int64_t rows) {
  return rows <= lanes<T> ? 1 : kPanel > 2 && rows <= 2 * lanes<T> ? 2 : kPanel;
}

template <int NV>
struct Vectors {
  static constexpr int value = NV;
};

// Calls f with their number as a constant.
template <typename T, typename F>
SST_INLINE void with_panel(int64_t rows, F f) {
  const int vectors = panel_vectors<T>(rows);
  if (vectors == 1) return f(Vectors<1>{});
  if (kPanel > 2 && vectors == 2) return f(Vectors<2>{});
  f(Vectors<kPanel>{});
}

// For product 3 panels are of the widest kind, and after them come the same probes as [panel of features][probe][d].
template <typename T>
static int64_t panel_width(int64_t rows, bool for_prototypes) {
  return (for_prototypes ? kPanel : panel_vectors<T>(rows)) * lanes<T>;
}

template <typename E>
static int64_t pack_bytes(int64_t rows, int64_t D, bool for_prototypes) {
  const int64_t width = panel_width<SumOf<E>>(rows, for_prototypes), bytes = int64_t(sizeof(E)) / Element<E>::kEach;
  return bytes * (padded(rows, width) * D + (for_prototypes ? kBlock * padded(D, width) : 0));
}

template <typename E>
static const E* packed_rows(const Probes<SumOf<E>>& probes, int64_t D) {
  return static_cast<const E*>(probes.packed) + padded(probes.rows, kPanel * lanes<SumOf<E>>) * D / Element<E>::kEach;
}

template <typename E>
static void pack(const Probes<SumOf<E>>& probes, int64_t D, bool for_prototypes, void* packed) {
  constexpr int each = Element<E>::kEach;
  const int64_t width = panel_width<SumOf<E>>(probes.rows, for_prototypes), wide = padded(D, width);
  E* columns = static_cast<E*>(packed);
  pack_columns(probes, D, width, columns);
  if (!for_prototypes) return;
  E* rows = columns + padded(probes.rows, width) * D / each;
  SumOf<E> some[each][kPiece];
  for (int64_t i = 0; i < probes.rows; i += each)
    for (int64_t d0 = 0; d0 < wide; d0 += kPiece) {
      for (int e = 0; e < each; e++) probe_features<E>(probes, D, i + e, d0, some[e]);
      for (int64_t d = d0; d < wide && d < d0 + kPiece; d++)
        rows[(d / width * kBlock + i) / each * width + d % width] =
            as_element<E>(some[0][d - d0], some[each - 1][d - d0]);
    }
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
