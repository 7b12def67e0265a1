// Between the code that every processor runs and the sweeps, compiled once per instruction set (simd/): what a task
// reads and writes.
//
// Sizes: N probes, K slots of S rows (sub-centres, usually one) each, D features, B slots in the batch window. A sweep
// goes over rows, in tiles and chunks that hold slots whole.
#pragma once

#include <cstdint>

#include "../margin.h"

namespace sst_fast::cpu {

enum class Format { f64, f32, bf16, f16, f8 };  // f8: e4m3fn

constexpr int kBlock = 64;    // probes a task holds at most
constexpr int kMaxTile = 96;  // rows of a tile at most
constexpr int kMaxSubCenters = 16;

// Rows per tile: the tile should stay in the second-level cache with the block's probes and moments.
SST_HD int64_t tile_rows(int64_t D) { return D <= 512 ? kMaxTile : D <= 1024 ? kMaxTile / 2 : kMaxTile / 4; }

// What rows of a tile or chunk come in: whole slots and, unless that is more than `most`, the rows of the micro-kernel.
SST_HD int64_t row_unit(int64_t sub_centers, int64_t most) {
  constexpr int64_t micro = 12;  // or a divisor of it
  return micro % sub_centers == 0 ? micro : micro * sub_centers <= most ? micro * sub_centers : sub_centers;
}

template <typename T>
struct Probes {          // [rows] each, of one block
  const void* features;  // [rows, D], not normalised
  Format format;
  const double* inverse_norm;
  // A power of two that leaves the largest of the row's features in [1, 2) when they are divided by it.
  const double* unit;
  const T* scale;
  const T* target_cosine;
  const T* phi;               // [rows, kPhiRow], from phi_row()
  const int64_t* target;      // slot; -1 where there is none
  const int64_t* target_row;  // that row of it which is nearest
  const int64_t* identity;    // null: no identity mask
  int64_t rows;
  const void* packed;  // the features as pack() has left them
  // Null: the weight of slot j is exp(z_j - shift), with a shift that follows the largest logit. Otherwise it is
  // exp(z_j - lse) - uniform, for the second sweep, times factor (null: 1).
  const T* lse;
  const T* uniform;
  const T* factor;
  const T* target_weight;  // for the prototypes' gradient: the weight of the target itself
};

struct Queue {
  const void* features;  // [K S, D]
  Format format;
  const int64_t* identity;  // [K], -1 = empty; null: none is masked
  const void* window;       // [B, D], same format, stands for slots start .. start + B - 1 (mod K); null: none
  const int64_t* window_identity;
  int64_t window_start, window_size;
  int64_t K, D, sub_centers;
  bool mask_empty;
  bool unit_slope;        // phi' = 1
  bool window_is_masked;  // the window's slots count for nothing: for the gradient of the rows that it replaces

  int64_t rows() const { return K * sub_centers; }
};

template <typename T>
struct Slots : Queue {
  const T *inverse_norm, *window_inverse_norm;  // [K S], [B]: rows are divided by their norms; null: taken as they are
};

// Sums over one chunk for each probe: with z = scale * phi(c) of the slots that are neither target nor masked,
//   sum = sum_j weight_j,  moment = sum_j weight_j phi'(c_j) w_j
template <typename T>
struct Partial {
  double shift[kBlock], sum[kBlock];
  double phi[kBlock];          // sum of phi(c_j), if wanted
  double weighed_phi[kBlock];  // sum of weight_j phi(c_j), if wanted
  double hard_sum[kBlock];     // sum of c_j over the hard slots
  int64_t hard[kBlock], live[kBlock];
  T hardest[kBlock];  // largest cosine c_j
  int64_t hardest_slot[kBlock], beats[kBlock];
  T* moment;  // moment_bytes(), in panels of probes, for finish() to read; null: not wanted
  bool wants_phi, wants_weighed_phi;
};

// A probe beside its target, in double.
struct Measured {
  double inverse_norm, unit;   // as in Probes
  double target_inverse_norm;  // 1 where targets are taken as they are
  double cosine;
  double sine;  // length of what the target has across the probe
};

// What finish() makes the gradient of a block's probes from: that for the unit probe,
//   scale * sum over chunks of share * moment + target_slope * target,
// then projected, since the probe was normalised.
template <typename T>
struct Moments {
  const T* const* moment;  // [chunks]
  const T* share;          // [chunks, kBlock]; NaN makes the probe's gradient NaN
  int64_t chunks;
  const double* scale;         // [rows]
  const double* target_slope;  // [rows]
  const void* const* target;   // [rows] of [D]; null: the probe is ignored, its gradient 0
  Format target_format;
};

// Operations on rows, the same for every type of sums.
struct RowOperations {
  // Norms of rows [first, last) of features [.., D].
  void (*norms)(const void* features, Format, int64_t D, int64_t first, int64_t last, double* to);
  // Rows [first, last) of `from` [.., D], times scale[row - first], into `to` [K, D]: row i becomes row start + i
  // modulo K. Where the scale is 0 the row becomes zeros, whatever it held.
  void (*scaled_rows)(
      const void* from, Format, int64_t D, int64_t first, int64_t last, const double* scale, void* to, Format,
      int64_t start, int64_t K);
  // A probe [D] and its target [D]; scratch [2 D].
  Measured (*measure)(
      const void* probe, Format, const void* target, Format, int64_t D, bool normalize_target, double* scratch);
};

template <typename T>
struct Sweep {
  // What pack() writes for a block of probes: for run(); `for_prototypes`, for run_prototypes().
  int64_t (*pack_bytes)(int64_t rows, int64_t D, bool for_prototypes);
  void (*pack)(const Probes<T>&, int64_t D, bool for_prototypes, void* packed);
  // Bytes of scratch for one task of run() or run_prototypes(), of the moments of a block, of scratch for finish().
  int64_t (*scratch_bytes)(int64_t D, bool for_prototypes);
  int64_t (*moment_bytes)(int64_t rows, int64_t D);
  int64_t (*finish_bytes)(int64_t D);
  // One block of probes over rows [first, last).
  void (*run)(Kind, const Probes<T>&, const Slots<T>&, int64_t first_row, int64_t last_row, void* scratch, Partial<T>&);
  // The gradient [rows, D] of a block's probes.
  void (*finish)(const Probes<T>&, const Moments<T>&, int64_t D, void* scratch, T* gradient);
  // All blocks over rows [first, last): writes those of the prototypes' gradient [K S, D].
  void (*run_prototypes)(
      Kind, const Probes<T>* blocks, int64_t count, const Slots<T>&, int64_t first_row, int64_t last_row, void* scratch,
      Format, void* gradient);
};

struct Sweeps {
  const char* name;
  RowOperations rows;
  Sweep<float> f32;
  Sweep<double> f64;
  const Sweep<float>* pairs;  // probes in bfloat16, queue in bfloat16 or float8, D even; null: none
};

// The widest instruction set that both the compiler and this processor know.
const Sweeps& sweeps();

// One per instruction set, each in its own file; null where the compiler does not target that architecture.
const Sweeps* sweeps_generic();
const Sweeps* sweeps_avx2();
const Sweeps* sweeps_avx512();
const Sweep<float>* pairs_avx512();  // for processors with AVX512-BF16

}  // namespace sst_fast::cpu
