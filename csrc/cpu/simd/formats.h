// Numbers of every format: one, some, a row.
#pragma once

#include "vectors.h"

namespace sst_fast::cpu::SST_NAMESPACE {

template <typename T>
SST_INLINE T element(const void* data, Format format, int64_t index) {
  switch (format) {
    case Format::f64:
      return T(static_cast<const double*>(data)[index]);
    case Format::f32:
      return T(static_cast<const float*>(data)[index]);
    case Format::bf16: {
      uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[index]) << 16;
      float x;
      __builtin_memcpy(&x, &bits, 4);
      return T(x);
    }
    case Format::f8: {
      // e4m3 without infinities: shift mantissa and exponent into place, rescale by 2^120.
      uint32_t code = static_cast<const uint8_t*>(data)[index], bits = (code & 0x7f) << 20;
      float x;
      __builtin_memcpy(&x, &bits, 4);
      x = (code & 0x7f) == 0x7f ? __builtin_nanf("") : x * 1.329227995784916e36f;
      return T(code & 0x80 ? -x : x);
    }
    default: {
      // IEEE half without a conversion instruction: shift mantissa and exponent into place, rescale by 2^112.
      uint32_t half = static_cast<const uint16_t*>(data)[index];
      uint32_t bits = (half & 0x7fff) << 13;
      float x;
      __builtin_memcpy(&x, &bits, 4);
      x *= 5.192296858534828e33f;
      if ((half & 0x7c00) == 0x7c00) x = (half & 0x3ff) ? __builtin_nanf("") : kInfinityF;
      return T((half & 0x8000) ? -x : x);
    }
  }
}

template <Format format>
struct Constant {
  static constexpr Format value = format;
};

// Calls f with the format as a constant, which lets the compiler vectorise.
template <typename F>
SST_INLINE void with_format(Format format, F f) {
  switch (format) {
    case Format::f64:
      return f(Constant<Format::f64>{});
    case Format::f32:
      return f(Constant<Format::f32>{});
    case Format::bf16:
      return f(Constant<Format::bf16>{});
    case Format::f16:
      return f(Constant<Format::f16>{});
    case Format::f8:
      return f(Constant<Format::f8>{});
  }
}

// Rounded to the nearest, ties to even, as the processor does.
SST_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// All bits where true. A choice by such a mask has no branch, so that the compiler vectorises loops over it.
SST_INLINE uint32_t where(bool condition) { return 0u - uint32_t(condition); }
SST_INLINE uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) { return (yes & mask) | (no & ~mask); }

// |x| + `above`: leaves in the last bits the rounded multiple of what these are worth there.
SST_INLINE uint32_t bits_of_sum(uint32_t bits, float above) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  x += above;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

SST_INLINE uint32_t to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  const uint32_t tiny = bits_of_sum(bits, 0.5f) - 0x3f000000;  // in multiples of 2^-24
  const uint32_t usual = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
  uint32_t code = choose(where(bits < 0x38800000), tiny, usual);  // below 2^-14
  code = choose(where(bits >= 0x47800000), 0x7c00, code);         // 65,536 and more
  return sign | choose(where(bits > 0x7f800000), 0x7e00, code);
}

// e4m3 without infinities; 480 and more become NaN.
SST_INLINE uint32_t to_float8(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  const uint32_t tiny = bits_of_sum(bits, 16384.0f) - 0x46800000;  // in multiples of 2^-9
  const uint32_t usual = (bits + 0x7ffff + (bits >> 20 & 1) - 0x3c000000) >> 20;
  const uint32_t code = choose(where(bits < 0x3c800000), tiny, usual);  // below 2^-6
  return sign | choose(where(bits >= 0x43f00000), 0x7f, code);
}

static int64_t bytes_of(Format format) {
  return format == Format::f64 ? 8 : format == Format::f32 ? 4 : format == Format::f8 ? 1 : 2;
}

// `count` numbers, those from number `at` on.
template <typename T>
static void read(const void* from, Format format, int64_t at, int64_t count, T* to) {
  with_format(format, [&](auto constant) {
    for (int64_t d = 0; d < count; d++) to[d] = element<T>(from, decltype(constant)::value, at + d);
  });
}

template <typename T>
static void write(const T* from, int64_t count, void* to, Format format, int64_t at) {
  with_format(format, [&](auto constant) {
    constexpr Format is = decltype(constant)::value;
    for (int64_t d = 0; d < count; d++) {
      if constexpr (is == Format::f64) static_cast<double*>(to)[at + d] = from[d];
      if constexpr (is == Format::f32) static_cast<float*>(to)[at + d] = float(from[d]);
      if constexpr (is == Format::bf16) static_cast<uint16_t*>(to)[at + d] = to_bfloat16(float(from[d]));
      if constexpr (is == Format::f16) static_cast<uint16_t*>(to)[at + d] = uint16_t(to_half(float(from[d])));
      if constexpr (is == Format::f8) static_cast<uint8_t*>(to)[at + d] = uint8_t(to_float8(float(from[d])));
    }
  });
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
