// Runs the code of csrc/cuda/sweep_sm90.h on the CPU: every CUDA thread is a thread here, and what sm90.h takes from
// the GPU is done as the PTX ISA describes it. Slow, and no proof of the instructions themselves; but masks, index
// arithmetic, barriers and sums are the kernel's own. Built and called by tests/test_sweep_sm90.py.
#define SST_FAST_SM90_H
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "tiles.h"

#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __forceinline__
#define __forceinline__ inline
#endif

using std::min;

struct CUtensorMap {  // rows of so many bytes; a box has 64 rows and `panels` times 128 bytes of each
  const unsigned char* data;
  int64_t rows, bytes;
  int panels;
};

namespace {

constexpr int kBlockThreads = 384, kFirst = 1040;  // shared memory does not begin at a multiple of 1,024

struct Barrier {
  std::mutex mutex;
  std::condition_variable ended;
  int64_t arrivals, pending, bytes = 0;
  uint64_t phase = 0;
  explicit Barrier(int64_t arrivals) : arrivals(arrivals), pending(arrivals) {}
  void add(int64_t arrived, int64_t expected) {
    const std::lock_guard lock(mutex);
    pending -= arrived, bytes += expected;
    if (pending == 0 && bytes == 0) pending = arrivals, phase++, ended.notify_all();
  }
  void wait(uint32_t parity) {
    std::unique_lock lock(mutex);
    ended.wait(lock, [&] { return (phase & 1) != parity; });
  }
};

struct Warp {
  std::barrier<> step{32};
  uint32_t values[32];
};

struct Block {
  std::vector<unsigned char> memory;
  Warp warps[kBlockThreads / 32];
  std::barrier<> all{kBlockThreads}, consumers{256};
  std::vector<std::unique_ptr<Barrier>> barriers;
  explicit Block(size_t bytes) : memory(kFirst + bytes) {}
};

struct Index {
  int x, y;
};

struct Thread {
  std::vector<std::unique_ptr<Block>>* cluster;
  std::barrier<>* cluster_barrier;
  Block* block;
  uint32_t rank;
  Index thread, at;
};
thread_local Thread me;

#define threadIdx me.thread
#define blockIdx me.at

template <typename T>
T __ldg(const T* at) {
  return *at;
}
int __popc(uint32_t bits) { return __builtin_popcount(bits); }
void __syncthreads() { me.block->all.arrive_and_wait(); }
Warp& warp() { return me.block->warps[me.thread.x / 32]; }
void __syncwarp() { warp().step.arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  static_assert(sizeof(T) == 4);
  Warp& w = warp();
  const int lane = me.thread.x % 32;
  std::memcpy(&w.values[lane], &value, 4);
  w.step.arrive_and_wait();
  T other;
  std::memcpy(&other, &w.values[lane ^ step], 4);
  w.step.arrive_and_wait();
  return other;
}

bool __any_sync(unsigned, bool value) {
  Warp& w = warp();
  w.values[me.thread.x % 32] = value;
  w.step.arrive_and_wait();
  bool any = false;
  for (uint32_t v : w.values) any |= v != 0;
  w.step.arrive_and_wait();
  return any;
}

}  // namespace

namespace sst_fast::cuda::sm90 {

inline unsigned char* shared_memory() { return me.block->memory.data() + kFirst; }
inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const unsigned char*>(pointer) - me.block->memory.data());
}
inline Barrier& of(uint64_t* barrier) { return *reinterpret_cast<Barrier*>(*barrier); }

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  me.block->barriers.push_back(std::make_unique<Barrier>(arrivals));
  *barrier = reinterpret_cast<uint64_t>(me.block->barriers.back().get());
}
inline void barrier_init_done() {}
template <typename T>
T* elsewhere(T* pointer, uint32_t block) {
  return reinterpret_cast<T*>((*me.cluster)[block]->memory.data() + shared_address(pointer));
}
inline void arrive(uint64_t* barrier) { of(barrier).add(1, 0); }
inline void arrive_at(uint64_t* barrier, uint32_t block) { of(elsewhere(barrier, block)).add(1, 0); }
inline void arrive_and_expect(uint64_t* barrier, uint32_t bytes) { of(barrier).add(1, bytes); }
inline void wait(uint64_t* barrier, uint32_t parity) { of(barrier).wait(parity); }
inline void publish() {}
inline uint32_t block_in_cluster() { return me.rank; }
inline void sync_cluster() { me.cluster_barrier->arrive_and_wait(); }
template <int threads>
void sync_threads() {
  static_assert(threads == 256);
  me.block->consumers.arrive_and_wait();
}
inline float power_of_two(float x) { return std::exp2(x); }
template <int count>
void hold(float (&)[count]) {}
inline void begin_products() {}
inline void end_products() {}
template <int count>
void wait_for_products(float (&)[count]) {}
template <int count>
void more_registers() {}
template <int count>
void fewer_registers() {}

