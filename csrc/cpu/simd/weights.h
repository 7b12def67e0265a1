// From cosines to weights, under a shift that follows the largest logit; weights as sides of the products.
#pragma once

#include "cosines.h"

namespace sst_fast::cpu::SST_NAMESPACE {

// Weights in place of the cosines, as the next product wants them: exp(z - shift), summed up, `wants_phi` times phi
// too; or, `again`, exp(z - lse) - uniform, times the lane's factor. Times the slope of phi.
template <typename E, int NV, typename Phi, bool again>
static void weigh(
    const Slots<SumOf<E>>& slots, const SlotTile<E>& tile, const Lanes<SumOf<E>>& lane, int64_t i0, bool for_moment,
    bool wants_phi, SumOf<E>* cosines, int64_t row, RunningSums<SumOf<E>>* sums) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  constexpr int L = lanes<T>;
  const bool scaled = for_moment && slots.inverse_norm;
  for (int n = 0; n < NV; n++) {
    const int64_t i = i0 + n * L;
    const V scale = load(lane.scale + i), factor = load(lane.factor + i), uniform = load(lane.uniform + i);
    const V shift = again ? load(lane.lse + i) : load(sums->shift + i);
    V rows[kPhiRow], sum{}, phi_sum{};
    load_rows<T, Phi>(lane, i, rows);
    for (int64_t j = 0; j < tile.count; j++) {
      T* at = cosines + j * row + n * L;
      const V c = load(at);
      const auto phi = phi_of<T, Phi>(rows, c);
      V p = exponential(scale * phi.value - shift);
      if constexpr (again) p = (p - uniform) * factor;
      if (!again && wants_phi) phi_sum += c == splat(T(-kInfinityF)) ? V{} : p * phi.value;
      if constexpr (!again && Phi::kIdentity) {
        p = c == splat(T(-kInfinityF)) ? V{} : p;
        sum += p;
      } else {
        const V weighed = slots.unit_slope || Phi::kIdentity ? p : p * phi.slope;
        if constexpr (!again) sum += c == splat(T(-kInfinityF)) ? V{} : p;
        p = c == splat(T(-kInfinityF)) ? V{} : weighed;
      }
      if (scaled) p *= tile.factor[j];
      store(at, p);
    }
    if constexpr (!again)
      for (int l = 0; l < L; l++) sums->total[i + l] += double(sum[l]), sums->weighed_phi[i + l] += double(phi_sum[l]);
  }
}

// Raises a probe's shift only when its logits have outgrown it by much: rescaling the moments costs D each. `moment`:
// null while there is none.
template <typename T, int NV>
static void raise(const typename Vector<T>::type* highest, int64_t i0, int64_t D, RunningSums<T>& sums, T* moment) {
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  constexpr int L = lanes<T>, W = NV * L;
  constexpr T slack = 8;
  bool raised = false;
  V factor[NV];
  for (int n = 0; n < NV; n++) {
    const V old = load(sums.shift + i0 + n * L);
    const I grow = highest[n] > old + slack;
    for (int l = 0; l < L; l++) raised |= grow[l] != 0;
    const V next = grow ? highest[n] : old;
    factor[n] = grow ? exponential(old - next) : splat(T(1));  // old = -inf: 0
    store(sums.shift + i0 + n * L, next);
  }
  if (!raised) return;
  for (int n = 0; n < NV; n++)
    for (int l = 0; l < L; l++) {
      sums.total[i0 + n * L + l] *= double(factor[n][l]);
      sums.weighed_phi[i0 + n * L + l] *= double(factor[n][l]);
    }
  for (int64_t d = 0; moment && d < D; d++)
    for (int n = 0; n < NV; n++) {
      T* p = moment + d * W + n * L;
      store(p, load(p) * factor[n]);
    }
}

// Weights [slot][probe] as the right side of product 2, in place: themselves, or neighbouring slots in pairs.
template <typename E, int NV>
static const E* weights_along_slots(SumOf<E>* p, int64_t count) {
  if constexpr (Element<E>::kEach == 1) {
    return p;
  } else {
#ifdef SST_BF16
    typedef Vector<float>::mask I;
    constexpr int L = lanes<float>, W = NV * L;
    for (int64_t j = 0; j < count; j += 2)
      for (int i = 0; i < W; i += L) {
        const I even = __builtin_convertvector(rounded(p + j * W + i), I);
        const I odd = j + 1 < count ? __builtin_convertvector(rounded(p + (j + 1) * W + i), I) : I{};
        const I pair = even | odd << 16;
        __builtin_memcpy(p + j / 2 * W + i, &pair, sizeof pair);
      }
#endif
    return reinterpret_cast<const E*>(p);
  }
}

// The weights of a block [slot][kBlock] as the left side of product 3: themselves, or neighbouring probes in pairs.
template <typename E>
static const E* weights_along_probes(SumOf<E>* p, int64_t count) {
#ifdef SST_BF16
  if constexpr (Element<E>::kEach > 1)
    for (int64_t i = 0; i < count * kBlock; i += lanes<float>) {
      const Halves half = rounded(p + i);
      __builtin_memcpy(reinterpret_cast<char*>(p) + 2 * i, &half, sizeof half);
    }
#endif
  return reinterpret_cast<const E*>(p);
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
