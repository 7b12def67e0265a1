// What one CPU task of the fused loss reads and writes. One task sweeps one block of probes over one chunk of slots.
//
// Sizes: N probes, K slots, D features, B slots in the batch window.
#pragma once

#include <cstdint>

namespace sst_fast::cpu {

enum class Storage { f64, f32, bf16, f16 };

constexpr int kBlock = 64;  // probes a task holds at most

template <typename T>
struct Probes {          // [rows] each, of one block
  const void* features;  // [rows, D], not normalised
  Storage storage;
  const double* inverse_norm;
  const T* scale;
  const T* target_cosine;
  const int64_t* target;    // slot
  const int64_t* identity;  // null: no identity mask
  int64_t rows;
};

struct Slots {
  const void* features;  // [K, D]
  Storage storage;
  const int64_t* identity;  // [K], -1 = empty; null: none is masked
  const void* window;       // [B, D], same storage, stands for slots start .. start + B - 1 (mod K); null: none
  const int64_t* window_identity;
  int64_t window_start, window_size;
  int64_t K, D;
  bool mask_empty;
};

// Sums over one chunk for each probe: with z = scale * phi(c) of the slots that are neither target nor masked,
//   sum = sum_j exp(z_j - shift),  moment = sum_j exp(z_j - shift) phi'(c_j) w_j
template <typename T>
struct Partial {
  double shift[kBlock], sum[kBlock];
  T hardest[kBlock];  // largest cosine c_j
  int64_t hardest_slot[kBlock], beats[kBlock];
  T* moment;  // [kBlock / width, D, width]: panels of `width` probes; null: not wanted
  int64_t moment_width;
};

template <typename T>
struct Sweep {
  // Bytes of scratch for one task.
  int64_t (*scratch)(int64_t D);
  void (*run)(const Probes<T>&, const Slots&, int64_t first_slot, int64_t last_slot, void* scratch, Partial<T>&);
};

struct Sweeps {
  const char* name;
  Sweep<float> f32;
  Sweep<double> f64;
};

// One per instruction set, each in its own file; null where the compiler does not target that architecture.
const Sweeps* sweeps_generic();
const Sweeps* sweeps_avx2();
const Sweeps* sweeps_avx512();

}  // namespace sst_fast::cpu
