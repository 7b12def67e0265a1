// The fused sweep, written once with the compiler's vector types and compiled once per instruction set.
//
// The including file defines SST_VECTOR_BYTES, SST_MR and SST_NV (micro-tile: SST_MR x SST_NV vectors of
// accumulators) and SST_NAMESPACE, after all other headers and inside the target pragma. Nothing here may call
// a function of the standard library that another file could also instantiate: the linker would be free to keep the
// copy compiled for the wider instruction set.
//
// For each tile of slots, held in cache:
//   1. C[j][i] = w_j . x_i             product 1: vectors run over probes i, slots j are broadcast
//   2. P[j][i] = exp(z_ji - shift_i)   masks, sum, statistics
//   3. O[d][i] += sum_j w_j[d] P[j][i] product 2: the same micro-kernel, same tile, other strides
// Because vectors run over probes, the queue is never packed or transposed, each probe keeps to its own lane (a
// NaN poisons nobody else) and the order of additions depends on shapes alone.

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

// c[m * c_row + 0 .. NV vectors] (+)= sum_k a[m * a_row + k * a_step] * b[k * b_row + 0 .. NV vectors]
template <typename T, int MR, int NV>
SST_INLINE void micro_kernel(
    const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, int64_t depth, T* c, int64_t c_row,
    bool accumulate) {
  typedef typename Vector<T>::type V;
  constexpr int L = lanes<T>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int n = 0; n < NV; n++) acc[m][n] = V{};
  for (int64_t k = 0; k < depth; k++) {
    V right[NV];
#pragma GCC unroll 16
    for (int n = 0; n < NV; n++) right[n] = load(b + k * b_row + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      V left = splat(a[m * a_row + k * a_step]);
#pragma GCC unroll 16
      for (int n = 0; n < NV; n++) acc[m][n] += left * right[n];
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

template <typename T, int NV>
static void product(
    const T* a, int64_t a_row, int64_t a_step, int64_t rows, const T* b, int64_t b_row, int64_t depth, T* c,
    int64_t c_row, bool accumulate) {
  constexpr int MR = SST_MR * SST_NV / NV > 12 ? 12 : SST_MR * SST_NV / NV;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    micro_kernel<T, MR, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
  for (; m + 2 <= rows; m += 2)
    micro_kernel<T, 2, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
  if (m < rows) micro_kernel<T, 1, NV>(a + m * a_row, a_row, a_step, b, b_row, depth, c + m * c_row, c_row, accumulate);
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

template <typename T, typename S>
static void widen(const S* from, Storage storage, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = element<T>(from, storage, i);
}

static int64_t storage_bytes(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

template <typename T>
static void copy_row(const Slots<T>& slots, const void* base, int64_t row, T* to) {
  const char* from = static_cast<const char*>(base) + row * slots.D * storage_bytes(slots.storage);
  switch (slots.storage) {  // a constant storage lets the compiler vectorise the loop
    case Storage::f64:
      return widen(from, Storage::f64, to, slots.D);
    case Storage::f32:
      return widen(from, Storage::f32, to, slots.D);
    case Storage::bf16:
      return widen(from, Storage::bf16, to, slots.D);
    default:
      return widen(from, Storage::f16, to, slots.D);
  }
}

constexpr int kDepth = 128;  // features per pass of product 1: keeps its right side in the first-level cache
constexpr int kMaxTile = 96;

// Slots per tile: the tile should stay in the second-level cache with the block's probes and moments.
static int64_t tile_slots(int64_t D) { return D <= 512 ? kMaxTile : D <= 1024 ? kMaxTile / 2 : kMaxTile / 4; }

constexpr int kPanel = SST_NV;  // vectors in the widest panel of probes

static int64_t padded(int64_t D, int64_t width) { return (D + width - 1) / width * width; }

template <typename T>
static int64_t scratch_bytes(int64_t D) {
  const int64_t width = kBlock, wide = padded(D, kPanel * lanes<T>);
  return int64_t(sizeof(T)) * (width * D + kMaxTile * width + tile_slots(D) * (D + wide)) + 5 * 64;
}

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

// Normalised probes as [panel][d][probe].
template <typename T>
static void pack_columns(const Probes<T>& probes, int64_t D, int64_t width, T* x) {
  for (int64_t i = 0; i < padded(probes.rows, width); i++) {
    const bool real = i < probes.rows;
    const double inverse = real ? probes.inverse_norm[i] : 0.0;
    T* column = x + (i / width) * D * width + i % width;
    for (int64_t d = 0; d < D; d++)
      column[d * width] = real ? T(element<double>(probes.features, probes.storage, i * D + d) * inverse) : T(0);
  }
}

// A tile of slots and how its slots relate to the batch window.
template <typename T>
struct Tile {
  const T* w;
  int64_t first, count, offset;  // offset of the first slot from the window's start, modulo K
  T factor[kMaxTile];            // 1 / norm of each slot where rows are to be normalised: cosines are scaled, not rows

  int64_t in_window(int64_t j, int64_t K) const { return offset + j < K ? offset + j : offset + j - K; }
};

// The queue itself, or a copy where the batch window or a narrower dtype is in the way.
template <typename T>
static Tile<T> load_tile(const Slots<T>& slots, int64_t first, int64_t last, T* copy) {
  const int64_t most = tile_slots(slots.D), D = slots.D, K = slots.K;
  Tile<T> tile{
      static_cast<const T*>(slots.features) + first * D, first, last - first < most ? last - first : most, 0, {}};
  tile.offset = first - slots.window_start < 0 ? first - slots.window_start + K : first - slots.window_start;
  for (int64_t j = 0; j < tile.count && slots.inverse_norm; j++) {
    const int64_t inside = tile.in_window(j, K);
    tile.factor[j] =
        slots.window && inside < slots.window_size ? slots.window_inverse_norm[inside] : slots.inverse_norm[first + j];
  }
  const bool windowed = slots.window && (tile.offset < slots.window_size || tile.offset + tile.count > K);
  const Storage native = sizeof(T) == 4 ? Storage::f32 : Storage::f64;
  if (!windowed && slots.storage == native) return tile;
  for (int64_t j = 0; j < tile.count; j++) {
    const int64_t inside = tile.in_window(j, K);
    T* to = copy + j * D;
    if (slots.window && inside < slots.window_size)
      copy_row(slots, slots.window, inside, to);
    else
      copy_row(slots, slots.features, first + j, to);
  }
  tile.w = copy;
  return tile;
}

// Product 1: cosines [slot][probe] of a tile and a panel.
template <typename T, int NV>
static void tile_cosines(const Tile<T>& tile, const T* x, int64_t D, T* cosines) {
  constexpr int W = NV * lanes<T>;
  for (int64_t d = 0; d < D; d += kDepth)
    product<T, NV>(tile.w + d, D, 1, tile.count, x + d * W, W, D - d < kDepth ? D - d : kDepth, cosines, W, d > 0);
}

// Masked cosines become -infinity. With `count`, lanes take note of the hardest slot and of the numbers of slots.
template <typename T, int NV, bool count>
static void mask_tile(const Slots<T>& slots, const Tile<T>& tile, Lanes<T>& lane, int64_t i0, T* cosines) {
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  typedef typename Vector<T>::integer Int;
  constexpr int L = lanes<T>, W = NV * L;
  const V masked = splat(T(-kInfinityF));
  const I same = lane.identities && slots.identity ? ~I{} : I{};
  for (int64_t j = 0; j < tile.count; j++) {
    int64_t id = 0;
    if (slots.identity) {
      const int64_t inside = tile.in_window(j, slots.K);
      id = slots.window && inside < slots.window_size ? slots.window_identity[inside] : slots.identity[tile.first + j];
    }
    if (id < 0 && slots.mask_empty) {
      for (int n = 0; n < NV; n++) store(cosines + j * W + n * L, masked);
      continue;
    }
    const Int slot = Int(tile.first + j), low = Int(int32_t(id & 0xffffffff)), high = Int(int32_t(id >> 32));
    for (int n = 0; n < NV; n++) {
      const int64_t i = i0 + n * L;
      V c = load(cosines + j * W + n * L);
      if (slots.inverse_norm) c *= tile.factor[j];
      I mine = load_mask<T>(lane.target + i) == slot;
      I twin = (load_mask<T>(lane.id_low + i) == low) & (load_mask<T>(lane.id_high + i) == high) & same;
      I out = mine | twin;
      c = out ? masked : c;
      store(cosines + j * W + n * L, c);
      if (!count) continue;
      V top = load(lane.hardest + i);
      I higher = c > top;
      store(lane.hardest + i, higher ? c : top);
      I slot_now = load_mask<T>(lane.hardest_slot + i);
      slot_now = higher ? (I{} + slot) : slot_now;
      __builtin_memcpy(lane.hardest_slot + i, &slot_now, sizeof slot_now);
      I beat = load_mask<T>(lane.beats + i) - (c > load(lane.target_cosine + i));
      __builtin_memcpy(lane.beats + i, &beat, sizeof beat);
      I live = load_mask<T>(lane.live + i) + 1 + out;
      __builtin_memcpy(lane.live + i, &live, sizeof live);
    }
  }
}

// phi and its slope for one vector of cosines. Where phi has an exponential of its own, the error of that is multiplied by
// the scale, so it is found in double.
template <typename T, typename Phi>
SST_INLINE Value<typename Vector<T>::type> phi_of(const Lanes<T>& lane, int64_t i, typename Vector<T>::type c) {
  typedef typename Vector<T>::type V;
  if constexpr (Phi::kExp) {
    typedef typename Vector<T>::wide W;
    W row[kPhiRow];
    for (int q = 0; q < Phi::kRow; q++) row[q] = __builtin_convertvector(load(lane.phi[q] + i), W);
    const W wide = __builtin_convertvector(c, W);
    const W e = exponential_of_doubles(Phi::exponent(wide, row));
    return {
        __builtin_convertvector(Phi::value(wide, row, e), V), __builtin_convertvector(Phi::slope(wide, row, e), V)};
  } else {
    V row[kPhiRow];
    for (int q = 0; q < Phi::kRow; q++) row[q] = load(lane.phi[q] + i);
    return {Phi::value(c, row, V{}), Phi::slope(c, row, V{})};
  }
}

// Logits of one vector of cosines; a masked one (-infinity) stays masked.
template <typename T, typename Phi>
SST_INLINE typename Vector<T>::type logit(const Lanes<T>& lane, int64_t i, typename Vector<T>::type c) {
  typedef typename Vector<T>::type V;
  const V z = load(lane.scale + i) * phi_of<T, Phi>(lane, i, c).value;
  return c == splat(T(-kInfinityF)) ? splat(T(-kInfinityF)) : z;
}

template <typename T, typename Phi>
SST_INLINE typename Vector<T>::type times_slope(
    const Lanes<T>& lane, int64_t i, typename Vector<T>::type p, typename Vector<T>::type c) {
  typedef typename Vector<T>::type V;
  if constexpr (Phi::kRow == 0) return p;
  return c == splat(T(-kInfinityF)) ? V{} : p * phi_of<T, Phi>(lane, i, c).slope;
}

// Weights exp(z - lse) - uniform, times the slope of phi and the lane's factor, in place of the cosines.
template <typename T, int NV, typename Phi>
static void second_weights(
    const Slots<T>& slots, const Tile<T>& tile, const Lanes<T>& lane, int64_t i0, T* cosines, bool for_moment) {
  typedef typename Vector<T>::type V;
  constexpr int L = lanes<T>, W = NV * L;
  for (int64_t j = 0; j < tile.count; j++)
    for (int n = 0; n < NV; n++) {
      const int64_t i = i0 + n * L;
      V c = load(cosines + j * W + n * L);
      V p = exponential(logit<T, Phi>(lane, i, c) - load(lane.lse + i)) - load(lane.uniform + i);
      p = c == splat(T(-kInfinityF)) ? V{} : p * load(lane.factor + i);
      if (!slots.straight_through) p = times_slope<T, Phi>(lane, i, p, c);
      if (for_moment && slots.inverse_norm) p *= tile.factor[j];
      store(cosines + j * W + n * L, p);
    }
}

template <typename T, int NV, typename Phi>
static void sweep(
    const Probes<T>& probes, const Slots<T>& slots, int64_t first, int64_t last, void* scratch, Partial<T>& out) {
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  constexpr int L = lanes<T>;
  constexpr int W = NV * L;  // probes in a panel
  const int64_t D = slots.D;
  const int64_t panels = (probes.rows + W - 1) / W;

  char* at = static_cast<char*>(scratch);
  T* x = take<T>(at, panels * D * W);
  T* cosines = take<T>(at, kMaxTile * W);
  T* copy = take<T>(at, tile_slots(D) * D);

  Lanes<T> lane;
  load_lanes(probes, panels * W, lane);
  pack_columns(probes, D, W, x);
  T shift[kBlock + W];
  double sums[kBlock + W] = {}, logits[kBlock + W] = {}, hard_sum[kBlock + W] = {};
  int64_t hard[kBlock + W] = {};
  for (int64_t i = 0; i < panels * W; i++) shift[i] = T(-kInfinityF);
  if (out.moment)
    for (int64_t i = 0; i < panels * D * W; i++) out.moment[i] = T(0);
  out.moment_width = W;

  for (int64_t j0 = first; j0 < last; j0 += tile_slots(D)) {
    const Tile<T> tile = load_tile(slots, j0, last, copy);
    const int64_t count = tile.count;
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t i0 = panel * W;
      tile_cosines<T, NV>(tile, x + panel * D * W, D, cosines);
      if (probes.lse) {
        mask_tile<T, NV, false>(slots, tile, lane, i0, cosines);
        second_weights<T, NV, Phi>(slots, tile, lane, i0, cosines, true);
        if (out.moment) product<T, NV>(tile.w, 1, D, D, cosines, W, count, out.moment + panel * D * W, W, true);
        continue;
      }
      mask_tile<T, NV, true>(slots, tile, lane, i0, cosines);

      V highest[NV];
      for (int n = 0; n < NV; n++) {
        const int64_t i = i0 + n * L;
        V top = splat(T(-kInfinityF)), logit_sum{}, cosine_sum{};
        I hard_now{};
        for (int64_t j = 0; j < count; j++) {
          V c = load(cosines + j * W + n * L);
          V z = logit<T, Phi>(lane, i, c);
          top = z > top ? z : top;
          if constexpr (Phi::kRow == kPhiRow) {
            I beyond = c > load(lane.phi[0] + i);
            hard_now -= beyond;
            cosine_sum += beyond ? c : V{};
          }
          if (out.wants_logits) logit_sum += z == splat(T(-kInfinityF)) ? V{} : z;
        }
        highest[n] = top;
        for (int l = 0; l < L; l++) {
          if constexpr (Phi::kRow == kPhiRow) hard_sum[i + l] += double(cosine_sum[l]), hard[i + l] += hard_now[l];
          if (out.wants_logits) logits[i + l] += double(logit_sum[l]);
        }
      }

      // Raise a probe's shift only when its logits have outgrown it by much: rescaling the moments costs D each.
      const T slack = 8;
      bool raised = false;
      V factor[NV];
      for (int n = 0; n < NV; n++) {
        const int64_t i = i0 + n * L;
        V old = load(shift + i);
        I grow = highest[n] > old + slack;
        for (int l = 0; l < L; l++) raised |= grow[l] != 0;
        V next = grow ? highest[n] : old;
        factor[n] = grow ? exponential(old - next) : splat(T(1));  // old = -inf: 0
        store(shift + i, next);
      }
      if (raised) {
        for (int n = 0; n < NV; n++)
          for (int l = 0; l < L; l++) sums[i0 + n * L + l] *= double(factor[n][l]);
        if (out.moment)
          for (int64_t d = 0; d < D; d++)
            for (int n = 0; n < NV; n++) {
              T* p = out.moment + (panel * D + d) * W + n * L;
              store(p, load(p) * factor[n]);
            }
      }

      V sum[NV];
      for (int n = 0; n < NV; n++) sum[n] = V{};
      for (int64_t j = 0; j < count; j++)
        for (int n = 0; n < NV; n++) {
          const int64_t i = i0 + n * L;
          V c = load(cosines + j * W + n * L);
          V p = exponential(logit<T, Phi>(lane, i, c) - load(shift + i));
          p = c == splat(T(-kInfinityF)) ? V{} : p;
          sum[n] += p;
          if (!slots.straight_through) p = times_slope<T, Phi>(lane, i, p, c);
          if (slots.inverse_norm) p *= tile.factor[j];
          store(cosines + j * W + n * L, p);
        }
      for (int n = 0; n < NV; n++)
        for (int l = 0; l < L; l++) sums[i0 + n * L + l] += double(sum[n][l]);

      if (out.moment) product<T, NV>(tile.w, 1, D, D, cosines, W, count, out.moment + panel * D * W, W, true);
    }
  }
  for (int64_t i = 0; i < probes.rows; i++) {
    out.shift[i] = shift[i];
    out.sum[i] = sums[i];
    out.logits[i] = logits[i];
    out.hard_sum[i] = hard_sum[i];
    out.hard[i] = hard[i];
    out.live[i] = lane.live[i];
    out.hardest[i] = lane.hardest[i];
    out.hardest_slot[i] = lane.hardest_slot[i];
    out.beats[i] = lane.beats[i];
  }
}

// Few probes: narrower panels, so that fewer lanes idle.
template <typename T>
static void run(
    Kind kind, const Probes<T>& probes, const Slots<T>& slots, int64_t first, int64_t last, void* scratch,
    Partial<T>& out) {
  with_phi(kind, [&](auto phi) {
    using Phi = decltype(phi);
    if (SST_NV > 2 && probes.rows <= lanes<T>) return sweep<T, 1, Phi>(probes, slots, first, last, scratch, out);
    if (SST_NV > 2 && probes.rows <= 2 * lanes<T>) return sweep<T, 2, Phi>(probes, slots, first, last, scratch, out);
    return sweep<T, SST_NV, Phi>(probes, slots, first, last, scratch, out);
  });
}

// The probes of a block as [panel][d][probe], for product 1, then as [panel of features][probe][d], for the third.
template <typename T>
static int64_t pack_bytes(int64_t D) {
  const int64_t width = kPanel * lanes<T>;
  return int64_t(sizeof(T)) * padded(kBlock, width) * (D + padded(D, width));
}

template <typename T>
static void pack(const Probes<T>& probes, int64_t D, void* packed) {
  const int64_t width = kPanel * lanes<T>, wide = padded(D, width);
  T* columns = static_cast<T*>(packed);
  T* rows = columns + padded(kBlock, width) * D;
  pack_columns(probes, D, width, columns);
  for (int64_t i = 0; i < probes.rows; i++)
    for (int64_t d = 0; d < wide; d++)
      rows[d / width * kBlock * width + i * width + d % width] =
          d < D ? T(element<double>(probes.features, probes.storage, i * D + d) * probes.inverse_norm[i]) : T(0);
}

template <typename T>
static void run_prototypes(
    Kind kind, const Probes<T>* blocks, int64_t blocks_count, const char* packed, const Slots<T>& slots, int64_t first,
    int64_t last, void* scratch, T* gradient) {
  constexpr int NV = kPanel, W = NV * lanes<T>;
  const int64_t D = slots.D, wide = padded(D, W);
  char* at = static_cast<char*>(scratch);
  T* cosines = take<T>(at, kMaxTile * W);
  T* copy = take<T>(at, tile_slots(D) * D);
  T* sums = take<T>(at, tile_slots(D) * wide);
  Lanes<T> lane;
  for (int64_t j0 = first; j0 < last; j0 += tile_slots(D)) {
    const Tile<T> tile = load_tile(slots, j0, last, copy);
    for (int64_t i = 0; i < tile.count * wide; i++) sums[i] = T(0);
    for (int64_t block = 0; block < blocks_count; block++) {
      const Probes<T>& probes = blocks[block];
      const T* columns = reinterpret_cast<const T*>(packed + block * pack_bytes<T>(D));
      const T* rows = columns + padded(kBlock, W) * D;
      load_lanes(probes, padded(probes.rows, W), lane);
      for (int64_t i0 = 0; i0 < probes.rows; i0 += W) {
        tile_cosines<T, NV>(tile, columns + i0 * D, D, cosines);
        mask_tile<T, NV, false>(slots, tile, lane, i0, cosines);
        with_phi(kind, [&](auto phi) { second_weights<T, NV, decltype(phi)>(slots, tile, lane, i0, cosines, false); });
        const int64_t depth = probes.rows - i0 < W ? probes.rows - i0 : W;
        for (int64_t d = 0; d < wide; d += W)
          product<T, NV>(cosines, W, 1, tile.count, rows + d * kBlock + i0 * W, W, depth, sums + d, wide, true);
      }
    }
    for (int64_t j = 0; j < tile.count; j++)
      for (int64_t d = 0; d < D; d++) gradient[(j0 + j) * D + d] += sums[j * wide + d];
  }
}

template <typename T>
constexpr Sweep<T> entry = {scratch_bytes<T>, run<T>, pack_bytes<T>, pack<T>, run_prototypes<T>};

static const Sweeps table = {SST_NAME, entry<float>, entry<double>};

}  // namespace sst_fast::cpu::SST_NAMESPACE
