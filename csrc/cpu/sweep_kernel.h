// The fused sweep, written once with the compiler's vector types and compiled once per instruction set.
//
// The including file defines SST_VECTOR_BYTES, SST_MR and SST_NV (micro-tile: SST_MR x SST_NV vectors of
// accumulators) and SST_NAMESPACE, after all other headers and inside the target pragma. Nothing here may call
// a function of the standard library that another file could also instantiate, except exp(double) of libm:
// the linker would be free to keep the copy compiled for the wider instruction set.
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
  typedef int32_t integer;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(SST_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(SST_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(SST_VECTOR_BYTES)));
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

SST_INLINE Vector<double>::type exponential(Vector<double>::type x) {
  for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

// c[m][0 .. NV vectors] += sum_k a[m * a_row + k * a_step] * b[k][0 .. NV vectors]; rows of b and c are NV vectors
template <typename T, int MR, int NV>
SST_INLINE void micro_kernel(
    const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t depth, T* c, bool accumulate) {
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
    for (int n = 0; n < NV; n++) right[n] = load(b + (k * NV + n) * L);
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
      T* out = c + (m * NV + n) * L;
      store(out, accumulate ? load(out) + acc[m][n] : acc[m][n]);
    }
}

template <typename T, int NV>
static void product(
    const T* a, int64_t a_row, int64_t a_step, int64_t rows, const T* b, int64_t depth, T* c, bool accumulate) {
  constexpr int MR = SST_MR * SST_NV / NV > 12 ? 12 : SST_MR * SST_NV / NV;
  constexpr int W = NV * lanes<T>;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    micro_kernel<T, MR, NV>(a + m * a_row, a_row, a_step, b, depth, c + m * W, accumulate);
  for (; m + 2 <= rows; m += 2) micro_kernel<T, 2, NV>(a + m * a_row, a_row, a_step, b, depth, c + m * W, accumulate);
  if (m < rows) micro_kernel<T, 1, NV>(a + m * a_row, a_row, a_step, b, depth, c + m * W, accumulate);
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
static void copy_row(const Slots& slots, const void* base, int64_t row, T* to) {
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

template <typename T>
static int64_t scratch_bytes(int64_t D) {
  const int64_t width = kBlock;
  return int64_t(sizeof(T)) * (width * D + kMaxTile * width + tile_slots(D) * D) + 4 * 64;
}

template <typename T>
SST_INLINE T* take(char*& at, int64_t count) {
  at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + 63) & ~uintptr_t(63));
  T* p = reinterpret_cast<T*>(at);
  at += count * sizeof(T);
  return p;
}