// 128-byte mode: bits 4 to 6 of an address are exclusive-ored with bits 7 to 9; 64-byte mode: 4 and 5 with 7 and 8.
inline uint32_t permuted(uint32_t address, bool narrow = false) {
  return address ^ (address >> 7 & (narrow ? 3 : 7)) << 4;
}

inline void load_tile(
    void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, int panel, uint16_t blocks) {
  for (uint32_t block = 0; block < me.cluster->size(); block++) {
    if (!(blocks >> block & 1)) continue;
    unsigned char* memory = (*me.cluster)[block]->memory.data();
    for (int p = 0; p < map.panels; p++)
      for (int r = 0; r < 64; r++)
        for (int c = 0; c < 128; c++) {
          const bool inside = row + r < map.rows && column == 0 && (panel + p) * 128 < map.bytes;
          memory[permuted(shared_address(to) + p * 8192 + r * 128 + c)] =
              inside ? map.data[(row + r) * map.bytes + (panel + p) * 128 + c] : 0;
        }
    of(elsewhere(barrier, block)).add(0, -int64_t(map.panels) * 8192);
  }
}
inline void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, int panel) {
  load_tile(to, map, barrier, column, row, panel, uint16_t(1u << me.rank));
}

template <typename T>
float read(uint64_t descriptor, bool columns, int outer, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const bool narrow = descriptor >> 62 == 2;
  const uint32_t at = columns ? start + outer / 64 * leading + outer % 64 * 2 + k / 8 * stride + k % 8 * 128
                              : start + outer / 8 * stride + outer % 8 * (narrow ? 64 : 128) + sizeof(T) * k;
  T value;
  std::memcpy(static_cast<void*>(&value), me.block->memory.data() + permuted(at, narrow), sizeof(T));
  return static_cast<float>(value);
}

template <typename T, bool kColumns, int count>
void product(float (&o)[count], uint64_t left, uint64_t right, bool accumulate) {
  constexpr int depth = 32 / sizeof(T);
  const int lane = me.thread.x % 32, row = me.thread.x % 128 / 32 * 16 + lane / 4;
  float a[2][depth];
  for (int r = 0; r < 2; r++)
    for (int k = 0; k < depth; k++) a[r][k] = read<T>(left, false, row + 8 * r, k);
  for (int j = 0; j < count / 4; j++)
    for (int e = 0; e < 2; e++) {
      float sums[2] = {};
      for (int k = 0; k < depth; k++) {
        const float b = read<T>(right, kColumns, 8 * j + 2 * (lane % 4) + e, k);
        for (int r = 0; r < 2; r++) sums[r] += a[r][k] * b;
      }
      for (int r = 0; r < 2; r++) {
        float& sum = o[4 * j + 2 * r + e];
        sum = (accumulate ? sum : 0.0f) + sums[r];
      }
    }
}

}  // namespace sst_fast::cuda::sm90

#include "cuda/sweep_sm90.h"

