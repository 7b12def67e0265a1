// Product 1 and what is read off it: cosines of a tile and a panel, masks, statistics.
#pragma once

#include "probes.h"
#include "slots.h"

namespace sst_fast::cpu::SST_NAMESPACE {

// E per pass of product 1: its right side, as wide as the widest panel, takes at most 16 KiB of the first-level cache.
constexpr int kDepth = SST_NV * SST_VECTOR_BYTES > 128 ? 64 : 128;
constexpr int kShortSum = 16;  // E per pass where sums are added up with compensation
constexpr float kExact = 64;   // beyond this scale float cosines are summed with compensation

// Whether the rounding of cosines, times the scale, would show in the weights.
template <typename E>
static bool wants_exact(const Lanes<SumOf<E>>& lane, int64_t rows) {
  bool large = false;
  for (int64_t i = 0; i < rows; i++) large |= lane.scale[i] > kExact;
  return large && Element<E>::kFormat == Format::f32;
}

// Product 1: cosines [slot][probe] of a tile and a panel, slots `row` numbers apart; in pairs not yet divided by the
// probe's norm. `parts` [2, slot, probe]: their rounding would show (kExact), so short sums are added up with
// compensation; null: plainly.
template <typename E, int NV>
static void tile_cosines(SlotTile<E>& tile, const E* x, int64_t D, SumOf<E>* cosines, int64_t row, SumOf<E>* parts) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  constexpr int W = NV * lanes<T>;
  const int64_t length = D / Element<E>::kEach, depth = parts ? kShortSum : kDepth;
  T *part = parts, *error = parts + tile.count * W;
  for (int64_t k = 0; k < length; k += depth) {
    const bool first = k == 0, apart = parts && !first;
    multiply<E, NV>(
        tile.w + k, length, 1, tile.count, x + k * W, W, length - k < depth ? length - k : depth,
        apart ? part : cosines, apart ? W : row, !parts && !first, &tile.next);
    for (int64_t j = 0; apart && j < tile.count; j++)
      for (int64_t i = 0; i < W; i += lanes<T>) {
        T *sums = cosines + j * row + i, *lost = error + j * W + i;
        const V old = load(sums), more = load(part + j * W + i), sum = old + more, seen = sum - old;
        const V missing = (old - (sum - seen)) + (more - seen);
        store(lost, k == depth ? missing : load(lost) + missing);
        store(sums, sum);
      }
  }
  for (int64_t j = 0; parts && length > depth && j < tile.count; j++)
    for (int64_t i = 0; i < W; i += lanes<T>)
      store(cosines + j * row + i, load(cosines + j * row + i) + load(error + j * W + i));
}

// phi and its slope for one vector of cosines. Where phi has an exponential of its own, the error of that is multiplied
// by the scale, so it is found in double.
template <typename T, typename Phi>
SST_INLINE Value<typename Vector<T>::type> phi_of(const typename Vector<T>::type* rows, typename Vector<T>::type c) {
  typedef typename Vector<T>::type V;
  if constexpr (Phi::kExp) {
    typedef typename Vector<T>::wide W;
    W row[kPhiRow];
    for (int q = 0; q < Phi::kRow; q++) row[q] = __builtin_convertvector(rows[q], W);
    const W wide = __builtin_convertvector(c, W);
    const W e = exponential_of_doubles(Phi::exponent(wide, row));
    return {__builtin_convertvector(Phi::value(wide, row, e), V), __builtin_convertvector(Phi::slope(wide, row, e), V)};
  } else {
    return {Phi::value(c, rows, V{}), Phi::slope(c, rows, V{})};
  }
}

template <typename T, typename Phi>
SST_INLINE void load_rows(const Lanes<T>& lane, int64_t i, typename Vector<T>::type* rows) {
  for (int q = 0; q < Phi::kRow; q++) rows[q] = load(lane.phi[q] + i);
}

// Over the slots seen so far, each [probe of a block].
template <typename T>
struct RunningSums {
  T shift[Lanes<T>::kCount];
  double total[Lanes<T>::kCount], phi[Lanes<T>::kCount], weighed_phi[Lanes<T>::kCount], hard_sum[Lanes<T>::kCount];
  int64_t hard[Lanes<T>::kCount];

  void clear(int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      shift[i] = T(-kInfinityF);
      total[i] = phi[i] = weighed_phi[i] = hard_sum[i] = 0;
      hard[i] = 0;
    }
  }
};

