// The fused sweep, written once with the compiler's vector types and compiled once per instruction set.
//
// The including file defines SST_VECTOR_BYTES, SST_MR and SST_NV (micro-tile: SST_MR x SST_NV vectors of
// accumulators) and SST_NAMESPACE, after all other headers and inside the target pragma; SST_BF16 where the processor
// multiplies pairs of bfloat16. Nothing here may call
// a function of the standard library that another file could also instantiate: the linker would be free to keep the
// copy compiled for the wider instruction set.
//
// For each tile of slots, held in cache:
//   1. C[j][i] = w_j . x_i             product 1: vectors run over probes i, slots j are broadcast
//   2. P[j][i] = exp(z_ji - shift_i)   masks, sum, statistics
//   3. O[d][i] += sum_j w_j[d] P[j][i] product 2: the same micro-kernel, same tile, other strides
// Because vectors run over probes, the queue is never packed or transposed, each probe keeps to its own lane (a
// NaN poisons nobody else) and the order of additions depends on shapes alone.
//
// T is the type of sums, E what products multiply: T itself, or a Pair of neighbours along the sum. In pairs, product 1
// is exact but for its sum: probes are bfloat16 as they came, and cosines are divided by the norm afterwards. For
// product 2 neighbouring slots of the tile are interleaved once, and P is rounded to bfloat16.

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

struct Pair {  // of bfloat16, the first in the low half
  uint32_t bits;
};

template <typename E>
struct Element {
  typedef E Sum;
  typedef typename Vector<E>::type Right;
  static constexpr int kEach = 1;  // numbers in an E
  static constexpr Storage kStorage = sizeof(E) == 4 ? Storage::f32 : Storage::f64;
  SST_INLINE Right right(const E* p) { return load(p); }
  SST_INLINE Right multiply_add(E left, Right right, Right sum) { return sum + splat(left) * right; }
};
#ifdef SST_BF16
template <>
struct Element<Pair> {
  typedef float Sum;
  typedef Vector<float>::mask Right;
  static constexpr int kEach = 2;
  static constexpr Storage kStorage = Storage::bf16;
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
struct Ahead {
  const char *at, *end;

