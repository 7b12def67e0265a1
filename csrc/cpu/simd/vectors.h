// Vectors of the compiler's own types, and the exponential.
#pragma once

namespace sst_fast::cpu::SST_NAMESPACE {

#define SST_INLINE static inline __attribute__((always_inline))

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(SST_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(SST_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t mask __attribute__((vector_size(SST_VECTOR_BYTES)));
  typedef double wide __attribute__((vector_size(2 * SST_VECTOR_BYTES)));
  typedef int32_t integer;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(SST_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(SST_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(SST_VECTOR_BYTES)));
  typedef type wide;
  typedef int64_t integer;
};

template <typename T>
constexpr int lanes = SST_VECTOR_BYTES / sizeof(T);

template <typename T>
SST_INLINE typename Vector<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(p);
}
template <typename T>
SST_INLINE void store(T* p, typename Vector<T>::type v) {
  *reinterpret_cast<typename Vector<T>::loose*>(p) = v;
}
template <typename T>
SST_INLINE typename Vector<T>::mask load_mask(const typename Vector<T>::integer* p) {
  typename Vector<T>::mask v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
SST_INLINE typename Vector<T>::type splat(T x) {
  return x - typename Vector<T>::type{};
}

constexpr float kInfinityF = __builtin_inff();

// e^x for x <= about 80; range reduction by ln 2 in two parts, Cephes' polynomial: relative error below 2e-7.
SST_INLINE Vector<float>::type exponential(Vector<float>::type x) {
  typedef Vector<float>::type V;
  typedef Vector<float>::mask I;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  V clipped = x < -87.0f ? splat(-87.0f) : x;
  V shifted = clipped * 1.44269504f + magic;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  V n = shifted - magic;
  V r = clipped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I exponent = (bits - 0x4B400000 + 127) << 23;
  V power;
  __builtin_memcpy(&power, &exponent, sizeof power);
  V y = p * power;
  return x < -87.0f ? splat(0.0f) : y;
}

// The same for vectors of double of any width: Taylor's polynomial of degree 13, relative error below 1e-15.
template <typename V>
SST_INLINE V exponential_of_doubles(V x) {
  typedef decltype(x < x) I;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const V lowest = V{} - 708.0;
  V clipped = x < lowest ? lowest : x;
  V shifted = clipped * 1.4426950408889634 + magic;
  I bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  V n = shifted - magic;
  V r = clipped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  I exponent = (bits - 0x4338000000000000 + 1023) << 52;
  V power;
  __builtin_memcpy(&power, &exponent, sizeof power);
  V y = p * power;
  return x < lowest ? V{} : y;
}

SST_INLINE Vector<double>::type exponential(Vector<double>::type x) { return exponential_of_doubles(x); }

// Sum of value(d), many sums side by side.
template <typename F>
SST_INLINE double sum_over(int64_t D, F value) {
  constexpr int kSums = 32;
  double sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= D; d += kSums)
    for (int i = 0; i < kSums; i++) sums[i] += value(d + i);
  for (; d < D; d++) sums[0] += value(d);
  for (int half = kSums / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}

static int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// The next `count` numbers of a piece of memory, on a cache line of their own.
template <typename T>
SST_INLINE T* take(char*& at, int64_t count) {
  at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + 63) & ~uintptr_t(63));
  T* p = reinterpret_cast<T*>(at);
  at += count * sizeof(T);
  return p;
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
