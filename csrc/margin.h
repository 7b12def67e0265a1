// The one place in C++/CUDA that knows a margin's formula; sst_fast/margins.py is its counterpart in Python.
//
// a: cosine of a probe x with its target prototype w, c: cosine with any other slot.
// sine: length of what the target has across the probe, |w - a x|; far more exact near an angle of 0 than sqrt(1 -
// a^2).
//   target logit    t = scale * psi(a)      psi and its slope: target_margin()
//   other logits    z = scale * phi(c)      phi and its slope: one functor per family, below, which takes what
//                                           phi_row() found for the probe
// To add a margin: a Kind, a case in target_margin() and, if other slots are changed too, in phi_row() and with_phi().
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SST_HD __host__ __device__ __forceinline__
#else
#define SST_HD inline __attribute__((always_inline))
#endif

namespace sst_fast {

// The margins that kernels know, in the order of KINDS in sst_fast/margins.py; a test compares the two.
#define SST_KINDS(kind)                                                                                          \
  kind(softmax) kind(am) kind(arc) kind(combined) kind(mv) kind(curricular) kind(npc) kind(circle) kind(arc_neg) \
      kind(filtered)

#define SST_KIND(name) name,
enum class Kind : int64_t { SST_KINDS(SST_KIND) };
#undef SST_KIND
#define SST_KIND(name) +1
constexpr int64_t kKinds = 0 SST_KINDS(SST_KIND);
#undef SST_KIND

constexpr int kParameters = 6;

// Parameters in the order in which the Python dataclass declares them.
struct Margin {
  Kind kind;
  double p[kParameters];
};

// Rows whose angle has a smaller sine are parallel: there is no direction across, and slopes leave out what is
// unbounded.
constexpr double kMinSine = 1e-12;
// How far from their ends AdaFace's code keeps cosines and angles.
constexpr double kAdaFaceEpsilon = 1e-3;

// What psi is where theta + m exceeds pi, in the order of ARC_RULES and COMBINED_RULES in sst_fast/margins.py.
enum class ArcRule { linear, easy, cosine, offset };
enum class CombinedRule { fall, hold, cosine, clamp };

template <typename T>
struct Value {
  T value;
  T slope;
};

// cos(theta + m)
template <typename T>
SST_HD T cos_of_sum(T a, T sine, T m) {
  return a * std::cos(m) - sine * std::sin(m);
}

template <typename T>
SST_HD Value<T> arc_margin(T a, T sine, T m, ArcRule rule, T offset = T(0)) {
  const T cos_m = std::cos(m), sin_m = std::sin(m);
  const bool easy = rule == ArcRule::easy;
  const T limit = easy ? T(0) : -cos_m;  // cos(pi - m): beyond it theta + m would pass pi
  if (rule != ArcRule::cosine && !(a > limit))
    return {easy ? a : a - (rule == ArcRule::offset ? offset : m * sin_m), T(1)};
  return {a * cos_m - sine * sin_m, sine > T(0) ? cos_m + a * sin_m / sine : cos_m};
}

// cos(m1 theta + m2) - m3
template <typename T>
SST_HD Value<T> combined_margin(T a, T sine, T m1, T m2, T m3, CombinedRule rule) {
  const T pi = T(3.14159265358979323846), epsilon = T(kAdaFaceEpsilon);
  const T length = std::sqrt(a * a + sine * sine), forward = a < T(0) ? T(-1) : T(1);
  T theta = std::atan2(sine, a), turn = m1;  // turn: slope of the angle in theta
  if (rule == CombinedRule::clamp && !(std::abs(a) <= T(1) - epsilon)) {
    theta = std::acos(forward * (T(1) - epsilon));
    turn = T(0);
  }
  T angle = theta * m1 + m2;
  const T low = rule == CombinedRule::clamp ? epsilon : T(0);
  const bool upper = rule == CombinedRule::hold || rule == CombinedRule::clamp;
  if (rule != CombinedRule::cosine && angle < low) angle = low, turn = T(0);
  if (upper && angle > pi - low) angle = pi - low, turn = T(0);
  const T k = rule == CombinedRule::fall ? std::floor(angle / pi) : T(0);
  const T sign = std::fmod(k, T(2)) == T(0) ? T(1) : T(-1);
  const T value = length * (sign * std::cos(angle) - T(2) * k) - m3;
  const T slope = sine > T(0) ? length * std::sin(angle) / sine : m1 * forward * std::cos(angle);
  return {value, sign * slope * turn};
}

// hard_mean: mean cosine of the probe's hard slots, which Kind::npc alone uses.
template <typename T>
SST_HD Value<T> target_margin(const Margin& margin, T a, T sine, T hard_mean = T(0)) {
  const T m = T(margin.p[0]);
  if (sine < T(kMinSine)) sine = T(0);
  switch (margin.kind) {
    case Kind::softmax:
      return {a, T(1)};
    case Kind::am:
      return {a - m, T(1)};
    case Kind::arc:
      return arc_margin(a, sine, m, static_cast<ArcRule>(int(margin.p[1])), T(margin.p[2]));
    case Kind::combined: {
      const auto rule = static_cast<CombinedRule>(int(margin.p[4]));
      const Value<T> plain = combined_margin(a, sine, m, T(margin.p[1]), T(margin.p[2]), rule);
      const T annealing = T(margin.p[3]), whole = annealing + T(1);
      return {(annealing * a + plain.value) / whole, (annealing + plain.slope) / whole};
    }
    case Kind::filtered: {
      const auto rule = static_cast<CombinedRule>(int(margin.p[3]));
      return combined_margin(a, sine, m, T(margin.p[1]), T(margin.p[2]), rule);
    }
    case Kind::mv: {
      const bool arc = margin.p[2] != 0, positive_only = margin.p[3] != 0;
      if (arc) return arc_margin(a, sine, m, positive_only ? ArcRule::easy : ArcRule::linear);
      return {positive_only && !(a > m) ? a : a - m, T(1)};
    }
    case Kind::npc: {
      T sum = m + T(margin.p[1]) * hard_mean;
      const T pi = T(3.14159265358979323846);
      sum = sum < T(0) ? T(0) : sum > pi ? pi : sum;
      return arc_margin(a, sine, sum, margin.p[5] != 0 ? ArcRule::easy : ArcRule::linear);
    }
    case Kind::circle: {
      const T weight = T(1) + m - a > T(0) ? T(1) + m - a : T(0);
      return {weight * (a - (T(1) - m)), weight};
    }
    case Kind::curricular:
    case Kind::arc_neg:
      return arc_margin(a, sine, m, ArcRule::linear);
  }
  return {a, T(1)};
}

// What phi needs to know about a probe.
constexpr int kPhiRow = 4;
template <typename T>
struct PhiRow {
  T at[kPhiRow];
};

template <typename T>
SST_HD PhiRow<T> phi_row(const Margin& margin, T a, T sine) {
  const T m = T(margin.p[0]);
  switch (margin.kind) {
    case Kind::mv: {  // t c + t - 1
      const T t = T(margin.p[1]);
      return {{margin.p[2] != 0 ? cos_of_sum(a, sine, m) : a - m, T(0), t, t - T(1)}};
    }
    case Kind::curricular:  // c^2 + t c
      return {{cos_of_sum(a, sine, m), T(1), T(margin.p[1]), T(0)}};
    case Kind::npc:  // t c + alpha
      return {{cos_of_sum(a, sine, T(margin.p[4])), T(0), T(margin.p[2]), T(margin.p[3])}};
    case Kind::circle:
      return {{m, T(0), T(0), T(0)}};
    case Kind::arc_neg:
      return {{arc_margin(a, sine, m, ArcRule::linear).value, T(margin.p[1]), T(-1) / T(margin.p[2]), T(0)}};
    case Kind::filtered:  // a constant
      return {{T(margin.p[4]), T(0), T(0), T(margin.p[5])}};
    case Kind::softmax:
    case Kind::am:
    case Kind::arc:
    case Kind::combined:
      break;
  }
  return {{T(0), T(0), T(0), T(0)}};
}

// phi(c) and its slope. Traits: kIdentity: phi(c) = c; kHard: a slot with c > row[0] is hard, and NPCFace wants their
// number and mean; kExp: phi has an exponential of its own; kRow: how many values of the row are used.
// V is a scalar or a vector of cosines, row[] the same of what phi_row() found, e the exponential
// of exponent(c, row) where kExp: the caller knows the exponential that suits V.
struct PlainPhi {
  static constexpr bool kIdentity = true, kHard = false;
  static constexpr bool kExp = false;
  static constexpr int kRow = 0;
  template <typename V>
  SST_HD static V value(V c, const V* /*row*/, V /*e*/) {
    return c;
  }
  template <typename V>
  SST_HD static V slope(V c, const V* /*row*/, V /*e*/) {
    return c * 0.0f + 1.0f;
  }
};

// row: limit, then phi = row1 c^2 + row2 c + row3 for a slot with c > limit, c otherwise.
struct HardPhi {
  static constexpr bool kIdentity = false, kHard = true;
  static constexpr bool kExp = false;
  static constexpr int kRow = 4;
  template <typename V>
  SST_HD static V value(V c, const V* row, V /*e*/) {
    return c > row[0] ? (row[1] * c + row[2]) * c + row[3] : c;
  }
  template <typename V>
  SST_HD static V slope(V c, const V* row, V /*e*/) {
    const V one = row[0] * 0.0f + 1.0f;
    return c > row[0] ? row[1] * c * 2.0f + row[2] : one;
  }
};

// row: m. The weight is a constant to the gradient.
struct CirclePhi {
  static constexpr bool kIdentity = false, kHard = false;
  static constexpr bool kExp = false;
  static constexpr int kRow = 1;
  template <typename V>
  SST_HD static V value(V c, const V* row, V e) {
    return slope(c, row, e) * (c - row[0]);
  }
  template <typename V>
  SST_HD static V slope(V c, const V* row, V /*e*/) {
    const V weight = c + row[0];
    const V zero = row[0] * 0.0f;
    return weight < zero ? zero : weight;  // keeps a NaN
  }
};

// row: psi(a), alpha, -1 / sigma. The weight t is a constant to the gradient.
struct ArcNegPhi {
  static constexpr bool kIdentity = false, kHard = false;
  static constexpr bool kExp = true;
  static constexpr int kRow = 3;
  template <typename V>
  SST_HD static V value(V c, const V* row, V e) {
    const V t = slope(c, row, e);
    return t * c + t - 1.0f;
  }
  template <typename V>
  SST_HD static V exponent(V c, const V* row) {
    return (c - row[0]) * (c - row[0]) * row[2];
  }
  template <typename V>
  SST_HD static V slope(V /*c*/, const V* row, V e) {
    return row[1] * e;
  }
};

// Calls f(phi) with the family of this margin.
template <typename F>
inline auto with_phi(Kind kind, F f) {
  switch (kind) {
    case Kind::mv:
    case Kind::curricular:
    case Kind::npc:
    case Kind::filtered:
      return f(HardPhi{});
    case Kind::circle:
      return f(CirclePhi{});
    case Kind::arc_neg:
      return f(ArcNegPhi{});
    case Kind::softmax:
    case Kind::am:
    case Kind::arc:
    case Kind::combined:
      break;
  }
  return f(PlainPhi{});
}

}  // namespace sst_fast