  SST_INLINE void fetch(Ahead& ahead, int64_t bytes) {
    for (int64_t i = 0; i < bytes && ahead.at < ahead.end; i += 64, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
  }
};

template <typename E, int NV>
static void product(
    const E* a, int64_t a_row, int64_t a_step, int64_t rows, const E* b, int64_t b_row, int64_t depth, SumOf<E>* c,
    int64_t c_row, bool accumulate, Ahead* ahead = nullptr) {
  constexpr int MR = SST_MR * SST_NV / NV > 12 ? 12 : SST_MR * SST_NV / NV;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) {
    if (ahead) Ahead::fetch(*ahead, MR * depth * int64_t(sizeof(E)));
    micro_kernel<E, MR, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
  }
  for (; m + 2 <= rows; m += 2)
    micro_kernel<E, 2, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
  if (m < rows) micro_kernel<E, 1, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
}

template <typename T>
SST_INLINE T element(const void* data, Storage storage, int64_t index) {
  switch (storage) {
    case Storage::f64:
      return T(static_cast<const double*>(data)[index]);
    case Storage::f32:
      return T(static_cast<const float*>(data)[index]);
    case Storage::bf16: {
      uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[index]) << 16;
      float x;
      __builtin_memcpy(&x, &bits, 4);
      return T(x);
    }
    case Storage::f8: {
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

template <Storage storage>
struct Constant {
  static constexpr Storage value = storage;
};

// Calls f with the storage as a constant, which lets the compiler vectorise.
template <typename F>
SST_INLINE void with_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::f64:
      return f(Constant<Storage::f64>{});
    case Storage::f32:
      return f(Constant<Storage::f32>{});
    case Storage::bf16:
      return f(Constant<Storage::bf16>{});
    case Storage::f16:
      return f(Constant<Storage::f16>{});
    case Storage::f8:
      return f(Constant<Storage::f8>{});
  }
}

// Rounded to the nearest, ties to even, as the processor does.
SST_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

SST_INLINE uint16_t to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (bits >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65,536 and more
  if (bits < 0x38800000) {  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the last bits
    float small;
    __builtin_memcpy(&small, &bits, 4);
    small += 0.5f;
    __builtin_memcpy(&bits, &small, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13));
}

// e4m3 without infinities; 480 and more become NaN.
SST_INLINE uint8_t to_float8(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  float small;
  __builtin_memcpy(&small, &bits, 4);
  small += 16384.0f;  // leaves the rounded multiple of 2^-9 in the last bits
  uint32_t tiny;
  __builtin_memcpy(&tiny, &small, 4);
  const uint32_t usual = (bits + 0x7ffff + (bits >> 20 & 1) - 0x3c000000) >> 20;
  const uint32_t code = bits < 0x3c800000 ? tiny - 0x46800000 : usual;  // below 2^-6
  return uint8_t(sign | (bits >= 0x43f00000 ? 0x7f : code));
}

// `count` numbers of any storage as the E that a product multiplies.
template <typename E, Storage storage>
static void convert(const void* from, E* to, int64_t count) {
  if constexpr (Element<E>::kEach == 1)
    for (int64_t i = 0; i < count; i++) to[i] = element<E>(from, storage, i);
  else
    for (int64_t i = 0; i < count; i++) {  // every number of these storages is a bfloat16
      const float x = element<float>(from, storage, i);
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      const uint16_t high = uint16_t(bits >> 16);
      __builtin_memcpy(reinterpret_cast<char*>(to) + 2 * i, &high, 2);
    }
}

static int64_t storage_bytes(Storage storage) {
  return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : storage == Storage::f8 ? 1 : 2;
}

template <typename E>
static void copy_row(const Queue& slots, const void* base, int64_t row, E* to) {
  const char* from = static_cast<const char*>(base) + row * slots.D * storage_bytes(slots.storage);
  with_storage(slots.storage, [&](auto storage) { convert<E, decltype(storage)::value>(from, to, slots.D); });
}

constexpr int kDepth = 64;  // E per pass of product 1: keeps its right side in the first-level cache, and sums short
constexpr int kMaxTile = 96;
constexpr float kExact = 64;  // beyond this scale float cosines are summed with compensation

// Slots per tile: the tile should stay in the second-level cache with the block's probes and moments.
static int64_t tile_slots(int64_t D) { return D <= 512 ? kMaxTile : D <= 1024 ? kMaxTile / 2 : kMaxTile / 4; }

constexpr int kPanel = SST_NV;  // vectors in the widest panel of probes

static int64_t padded(int64_t D, int64_t width) { return (D + width - 1) / width * width; }

template <typename T>
SST_INLINE T* take(char*& at, int64_t count) {
  at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + 63) & ~uintptr_t(63));
  T* p = reinterpret_cast<T*>(at);
  at += count * sizeof(T);
  return p;
}

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

// Whether the rounding of cosines, times the scale, would show in the weights.
template <typename E>
static bool wants_exact(const Lanes<SumOf<E>>& lane, int64_t rows) {
  bool large = false;
  for (int64_t i = 0; i < rows; i++) large |= lane.scale[i] > kExact;
  return large && Element<E>::kStorage == Storage::f32;
}

// Some features of probe i as products see them: normalised, or in pairs divided by a power of two, which is exact.
// Zero beyond the last feature or probe, and in rows without a direction, whatever they hold.
constexpr int kPiece = 256;  // features at a time

