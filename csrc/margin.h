// The one place in C++/CUDA that knows a margin's formula; sst_fast/margins.py is its counterpart in Python.
//
// a: cosine of a probe with its target prototype, c: cosine with any other slot.
//   target logit    t = scale * psi(a)      psi and its slope: target_margin()
//   other logits    z = scale * phi(c)      phi and its slope: one functor per family, below
// To add a margin: a Kind, a case in target_margin() and, if other slots are changed too, a phi functor.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SST_HD __host__ __device__ __forceinline__
#else
#define SST_HD inline __attribute__((always_inline))
#endif

namespace sst_fast {

enum class Kind : int64_t { softmax = 0, am = 1, arc = 2 };
constexpr int64_t kKinds = 3;

constexpr int kParameters = 4;

// Parameters in the order in which the Python dataclass declares them.
struct Margin {
  Kind kind;
  double p[kParameters];
};

// The arc margin's slope is cos m + a sin m / sin(theta), unbounded as theta -> 0 or pi. Closer than this to
// either end sin(theta) is held constant, as in the reference.
constexpr double kMinSine = 1e-3;

template <typename T>
struct Value {
  T value;
  T slope;
};

template <typename T>
SST_HD Value<T> target_margin(const Margin& margin, T a) {
  const T m = T(margin.p[0]);
  if (margin.kind == Kind::am) return {a - m, T(1)};
  if (margin.kind == Kind::arc) {
    const bool easy = margin.p[1] != 0;
    using std::cos;
    using std::sin;
    using std::sqrt;
    const T cos_m = T(cos(margin.p[0])), sin_m = T(sin(margin.p[0]));
    const T limit = easy ? T(0) : -cos_m;  // cos(pi - m): beyond it theta + m would pass pi
    if (!(a > limit)) return {easy ? a : a - m * sin_m, T(1)};
    const T square = (T(1) - a) * (T(1) + a);
    if (!(square > T(kMinSine * kMinSine))) return {a * cos_m - T(kMinSine) * sin_m, cos_m};
    const T sine = sqrt(square);
    return {a * cos_m - sine * sin_m, cos_m + a * sin_m / sine};
  }
  return {a, T(1)};
}

// phi of the families that leave the other slots alone. V is a scalar or a vector of cosines.
struct PlainPhi {
  template <typename V>
  SST_HD static V value(V c) {
    return c;
  }
  template <typename V>
  SST_HD static V times_slope(V p, V /*c*/) {
    return p;
  }
};

}  // namespace sst_fast