namespace {

using namespace sst_fast;
using namespace sst_fast::cuda;

template <typename Queue, int D>
void run(const CUtensorMap (&maps)[3], const Arguments& a, int blocks, int splits, int cluster, Kind kind) {
  using Kernel = void (*)(const CUtensorMap, const CUtensorMap, const CUtensorMap, const Arguments, const uint32_t);
  const Kernel kernel = with_phi(kind, [&](auto phi) -> Kernel {
    using Phi = decltype(phi);
    return a.moment ? sweep_kernel<Queue, D, Phi, true> : sweep_kernel<Queue, D, Phi, false>;
  });
  for (int y = 0; y < splits; y++)
    for (int x = 0; x < blocks; x += cluster) {
      std::vector<std::unique_ptr<Block>> group;
      for (int b = 0; b < cluster; b++)
        group.push_back(std::make_unique<Block>(sizeof(Shared<Element<Queue>, D>) + 1024));
      std::barrier<> together(cluster * kBlockThreads);
      std::vector<std::thread> threads;
      for (int b = 0; b < cluster; b++)
        for (int t = 0; t < kBlockThreads; t++)
          threads.emplace_back([&, b, t] {
            me = {&group, &together, group[b].get(), uint32_t(b), {t, 0}, {x + b, y}};
            kernel(maps[0], maps[1], maps[2], a, cluster);
          });
      for (auto& thread : threads) thread.join();
    }
}

}  // namespace

// dtype: 0 bfloat16, 1 float16, 2 float8_e4m3fn, 3 the same with products of float8. Pointers as in Arguments; null
// where there is none. Returns 0, or 1 where this is not compiled.
extern "C" int sweep(
    const void* unit, const void* prototypes, const void* window, const int64_t* window_start, const int64_t* target,
    const int64_t* identity, const int64_t* slot_identity, const int64_t* window_identity, const float* cosine,
    const float* scales, const float* phi_rows, float* shift, float* total, float* hard_sum, int* hard, int* live,
    float* hardest, int* slot, int* beats, float* moment, int N, int K, int B, int groups, int D, int dtype,
    int tiles_in_split, int cluster, int kind, int mask_empty, int straight) {
  Arguments a{
      prototypes,
      window,
      window_start,
      target,
      identity,
      slot_identity,
      window_identity,
      cosine,
      scales,
      phi_rows,
      shift,
      total,
      hard_sum,
      hard,
      live,
      hardest,
      slot,
      beats,
      moment,
      N,
      K,
      B,
      N / groups,
      (N / groups + 63) / 64,
      (K + 63) / 64 + (B + 63) / 64,
      tiles_in_split,
      mask_empty != 0,
      straight != 0,
      Kind(kind) == Kind::npc};
  const int64_t bytes = dtype == 3 ? D : 2 * D;
  const auto map = [&](const void* data, int64_t rows, int parts) {
    return CUtensorMap{static_cast<const unsigned char*>(data), rows, bytes, int(bytes / 128 / parts)};
  };
  const CUtensorMap maps[] = {
      map(unit, N, 1), map(prototypes, K, 2), window ? map(window, groups * B, 2) : map(prototypes, K, 2)};
  const int blocks = groups * a.blocks_in_group, splits = (a.tiles + tiles_in_split - 1) / tiles_in_split;
  const auto with = [&](auto queue, auto dim) {
    run<decltype(queue), decltype(dim)::value>(maps, a, blocks, splits, cluster, Kind(kind));
    return 0;
  };
  const std::integral_constant<int, 128> d128;
  const std::integral_constant<int, 256> d256;
  const std::integral_constant<int, 512> d512;
  if (dtype == 0 && D == 128) return with(__nv_bfloat16{}, d128);
  if (dtype == 0 && D == 256) return with(__nv_bfloat16{}, d256);
  if (dtype == 0 && D == 512) return with(__nv_bfloat16{}, d512);
  if (dtype == 1 && D == 128) return with(__half{}, d128);
  if (dtype == 2 && D == 128) return with(__nv_fp8_e4m3{}, d128);
  if (dtype == 2 && D == 512) return with(__nv_fp8_e4m3{}, d512);
  if (dtype == 3 && D == 256) return with(Float8Products{}, d256);
  if (dtype == 3 && D == 512) return with(Float8Products{}, d512);
  return 1;
}