template <typename E>
static void probe_features(const Probes<SumOf<E>>& probes, int64_t D, int64_t i, int64_t d0, SumOf<E>* to) {
  const int64_t count = D - d0 < kPiece ? D - d0 : kPiece;
  for (int64_t d = 0; d < kPiece; d++) to[d] = 0;
  if (i >= probes.rows || probes.inverse_norm[i] == 0) return;
  const double factor = Element<E>::kEach == 1 ? probes.inverse_norm[i] : 1 / probes.unit[i];
  with_storage(probes.storage, [&](auto storage) {
    for (int64_t d = 0; d < count; d++)
      to[d] = SumOf<E>(element<double>(probes.features, decltype(storage)::value, i * D + d0 + d) * factor);
  });
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

// Probes as [panel][d][probe], neighbouring features in pairs.
template <typename E>
static void pack_columns(const Probes<SumOf<E>>& probes, int64_t D, int64_t width, E* x) {
  constexpr int each = Element<E>::kEach;
  SumOf<E> some[kPiece];
  for (int64_t i = 0; i < padded(probes.rows, width); i++) {
    E* column = x + (i / width) * (D / each) * width + i % width;
    for (int64_t d0 = 0; d0 < D; d0 += kPiece) {
      probe_features<E>(probes, D, i, d0, some);
      for (int64_t d = 0; d < kPiece && d0 + d < D; d += each)
        column[(d0 + d) / each * width] = as_element<E>(some[d], some[d + each - 1]);
    }
  }
}

// A tile of slots.
template <typename E>
struct Tile {
  const E* w;  // [count, D]
  Ahead next;
  int64_t first, count;
  SumOf<E> factor[kMaxTile];  // 1 / norm where rows are to be normalised: cosines are scaled, not rows
  int32_t id_low[kMaxTile], id_high[kMaxTile];  // halves of the identity
  bool empty[kMaxTile];                         // masked for every probe
};

// The queue itself, or a copy where the batch window or another dtype is in the way.
template <typename E>
static void load_tile(const Slots<SumOf<E>>& slots, int64_t first, int64_t last, E* copy, Tile<E>& tile) {
  const int64_t most = tile_slots(slots.D), D = slots.D, K = slots.K, row = D / Element<E>::kEach;
  tile.first = first;
  tile.count = last - first < most ? last - first : most;
  // Where a slot lies in the window: its distance from the window's start, modulo K.
  const int64_t offset = first - slots.window_start < 0 ? first - slots.window_start + K : first - slots.window_start;
  const bool windowed =
      slots.window && !slots.window_is_masked && (offset < slots.window_size || offset + tile.count > K);
  const bool native = !windowed && slots.storage == Element<E>::kStorage;
  tile.w = native ? static_cast<const E*>(slots.features) + first * row : copy;
  const char* base = static_cast<const char*>(slots.features);
  const int64_t bytes = D * storage_bytes(slots.storage), then = first + tile.count;
  tile.next = {base + then * bytes, base + (last - then < most ? last : then + most) * bytes};
  for (int64_t j = 0; j < tile.count; j++) {
    const int64_t inside = offset + j < K ? offset + j : offset + j - K;
    const bool replaced = slots.window && inside < slots.window_size, own = replaced && !slots.window_is_masked;
    if (!native) copy_row(slots, own ? slots.window : slots.features, own ? inside : first + j, copy + j * row);
    if (slots.inverse_norm) tile.factor[j] = own ? slots.window_inverse_norm[inside] : slots.inverse_norm[first + j];
    const int64_t id = !slots.identity ? 0 : own ? slots.window_identity[inside] : slots.identity[first + j];
    tile.id_low[j] = int32_t(id & 0xffffffff);
    tile.id_high[j] = int32_t(id >> 32);
    tile.empty[j] = (id < 0 && slots.mask_empty) || (replaced && slots.window_is_masked);
  }
}

// The tile as the left side of product 2: itself, or neighbouring slots in pairs [pair][d].
template <typename E>
static const E* along_slots(const Tile<E>& tile, int64_t D, E* pairs) {
  if constexpr (Element<E>::kEach == 1) {
    return tile.w;
  } else {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(tile.w);
    for (int64_t j = 0; j < tile.count; j += 2) {
      const bool single = j + 1 == tile.count;
      const uint16_t *even = w + j * D, *odd = single ? even : even + D;
      const uint32_t keep = single ? 0 : 0xffff0000;
      for (int64_t d = 0; d < D; d++) pairs[j / 2 * D + d].bits = even[d] | ((uint32_t(odd[d]) << 16) & keep);
    }
    return pairs;
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

// The same weights as the left side of product 3: themselves, or neighbouring probes in pairs.
template <typename E, int NV>
static const E* weights_along_probes(SumOf<E>* p, int64_t count) {
  if constexpr (Element<E>::kEach == 1) {
    return p;
  } else {
#ifdef SST_BF16
    for (int64_t v = 0; v < count * NV; v++) {
      const Halves half = rounded(p + v * lanes<float>);
      __builtin_memcpy(reinterpret_cast<Halves*>(p) + v, &half, sizeof half);
    }
#endif
    return reinterpret_cast<const E*>(p);
  }
}

// Product 1: cosines [slot][probe] of a tile and a panel; in pairs not yet divided by the probe's norm. `parts` [2,
// slot, probe]: their rounding would show (kExact), so short sums are added up with compensation; null: plainly.
template <typename E, int NV>
static void tile_cosines(Tile<E>& tile, const E* x, int64_t D, SumOf<E>* cosines, SumOf<E>* parts) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  constexpr int W = NV * lanes<T>;
  const int64_t row = D / Element<E>::kEach, depth = parts ? kDepth / 4 : kDepth, size = tile.count * W;
  T *part = parts, *error = parts + size;
  for (int64_t k = 0; k < row; k += depth) {
    const bool first = k == 0;
    product<E, NV>(
        tile.w + k, row, 1, tile.count, x + k * W, W, row - k < depth ? row - k : depth,
        parts && !first ? part : cosines, W, !parts && !first, &tile.next);
    for (int64_t i = 0; parts && !first && i < size; i += lanes<T>) {
      const V old = load(cosines + i), more = load(part + i), sum = old + more, seen = sum - old;
      const V lost = (old - (sum - seen)) + (more - seen);
      store(error + i, k == depth ? lost : load(error + i) + lost);
      store(cosines + i, sum);
    }
  }
  for (int64_t i = 0; parts && row > depth && i < size; i += lanes<T>)
    store(cosines + i, load(cosines + i) + load(error + i));
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

// Sums over the slots seen so far, each [probe of a block].
template <typename T>
struct Sums {
  T shift[Lanes<T>::kCount];
  double total[Lanes<T>::kCount], logits[Lanes<T>::kCount], hard_sum[Lanes<T>::kCount];
  int64_t hard[Lanes<T>::kCount];
};

// Finishes the cosines of a tile and a panel, masked ones become -infinity. `first`: lanes and sums take note of what
// is there, and `highest` [NV] becomes at least the largest logit of the tile.
template <typename E, int NV, typename Phi, bool first>
static void look(
    const Slots<SumOf<E>>& slots, const Tile<E>& tile, Lanes<SumOf<E>>& lane, int64_t i0, bool wants_logits,
    SumOf<E>* cosines, Sums<SumOf<E>>* sums, typename Vector<SumOf<E>>::type* highest) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  typedef typename Vector<T>::integer Int;
  constexpr int L = lanes<T>, W = NV * L;
  constexpr bool plain = Phi::kIdentity, mining = Phi::kHard;
  const V masked = splat(T(-kInfinityF));
  const I same = lane.identities && slots.identity ? ~I{} : I{};
  const bool scaled = slots.inverse_norm != nullptr;
  for (int n = 0; n < NV; n++) {
    const int64_t i = i0 + n * L;
    const V inverse = load(lane.inverse + i), a = load(lane.target_cosine + i), scale = load(lane.scale + i);
    const I target = load_mask<T>(lane.target + i);
    const I low = load_mask<T>(lane.id_low + i), high = load_mask<T>(lane.id_high + i);
    V rows[kPhiRow];
    load_rows<T, Phi>(lane, i, rows);
    V top = load(lane.hardest + i), largest = masked, logit_sum{}, hard_sum{};
    I slot = load_mask<T>(lane.hardest_slot + i), beats = load_mask<T>(lane.beats + i);
    I live = load_mask<T>(lane.live + i), hard{};
    for (int64_t j = 0; j < tile.count; j++) {
      T* at = cosines + j * W + n * L;
      if (tile.empty[j]) {
        store(at, masked);
        continue;
      }
      V c = load(at);
      if constexpr (Element<E>::kEach > 1) c *= inverse;
      if (scaled) c *= tile.factor[j];
      const Int number = Int(tile.first + j);
      const I twin = (low == Int(tile.id_low[j])) & (high == Int(tile.id_high[j])) & same;
      const I out = (target == number) | twin;
      c = out ? masked : c;
      store(at, c);
      if constexpr (!first) continue;
      const I higher = c > top;
      top = higher ? c : top;
      slot = higher ? (I{} + number) : slot;
      beats -= c > a;
      live += 1 + out;
      if (!plain || wants_logits) {
        V z = scale * phi_of<T, Phi>(rows, c).value;
        z = c == masked ? masked : z;
        largest = z > largest ? z : largest;
        if (wants_logits) logit_sum += z == masked ? V{} : z;
      }
      if constexpr (mining) {
        const I beyond = c > rows[0];
        hard -= beyond;
        hard_sum += beyond ? c : V{};
      }
    }
    if constexpr (!first) continue;
    store(lane.hardest + i, top);
    __builtin_memcpy(lane.hardest_slot + i, &slot, sizeof slot);
    __builtin_memcpy(lane.beats + i, &beats, sizeof beats);
    __builtin_memcpy(lane.live + i, &live, sizeof live);
    highest[n] = plain ? scale * top : largest;  // the hardest slot so far: shifts only grow
    for (int l = 0; l < L; l++) {
      if constexpr (mining) sums->hard_sum[i + l] += double(hard_sum[l]), sums->hard[i + l] += hard[l];
      if (wants_logits) sums->logits[i + l] += double(logit_sum[l]);
    }
  }
}

// Weights in place of the cosines, as the next product wants them: exp(z - shift), summed up; or, `again`,
// exp(z - lse) - uniform, times the lane's factor. Times the slope of phi.
template <typename E, int NV, typename Phi, bool again>
static void weigh(
    const Slots<SumOf<E>>& slots, const Tile<E>& tile, const Lanes<SumOf<E>>& lane, int64_t i0, bool for_moment,
    SumOf<E>* cosines, Sums<SumOf<E>>* sums) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  constexpr int L = lanes<T>, W = NV * L;
  const bool scaled = for_moment && slots.inverse_norm;
  for (int n = 0; n < NV; n++) {
    const int64_t i = i0 + n * L;
    const V scale = load(lane.scale + i), factor = load(lane.factor + i), uniform = load(lane.uniform + i);
    const V shift = again ? load(lane.lse + i) : load(sums->shift + i);
    V rows[kPhiRow], sum{};
    load_rows<T, Phi>(lane, i, rows);
    for (int64_t j = 0; j < tile.count; j++) {
      T* at = cosines + j * W + n * L;
      const V c = load(at);
      const auto phi = phi_of<T, Phi>(rows, c);
      V p = exponential(scale * phi.value - shift);
      if constexpr (again) p = (p - uniform) * factor;
      if constexpr (!again && Phi::kIdentity) {
        p = c == splat(T(-kInfinityF)) ? V{} : p;
        sum += p;
      } else {
        const V weighed = slots.straight_through || Phi::kIdentity ? p : p * phi.slope;
        if constexpr (!again) sum += c == splat(T(-kInfinityF)) ? V{} : p;
        p = c == splat(T(-kInfinityF)) ? V{} : weighed;
      }
      if (scaled) p *= tile.factor[j];
      store(at, p);
    }
    if constexpr (!again)
      for (int l = 0; l < L; l++) sums->total[i + l] += double(sum[l]);
  }
}

// Raises a probe's shift only when its logits have outgrown it by much: rescaling the moments costs D each.
template <typename T, int NV>
static void raise(const typename Vector<T>::type* highest, int64_t i0, int64_t D, Sums<T>& sums, T* moment) {
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
    for (int l = 0; l < L; l++) sums.total[i0 + n * L + l] *= double(factor[n][l]);
  for (int64_t d = 0; moment && d < D; d++)
    for (int n = 0; n < NV; n++) {
      T* p = moment + d * W + n * L;
      store(p, load(p) * factor[n]);
    }
}

template <typename E>
static int64_t scratch_bytes(int64_t D) {
  typedef SumOf<E> T;
  const int64_t wide = padded(D, kPanel * lanes<T>), tile = tile_slots(D);
  return int64_t(sizeof(T)) * (kBlock * D + 3 * kMaxTile * kBlock + 2 * tile * D + tile * wide) + 5 * 64;
}

template <typename E, int NV, typename Phi>
static void sweep(
    const Probes<SumOf<E>>& probes, const Slots<SumOf<E>>& slots, int64_t first, int64_t last, void* scratch,
    Partial<SumOf<E>>& out) {
  typedef SumOf<E> T;
  constexpr int each = Element<E>::kEach;
  constexpr int W = NV * lanes<T>;  // probes in a panel
  const int64_t D = slots.D;
  const int64_t panels = (probes.rows + W - 1) / W;

  char* at = static_cast<char*>(scratch);
  E* x = take<E>(at, panels * D / each * W);
  T *cosines = take<T>(at, kMaxTile * W), *parts = take<T>(at, 2 * kMaxTile * W);
  E* copy = take<E>(at, tile_slots(D) * D / each);
  E* pairs = take<E>(at, each == 1 ? 0 : tile_slots(D) * D / each);

  Lanes<T> lane;
  load_lanes(probes, panels * W, lane);
  pack_columns(probes, D, W, x);
  if (!wants_exact<E>(lane, probes.rows)) parts = nullptr;
  Sums<T> sums{};
  for (int64_t i = 0; i < panels * W; i++) sums.shift[i] = T(-kInfinityF);
  if (out.moment)
    for (int64_t i = 0; i < panels * D * W; i++) out.moment[i] = T(0);
  out.moment_width = W;

  Tile<E> tile;
  for (int64_t j0 = first; j0 < last; j0 += tile_slots(D)) {
    load_tile(slots, j0, last, copy, tile);
    const E* left = out.moment ? along_slots(tile, D, pairs) : nullptr;
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t i0 = panel * W;
      T* moment = out.moment ? out.moment + panel * D * W : nullptr;
      tile_cosines<E, NV>(tile, x + panel * D / each * W, D, cosines, parts);
      if (probes.lse) {
        look<E, NV, Phi, false>(slots, tile, lane, i0, false, cosines, nullptr, nullptr);
        weigh<E, NV, Phi, true>(slots, tile, lane, i0, true, cosines, nullptr);
      } else {
        typename Vector<T>::type highest[NV];
        look<E, NV, Phi, true>(slots, tile, lane, i0, out.wants_logits, cosines, &sums, highest);
        raise<T, NV>(highest, i0, D, sums, moment);
        weigh<E, NV, Phi, false>(slots, tile, lane, i0, true, cosines, &sums);
      }
      if (moment)
        product<E, NV>(
            left, 1, D, D, weights_along_slots<E, NV>(cosines, tile.count), W, (tile.count + each - 1) / each, moment,
            W, true);
    }
  }
  for (int64_t i = 0; i < probes.rows; i++) {
    out.shift[i] = sums.shift[i];
    out.sum[i] = sums.total[i];
    out.logits[i] = sums.logits[i];
    out.hard_sum[i] = sums.hard_sum[i];
    out.hard[i] = sums.hard[i];
    out.live[i] = lane.live[i];
    out.hardest[i] = lane.hardest[i];
    out.hardest_slot[i] = lane.hardest_slot[i];
    out.beats[i] = lane.beats[i];
  }
}

