// The product of matrices behind all three products of the sweep, a micro-kernel over strides, and what it multiplies:
// single numbers, or pairs of bfloat16.
#pragma once

#include "formats.h"

namespace sst_fast::cpu::SST_NAMESPACE {

struct Pair {  // of bfloat16, the first in the low half
  uint32_t bits;
};

template <typename E>
struct Element {
  typedef E Sum;
  typedef typename Vector<E>::type Right;
  static constexpr int kEach = 1;  // numbers in an E
  static constexpr Format kFormat = sizeof(E) == 4 ? Format::f32 : Format::f64;
  SST_INLINE Right right(const E* p) { return load(p); }
  SST_INLINE Right multiply_add(E left, Right right, Right sum) { return sum + splat(left) * right; }
};
#ifdef SST_BF16
template <>
struct Element<Pair> {
  typedef float Sum;
  typedef Vector<float>::mask Right;
  static constexpr int kEach = 2;
  static constexpr Format kFormat = Format::bf16;
  SST_INLINE Right right(const Pair* p) { return load_mask<float>(reinterpret_cast<const int32_t*>(p)); }
  SST_INLINE Vector<float>::type multiply_add(Pair left, Right right, Vector<float>::type sum) {
    return (Vector<float>::type)_mm512_dpbf16_ps(
        (__m512)sum, (__m512bh)right, (__m512bh)(Right{} + int32_t(left.bits)));
  }
};

typedef uint16_t Halves __attribute__((vector_size(SST_VECTOR_BYTES / 2)));

// A vector rounded to bfloat16.
SST_INLINE Halves rounded(const float* from) { return (Halves)_mm512_cvtneps_pbh((__m512)load(from)); }
#endif
template <typename E>
using SumOf = typename Element<E>::Sum;

// c[m * c_row + 0 .. NV vectors] (+)= sum_k a[m * a_row + k * a_step] * b[k * b_row + 0 .. NV vectors]
template <typename E, int MR, int NV>
SST_INLINE void micro_kernel(
    const E* a, int64_t a_row, int64_t a_step, const E* b, int64_t b_row, int64_t depth, SumOf<E>* c, int64_t c_row,
    bool accumulate) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  constexpr int L = lanes<T>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int n = 0; n < NV; n++) acc[m][n] = V{};
  for (int64_t k = 0; k < depth; k++) {
    typename Element<E>::Right right[NV];
#pragma GCC unroll 16
    for (int n = 0; n < NV; n++) right[n] = Element<E>::right(b + k * b_row + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const E left = a[m * a_row + k * a_step];
#pragma GCC unroll 16
      for (int n = 0; n < NV; n++) acc[m][n] = Element<E>::multiply_add(left, right[n], acc[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int n = 0; n < NV; n++) {
      T* out = c + m * c_row + n * L;
      store(out, accumulate ? load(out) + acc[m][n] : acc[m][n]);
    }
}

// What the next tile will need, fetched into the second-level cache while products run.
struct Prefetch {
  const char *at, *end;

  SST_INLINE void fetch(Prefetch& ahead, int64_t bytes) {
    for (int64_t i = 0; i < bytes && ahead.at < ahead.end; i += 64, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
  }
};

template <typename E, int NV>
static void multiply(
    const E* a, int64_t a_row, int64_t a_step, int64_t rows, const E* b, int64_t b_row, int64_t depth, SumOf<E>* c,
    int64_t c_row, bool accumulate, Prefetch* ahead = nullptr) {
  constexpr int MR = SST_MR * SST_NV / NV > 12 ? 12 : SST_MR * SST_NV / NV;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) {
    if (ahead) Prefetch::fetch(*ahead, MR * depth * int64_t(sizeof(E)));
    micro_kernel<E, MR, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
  }
  for (; m + 2 <= rows; m += 2)
    micro_kernel<E, 2, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
  if (m < rows) micro_kernel<E, 1, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
}

// `count` numbers, those from number `at` on, as a product multiplies them. Pairs take only what a bfloat16 can hold.
template <typename E>
static void read_elements(const void* from, Format format, int64_t at, int64_t count, E* to) {
  if constexpr (Element<E>::kEach == 1) {
    read(from, format, at, count, to);
  } else {
    with_format(format, [&](auto constant) {
      for (int64_t d = 0; d < count; d++) {
        const float x = element<float>(from, decltype(constant)::value, at + d);
        uint32_t bits;
        __builtin_memcpy(&bits, &x, 4);
        const uint16_t high = uint16_t(bits >> 16);
        __builtin_memcpy(reinterpret_cast<char*>(to) + 2 * d, &high, 2);
      }
    });
  }
}

// One E: a number, or two that are bfloat16 already.
template <typename E>
SST_INLINE E as_element(SumOf<E> first, SumOf<E> second) {
  if constexpr (Element<E>::kEach == 1) {
    return first;
  } else {
    uint32_t low, high;
    __builtin_memcpy(&low, &first, 4);
    __builtin_memcpy(&high, &second, 4);
    return {low >> 16 | (high & 0xffff0000)};
  }
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
