// What is done row by row, N x D operations, in double: norms, scaled copies, the target cosine.
#pragma once

#include "formats.h"

namespace sst_fast::cpu::SST_NAMESPACE {

constexpr int kRead = 256;  // numbers read at a time

// NaN where one is NaN.
static double largest_of(const double* x, int64_t D) {
  constexpr int kSide = 8;
  double most[kSide] = {};
  for (int64_t d = 0; d < D; d += kSide)
    for (int i = 0; i < kSide && d + i < D; i++) {
      const double size = __builtin_fabs(x[d + i]);
      most[i] = size <= most[i] ? most[i] : size;
    }
  double largest = 0;
  for (double each : most) largest = each <= largest ? largest : each;
  return largest;
}

// Norm of a row that is read in pieces: piece(d0, count) gives those from d0 on. Where squares would overflow or vanish
// it is found in units of the row's largest feature.
template <typename F>
SST_INLINE double norm_of(int64_t D, F piece) {
  const auto square = [&](double factor) {
    double sum = 0;
    for (int64_t d0 = 0; d0 < D; d0 += kRead) {
      const int64_t count = D - d0 < kRead ? D - d0 : kRead;
      const double* x = piece(d0, count);
      sum += sum_over(count, [&](int64_t d) { return (x[d] * factor) * (x[d] * factor); });
    }
    return sum;
  };
  const double plain = square(1);
  if (plain > 1e-280 && plain < 1e280) return __builtin_sqrt(plain);
  double largest = 0;
  for (int64_t d0 = 0; d0 < D; d0 += kRead) {
    const int64_t count = D - d0 < kRead ? D - d0 : kRead;
    const double here = largest_of(piece(d0, count), count);
    largest = here <= largest ? largest : here;
  }
  if (!(largest > 0 && largest < double(kInfinityF))) return __builtin_sqrt(plain);
  return largest * __builtin_sqrt(square(1 / largest));
}

static void norms(const void* features, Format format, int64_t D, int64_t first, int64_t last, double* to) {
  double some[kRead];
  for (int64_t row = first; row < last; row++)
    to[row - first] = norm_of(D, [&](int64_t d0, int64_t count) {
      read(features, format, row * D + d0, count, some);
      return some;
    });
}

static void scaled_rows(
    const void* from, Format format, int64_t D, int64_t first, int64_t last, const double* scale, void* to,
    Format to_format, int64_t start, int64_t K) {
  double some[kRead];
  for (int64_t row = first; row < last; row++) {
    const double factor = scale[row - first];
    const int64_t out = ring_slot(start, row, K) * D;
    for (int64_t d0 = 0; d0 < D; d0 += kRead) {
      const int64_t count = D - d0 < kRead ? D - d0 : kRead;
      read(from, format, row * D + d0, count, some);
      for (int64_t d = 0; d < count; d++) some[d] = factor == 0 ? 0 : some[d] * factor;
      write(some, count, to, to_format, out + d0);
    }
  }
}

// The power of two at or below x; 1 for what has none.
static double power_at(double x) {
  if (!(x > 0 && x < double(kInfinityF))) return 1;
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  if (bits >> 52 == 0) return 1;  // so small that the row has no direction
  bits = bits >> 52 << 52;
  __builtin_memcpy(&x, &bits, 8);
  return x;
}

static Measured measure(
    const void* probe, Format format, const void* target, Format target_format, int64_t D, bool normalize_target,
    double* scratch) {
  double *x = scratch, *w = scratch + D;
  read(probe, format, 0, D, x);
  read(target, target_format, 0, D, w);
  const auto norm = [&](const double* row) { return norm_of(D, [&](int64_t d0, int64_t) { return row + d0; }); };
  Measured found;
  found.unit = format == Format::bf16 ? power_at(largest_of(x, D)) : 1;  // for products in pairs alone
  found.inverse_norm = normaliser(norm(x));
  found.target_inverse_norm = normalize_target ? normaliser(norm(w)) : 1;
  const double a = found.inverse_norm, b = found.target_inverse_norm;
  found.cosine = sum_over(D, [&](int64_t d) { return (x[d] * a) * (w[d] * b); });
  const double along = found.cosine * a;
  found.sine = __builtin_sqrt(sum_over(D, [&](int64_t d) {
    const double part = w[d] * b - along * x[d];
    return part * part;
  }));
  return found;
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