// Few probes: narrower panels, so that fewer lanes idle.
template <typename E>
static void run(
    Kind kind, const Probes<SumOf<E>>& probes, const Slots<SumOf<E>>& slots, int64_t first, int64_t last, void* scratch,
    Partial<SumOf<E>>& out) {
  constexpr int L = lanes<SumOf<E>>;
  with_phi(kind, [&](auto phi) {
    using Phi = decltype(phi);
    if (SST_NV > 2 && probes.rows <= L) return sweep<E, 1, Phi>(probes, slots, first, last, scratch, out);
    if (SST_NV > 2 && probes.rows <= 2 * L) return sweep<E, 2, Phi>(probes, slots, first, last, scratch, out);
    return sweep<E, SST_NV, Phi>(probes, slots, first, last, scratch, out);
  });
}

// The probes of a block as [panel][d][probe], for product 1, then as [panel of features][probe][d], for product 3.
template <typename E>
static int64_t pack_bytes(int64_t D) {
  const int64_t width = kPanel * lanes<SumOf<E>>;
  return int64_t(sizeof(E)) / Element<E>::kEach * padded(kBlock, width) * (D + padded(D, width));
}

template <typename E>
static E* packed_rows(void* packed, int64_t D) {
  return static_cast<E*>(packed) + padded(kBlock, kPanel * lanes<SumOf<E>>) * D / Element<E>::kEach;
}

