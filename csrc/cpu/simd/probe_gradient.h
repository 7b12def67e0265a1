// The gradient of the probes from the moments that the sweep has left.
#pragma once

#include "probes.h"

namespace sst_fast::cpu::SST_NAMESPACE {

template <typename E>
static int64_t finish_bytes(int64_t D) {
  typedef SumOf<E> T;
  const int64_t width = kPanel * lanes<T>;
  return int64_t(sizeof(T)) * (width * D + kPiece * width) + int64_t(sizeof(double)) * 2 * D + 5 * 64;
}

// The chunks' moments of one panel, weighed and added up, as rows [probe][d].
template <typename T, int NV>
static void add_chunks(const Moments<T>& moments, int64_t i0, int64_t D, T* piece, T* rows) {
  typedef typename Vector<T>::type V;
  constexpr int L = lanes<T>, W = NV * L;
  for (int64_t d0 = 0; d0 < D; d0 += kPiece) {
    const int64_t count = D - d0 < kPiece ? D - d0 : kPiece;
    for (int64_t c = 0; c < moments.chunks; c++) {
      V share[NV];
      for (int n = 0; n < NV; n++) share[n] = load(moments.share + c * kBlock + i0 + n * L);
      const T* moment = moments.moment[c] + i0 * D + d0 * W;
      for (int64_t d = 0; d < count; d++)
        for (int n = 0; n < NV; n++) {
          T* sum = piece + d * W + n * L;
          // A chunk without a share adds nothing, whatever its moment.
          const V more = share[n] == V{} ? V{} : share[n] * load(moment + d * W + n * L);
          store(sum, c ? load(sum) + more : more);
        }
    }
    for (int64_t i = 0; i < W; i++)
      for (int64_t d = 0; d < count; d++) rows[i * D + d0 + d] = piece[d * W + i];
  }
}

// The rest of one probe's gradient; scratch [2 D].
template <typename T>
static void project(
    const Probes<T>& probes, const Moments<T>& moments, int64_t i, int64_t D, const T* sum, double* scratch,
    T* gradient) {
  double* __restrict x = scratch, * __restrict whole = scratch + D;
  read(probes.features, probes.format, i * D, D, x);
  read(moments.target[i], moments.target_format, 0, D, whole);
  const double scale = moments.scale[i], slope = moments.target_slope[i], inverse = probes.inverse_norm[i];
  for (int64_t d = 0; d < D; d++) {
    whole[d] = scale * double(sum[d]) + slope * whole[d];
    x[d] *= inverse;
  }
  const double along = sum_over(D, [&](int64_t d) { return whole[d] * x[d]; });
  for (int64_t d = 0; d < D; d++) gradient[d] = T((whole[d] - along * x[d]) * inverse);
}

template <typename E>
static void finish(
    const Probes<SumOf<E>>& probes, const Moments<SumOf<E>>& moments, int64_t D, void* scratch, SumOf<E>* gradient) {
  typedef SumOf<E> T;
  with_panel<T>(probes.rows, [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value, W = NV * lanes<T>;
    char* at = static_cast<char*>(scratch);
    T *rows = take<T>(at, W * D), *piece = take<T>(at, kPiece * W);
    double* doubles = take<double>(at, 2 * D);
    for (int64_t i0 = 0; i0 < probes.rows; i0 += W) {
      add_chunks<T, NV>(moments, i0, D, piece, rows);
      for (int64_t i = i0; i < probes.rows && i < i0 + W; i++)
        if (moments.target[i])
          project(probes, moments, i, D, rows + (i - i0) * D, doubles, gradient + i * D);
        else
          for (int64_t d = 0; d < D; d++) gradient[i * D + d] = 0;
    }
  });
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