template <typename T, int NV, typename Phi>
static void sweep(
    const Probes<T>& probes, const Slots& slots, int64_t first, int64_t last, void* scratch, Partial<T>& out) {
  typedef typename Vector<T>::type V;
  typedef typename Vector<T>::mask I;
  typedef typename Vector<T>::integer Int;
  constexpr int L = lanes<T>;
  constexpr int W = NV * L;  // probes in a panel
  const int64_t D = slots.D, K = slots.K;
  const int64_t panels = (probes.rows + W - 1) / W;
  const T minus_infinity = T(-kInfinityF);

  char* at = static_cast<char*>(scratch);
  T* x = take<T>(at, panels * D * W);  // normalised probes, [panel][d][probe]
  T* cosines = take<T>(at, kMaxTile * W);
  T* tile = take<T>(at, tile_slots(D) * D);

  T scale[kBlock + W] = {}, target_cosine[kBlock + W] = {};
  T shift[kBlock + W] = {}, hardest[kBlock + W] = {};
  Int target[kBlock + W], id_low[kBlock + W], id_high[kBlock + W], hardest_slot[kBlock + W], beats[kBlock + W];
  for (int64_t i = 0; i < panels * W; i++) {
    const bool real = i < probes.rows;
    const double inverse = real ? probes.inverse_norm[i] : 0.0;
    T* column = x + (i / W) * D * W + i % W;
    for (int64_t d = 0; d < D; d++)
      column[d * W] = real ? T(element<double>(probes.features, probes.storage, i * D + d) * inverse) : T(0);
    scale[i] = real ? probes.scale[i] : T(1);
    target_cosine[i] = real ? probes.target_cosine[i] : T(0);
    target[i] = real ? Int(probes.target[i]) : Int(-1);
    // Identities are compared as two 32-bit halves; a negative one (never a slot's, -1 apart) matches nothing.
    const int64_t id = real && probes.identity ? probes.identity[i] : -2;
    id_low[i] = Int(int32_t(id & 0xffffffff));
    id_high[i] = Int(int32_t(id >> 32));
    shift[i] = hardest[i] = minus_infinity;
    hardest_slot[i] = -1;
    beats[i] = 0;
    if (real) out.sum[i] = 0;
  }
  double sums[kBlock + W] = {};
  if (out.moment)
    for (int64_t i = 0; i < panels * D * W; i++) out.moment[i] = T(0);
  out.moment_width = W;

  for (int64_t j0 = first; j0 < last; j0 += tile_slots(D)) {
    const int64_t count = last - j0 < tile_slots(D) ? last - j0 : tile_slots(D);
    // The tile: the queue itself, or a copy where the batch window or a narrower dtype is in the way.
    int64_t offset = j0 - slots.window_start;  // of slot j0 from the window's start, modulo K
    if (offset < 0) offset += K;
    const bool windowed = slots.window && (offset < slots.window_size || offset + count > K);
    const Storage native = sizeof(T) == 4 ? Storage::f32 : Storage::f64;
    const T* w = static_cast<const T*>(slots.features) + j0 * D;
    if (windowed || slots.storage != native) {
      for (int64_t j = 0; j < count; j++) {
        int64_t in_window = offset + j < K ? offset + j : offset + j - K;
        if (slots.window && in_window < slots.window_size)
          copy_row(slots, slots.window, in_window, tile + j * D);
        else
          copy_row(slots, slots.features, j0 + j, tile + j * D);
      }
      w = tile;
    }

    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t i0 = panel * W;
      for (int64_t d = 0; d < D; d += kDepth)
        product<T, NV>(w + d, D, 1, count, x + panel * D * W + d * W, D - d < kDepth ? D - d : kDepth, cosines, d > 0);

      V highest[NV];
      for (int n = 0; n < NV; n++) highest[n] = splat(minus_infinity);
      for (int64_t j = 0; j < count; j++) {
        int64_t id = 0;
        if (slots.identity) {
          int64_t in_window = offset + j < K ? offset + j : offset + j - K;
          id =
              slots.window && in_window < slots.window_size ? slots.window_identity[in_window] : slots.identity[j0 + j];
        }
        if (id < 0 && slots.mask_empty) {
          for (int n = 0; n < NV; n++) store(cosines + j * W + n * L, splat(minus_infinity));
          continue;
        }
        const Int slot = Int(j0 + j), low = Int(int32_t(id & 0xffffffff)), high = Int(int32_t(id >> 32));
        const I same = probes.identity && slots.identity ? ~I{} : I{};
        for (int n = 0; n < NV; n++) {
          const int64_t i = i0 + n * L;
          V c = load(cosines + j * W + n * L);
          I mine = load_mask<T>(target + i) == slot;
          I twin = (load_mask<T>(id_low + i) == low) & (load_mask<T>(id_high + i) == high) & same;
          c = (mine | twin) ? splat(minus_infinity) : c;
          store(cosines + j * W + n * L, c);
          V top = load(hardest + i);
          I higher = c > top;
          store(hardest + i, higher ? c : top);
          I slot_now = load_mask<T>(hardest_slot + i);
          slot_now = higher ? (I{} + slot) : slot_now;
          __builtin_memcpy(hardest_slot + i, &slot_now, sizeof slot_now);
          I beat = load_mask<T>(beats + i) - (c > load(target_cosine + i));
          __builtin_memcpy(beats + i, &beat, sizeof beat);
          V z = load(scale + i) * Phi::value(c);
          z = c == minus_infinity ? splat(minus_infinity) : z;
          highest[n] = z > highest[n] ? z : highest[n];
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
          V p = exponential(load(scale + i) * Phi::value(c) - load(shift + i));
          p = c == minus_infinity ? V{} : p;
          sum[n] += p;
          store(cosines + j * W + n * L, Phi::times_slope(p, c));
        }
      for (int n = 0; n < NV; n++)
        for (int l = 0; l < L; l++) sums[i0 + n * L + l] += double(sum[n][l]);

      if (out.moment) product<T, NV>(w, 1, D, D, cosines, count, out.moment + panel * D * W, true);
    }
  }
  for (int64_t i = 0; i < probes.rows; i++) {
    out.shift[i] = shift[i];
    out.sum[i] = sums[i];
    out.hardest[i] = hardest[i];
    out.hardest_slot[i] = hardest_slot[i];
    out.beats[i] = beats[i];
  }
}

// Few probes: narrower panels, so that fewer lanes idle.
template <typename T, typename Phi>
static void run(
    const Probes<T>& probes, const Slots& slots, int64_t first, int64_t last, void* scratch, Partial<T>& out) {
  if (SST_NV > 2 && probes.rows <= lanes<T>) return sweep<T, 1, Phi>(probes, slots, first, last, scratch, out);
  if (SST_NV > 2 && probes.rows <= 2 * lanes<T>) return sweep<T, 2, Phi>(probes, slots, first, last, scratch, out);
  return sweep<T, SST_NV, Phi>(probes, slots, first, last, scratch, out);
}

static const Sweeps table = {
    SST_NAME,
    {scratch_bytes<float>, run<float, PlainPhi>},
    {scratch_bytes<double>, run<double, PlainPhi>},
};

}  // namespace sst_fast::cpu::SST_NAMESPACE