template <typename E>
static void pack(const Probes<SumOf<E>>& probes, int64_t D, void* packed) {
  constexpr int each = Element<E>::kEach;
  const int64_t width = kPanel * lanes<SumOf<E>>, wide = padded(D, width);
  pack_columns(probes, D, width, static_cast<E*>(packed));
  E* rows = packed_rows<E>(packed, D);
  SumOf<E> some[each][kPiece];
  for (int64_t i = 0; i < probes.rows; i += each)
    for (int64_t d0 = 0; d0 < wide; d0 += kPiece) {
      for (int e = 0; e < each; e++) probe_features<E>(probes, D, i + e, d0, some[e]);
      for (int64_t d = d0; d < wide && d < d0 + kPiece; d++)
        rows[(d / width * kBlock + i) / each * width + d % width] =
            as_element<E>(some[0][d - d0], some[each - 1][d - d0]);
    }
}

template <typename T>
static void store_as(Storage storage, void* to, int64_t at, const T* from, int64_t count) {
  switch (storage) {
    case Storage::f64:
      for (int64_t d = 0; d < count; d++) static_cast<double*>(to)[at + d] = from[d];
      return;
    case Storage::f32:
      for (int64_t d = 0; d < count; d++) static_cast<float*>(to)[at + d] = float(from[d]);
      return;
    case Storage::bf16:
      for (int64_t d = 0; d < count; d++) static_cast<uint16_t*>(to)[at + d] = to_bfloat16(float(from[d]));
      return;
    default:
      for (int64_t d = 0; d < count; d++) static_cast<uint16_t*>(to)[at + d] = to_half(float(from[d]));
  }
}