// Of a slot's rows the nearest keeps its cosine, the first of equally near ones; the others' become -infinity. Cosines
// are those of unit rows afterwards.
template <typename E, int NV>
static void keep_nearest(
    const Slots<SumOf<E>>& slots, const SlotTile<E>& tile, const Lanes<SumOf<E>>& lane, int64_t i0, SumOf<E>* cosines,
    int64_t row) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  typedef typename Vector<T>::integer Int;
  constexpr int L = lanes<T>;
  const int64_t S = slots.sub_centers;
  for (int n = 0; n < NV; n++) {
    const V inverse = Element<E>::kEach > 1 ? load(lane.inverse + i0 + n * L) : splat(T(1));
    for (int64_t j0 = 0; j0 < tile.count; j0 += S) {
      T* at = cosines + j0 * row + n * L;
      const auto unit = [&](int64_t s) {
        const V c = load(at + s * row) * inverse;
        return slots.inverse_norm ? c * tile.factor[j0 + s] : c;
      };
      V largest = unit(0);
      I nearest{};
      for (int64_t s = 1; s < S; s++) {
        const V c = unit(s);
        const I nearer = (c > largest) | (c != c);  // what is not a number stays one
        largest = nearer ? c : largest;
        nearest = nearer ? I{} + Int(s) : nearest;
      }
      for (int64_t s = 0; s < S; s++) store(at + s * row, nearest == Int(s) ? largest : splat(T(-kInfinityF)));
    }
  }
}

// Finishes the cosines of a tile and a panel: masked ones become -infinity. `counts`: lanes and sums take note of what
// is there, and `highest` [NV] becomes at least the largest logit of the tile.
template <typename E, int NV, typename Phi, bool counts>
static void mask_cosines(
    const Slots<SumOf<E>>& slots, const SlotTile<E>& tile, Lanes<SumOf<E>>& lane, int64_t i0, bool wants_phi,
    SumOf<E>* cosines, int64_t row, RunningSums<SumOf<E>>* sums, typename Vector<SumOf<E>>::type* highest) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  typedef typename Vector<T>::integer Int;
  constexpr int L = lanes<T>;
  constexpr bool plain = Phi::kIdentity, mining = Phi::kHard;
  const V masked = splat(T(-kInfinityF));
  const I same = lane.identities && slots.identity ? ~I{} : I{};
  const bool several = slots.sub_centers > 1, scaled = slots.inverse_norm && !several;
  if (several) keep_nearest<E, NV>(slots, tile, lane, i0, cosines, row);
  for (int n = 0; n < NV; n++) {
    const int64_t i = i0 + n * L;
    const V inverse = several ? splat(T(1)) : load(lane.inverse + i), a = load(lane.target_cosine + i),
            scale = load(lane.scale + i);
    const I target = load_mask<T>(lane.target + i);
    const I low = load_mask<T>(lane.id_low + i), high = load_mask<T>(lane.id_high + i);
    V rows[kPhiRow];
    load_rows<T, Phi>(lane, i, rows);
    V top = load(lane.hardest + i), largest = masked, phi_sum{}, hard_sum{};
    I slot = load_mask<T>(lane.hardest_slot + i), beats = load_mask<T>(lane.beats + i);
    I live = load_mask<T>(lane.live + i), hard{};
    for (int64_t j = 0; j < tile.count; j++) {
      T* at = cosines + j * row + n * L;
      if (tile.empty[j]) {
        store(at, masked);
        continue;
      }
      V c = load(at);
      if constexpr (Element<E>::kEach > 1) c *= inverse;
      if (scaled) c *= tile.factor[j];
      const Int number = Int(tile.slot[j]);
      const I twin = (low == Int(tile.id_low[j])) & (high == Int(tile.id_high[j])) & same;
      const I out = (target == number) | twin;
      c = out ? masked : c;
      store(at, c);
      if constexpr (!counts) continue;
      const I higher = c > top;
      top = higher ? c : top;
      slot = higher ? (I{} + number) : slot;
      beats -= c > a;
      live += 1 + out;
      if (!plain || wants_phi) {
        const V phi = phi_of<T, Phi>(rows, c).value, z = c == masked ? masked : scale * phi;
        largest = z > largest ? z : largest;
        if (wants_phi) phi_sum += c == masked ? V{} : phi;
      }
      if constexpr (mining) {
        const I beyond = c > rows[0];
        hard -= beyond;
        hard_sum += beyond ? c : V{};
      }
    }
    if constexpr (!counts) continue;
    store(lane.hardest + i, top);
    __builtin_memcpy(lane.hardest_slot + i, &slot, sizeof slot);
    __builtin_memcpy(lane.beats + i, &beats, sizeof beats);
    __builtin_memcpy(lane.live + i, &live, sizeof live);
    highest[n] = plain ? scale * top : largest;  // the hardest slot so far: shifts only grow
    for (int l = 0; l < L; l++) {
      if constexpr (mining) sums->hard_sum[i + l] += double(hard_sum[l]), sums->hard[i + l] += hard[l];
      if (wants_phi) sums->phi[i + l] += double(phi_sum[l]);
    }
  }
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