// Writes row j of the prototypes' gradient. `sum` [padded D] is what a unit row would get; where the row was normalised
// inside, the projection of that is still missing.
template <typename E>
static void write_gradient(
    const Tile<E>& tile, int64_t j, int64_t D, bool project, const SumOf<E>* sum, Storage storage, void* gradient) {
  typedef SumOf<E> T;
  typedef typename Vector<T>::type V;
  const int64_t at = (tile.first + j) * D;
  if (!project) return store_as(storage, gradient, at, sum, D);
  T w[kPiece] = {};
  auto piece = [&](int64_t d0) {  // loads the row's features from d0 on
    const int64_t count = D - d0 < kPiece ? D - d0 : kPiece;
    for (int64_t d = 0; d < count; d++)
      if constexpr (Element<E>::kEach == 1)
        w[d] = tile.w[j * D + d0 + d];
      else
        w[d] = element<T>(tile.w, Storage::bf16, j * D + d0 + d);
    return count;
  };
  double along = 0;
  for (int64_t d0 = 0; d0 < D; d0 += kPiece) {
    const int64_t count = piece(d0);
    V dot{};
    int64_t d = 0;
    for (; d + lanes<T> <= count; d += lanes<T>) dot += load(sum + d0 + d) * load(w + d);
    for (int l = 0; l < lanes<T>; l++) along += double(dot[l]);
    for (; d < count; d++) along += double(sum[d0 + d]) * double(w[d]);
  }
  const T inverse = tile.factor[j], share = T(along * double(inverse) * double(inverse));
  for (int64_t d0 = 0; d0 < D; d0 += kPiece) {
    const int64_t count = piece(d0);
    for (int64_t d = 0; d < count; d++) w[d] = (sum[d0 + d] - share * w[d]) * inverse;
    store_as(storage, gradient, at + d0, w, count);
  }
}

// Product 3, for trainable prototypes: gradient_j[d] = sum_i P[j][i] x_i[d], where P at the target is the probe's
// `target_weight`.
template <typename E>
static void run_prototypes(
    Kind kind, const Probes<SumOf<E>>* blocks, int64_t blocks_count, char* packed, const Slots<SumOf<E>>& slots,
    int64_t first, int64_t last, void* scratch, Storage storage, void* gradient) {
  typedef SumOf<E> T;
  constexpr int NV = kPanel, W = NV * lanes<T>, each = Element<E>::kEach;
  const int64_t D = slots.D, wide = padded(D, W);
  char* at = static_cast<char*>(scratch);
  T *cosines = take<T>(at, kMaxTile * W), *parts = take<T>(at, 2 * kMaxTile * W);
  E* copy = take<E>(at, tile_slots(D) * D / each);
  T* sums = take<T>(at, tile_slots(D) * wide);
  Lanes<T> lane;
  Tile<E> tile;
  for (int64_t j0 = first; j0 < last; j0 += tile_slots(D)) {
    load_tile(slots, j0, last, copy, tile);
    for (int64_t i = 0; i < tile.count * wide; i++) sums[i] = T(0);
    for (int64_t block = 0; block < blocks_count; block++) {
      const Probes<T>& probes = blocks[block];
      char* mine = packed + block * pack_bytes<E>(D);
      const E *columns = reinterpret_cast<const E*>(mine), *rows = packed_rows<E>(mine, D);
      load_lanes(probes, padded(probes.rows, W), lane);
      // In pairs rows are not normalised: their weights are.
      if constexpr (each > 1)
        for (int64_t i = 0; i < padded(probes.rows, W); i++) lane.factor[i] *= lane.inverse[i];
      for (int64_t i0 = 0; i0 < probes.rows; i0 += W) {
        const int64_t count = probes.rows - i0 < W ? probes.rows - i0 : W;
        tile_cosines<E, NV>(
            tile, columns + i0 * D / each, D, cosines, wants_exact<E>(lane, probes.rows) ? parts : nullptr);
        with_phi(kind, [&](auto phi) {
          using Phi = decltype(phi);
          look<E, NV, Phi, false>(slots, tile, lane, i0, false, cosines, nullptr, nullptr);
          weigh<E, NV, Phi, true>(slots, tile, lane, i0, false, cosines, nullptr);
        });
        for (int64_t i = i0; i < i0 + count; i++) {
          const int64_t j = probes.target[i] - j0;
          if (j >= 0 && j < tile.count)
            cosines[j * W + i - i0] = each == 1 ? probes.target_weight[i] : probes.target_weight[i] * lane.inverse[i];
        }
        const E* left = weights_along_probes<E, NV>(cosines, tile.count);
        for (int64_t d = 0; d < wide; d += W)
          product<E, NV>(
              left, W / each, 1, tile.count, rows + (d * kBlock + i0 * W) / each, W, (count + each - 1) / each,
              sums + d, wide, true);
      }
    }
    for (int64_t j = 0; j < tile.count; j++)
      write_gradient<E>(tile, j, D, slots.inverse_norm != nullptr, sums + j * wide, storage, gradient);
  }
}

// Norms of rows [first, last); where squares would overflow or vanish, in units of the row's largest feature.
static void norms(const void* features, Storage storage, int64_t D, int64_t first, int64_t last, double* to) {
  auto norms_as = [&](auto row_storage) {
    constexpr Storage constant = decltype(row_storage)::value;  // lets the compiler vectorise
    for (int64_t row = first; row < last; row++) {
      auto squares = [&](double factor) {
        constexpr int kSums = 32;
        double sums[kSums] = {};
        int64_t d = 0;
        for (; d + kSums <= D; d += kSums)
          for (int i = 0; i < kSums; i++) {
            const double x = element<double>(features, constant, row * D + d + i) * factor;
            sums[i] += x * x;
          }
        for (; d < D; d++) {
          const double x = element<double>(features, constant, row * D + d) * factor;
          sums[0] += x * x;
        }
        for (int half = kSums / 2; half; half /= 2)
          for (int i = 0; i < half; i++) sums[i] += sums[i + half];
        return sums[0];
      };
      double square = squares(1), unit = 1;
      if (!(square > 1e-280 && square < 1e280)) {
        double largest = 0;
        for (int64_t d = 0; d < D; d++) {
          const double x = element<double>(features, constant, row * D + d);
          largest = x > largest ? x : -x > largest ? -x : largest;
        }
        if (largest > 0 && largest < double(kInfinityF)) unit = largest, square = squares(1 / largest);
      }
      to[row - first] = unit * __builtin_sqrt(square);
    }
  };
  with_storage(storage, norms_as);
}

// Row i of `from`, times scale[i - first], becomes row `start` + i, modulo K, of `to`.
static void scaled_rows(
    const void* from, Storage storage, int64_t D, int64_t first, int64_t last, const double* scale, void* to,
    Storage to_storage, int64_t start, int64_t K) {
  with_storage(storage, [&](auto from_constant) {
    with_storage(to_storage, [&](auto to_constant) {
      constexpr Storage reads = decltype(from_constant)::value, writes = decltype(to_constant)::value;
      for (int64_t row = first; row < last; row++) {
        const int64_t in = row * D, out = ring_slot(start, row, K) * D;
        const double factor = scale[row - first];
        for (int64_t d = 0; d < D; d++) {
          const double value = element<double>(from, reads, in + d) * factor;
          if constexpr (writes == Storage::f64) static_cast<double*>(to)[out + d] = value;
          if constexpr (writes == Storage::f32) static_cast<float*>(to)[out + d] = float(value);
          if constexpr (writes == Storage::bf16) static_cast<uint16_t*>(to)[out + d] = to_bfloat16(float(value));
          if constexpr (writes == Storage::f16) static_cast<uint16_t*>(to)[out + d] = to_half(float(value));
          if constexpr (writes == Storage::f8) static_cast<uint8_t*>(to)[out + d] = to_float8(float(value));
        }
      }
    });
  });
}

template <typename E>
constexpr Sweep<SumOf<E>> entry = {norms,         scaled_rows, scratch_bytes<E>, run<E>,
                                   pack_bytes<E>, pack<E>,     run_prototypes<E>};

#ifdef SST_BF16
static const Sweep<float> table = entry<Pair>;
#else
static const Sweeps table = {SST_NAME, entry<float>, entry<double>, nullptr};
#endif

}  // namespace sst_fast::cpu::SST_NAMESPACE
