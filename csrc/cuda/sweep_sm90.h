// The sweep of the fused loss on Hopper, with the copy engine and the products of warpgroups. Not yet run on a GPU.
//
// A block has 64 probes and a range of tiles, 64 slots each; two warpgroups hold half of the columns of its moment
// sum_j exp(z_j - shift) phi'_j w_j each. Even tiles are the first's to turn into weights, odd tiles the second's, and
// both add both:
//
//   warpgroup 1   cosines 0 | weights 0 | += weights 0 w_left | += weights 1 w_left
//   warpgroup 2               cosines 1 | weights 1 | += weights 0 w_right | += weights 1 w_right
//
// so that one's exponentials pass while the other's products run. A third warpgroup loads. Barriers:
//
//   full[tile][half]    its columns are there                 empty[tile][half]   everybody is done with them
//   weights[parity]     weights and shift are written         taken[parity]       both warpgroups are done with them
//   turns[tile]         of float8 products: it lies there with its slots along rows, too
//
// The shift goes from tile to tile with the weights and follows a row's largest logit lazily, by more than kSlack at a
// time; where it may begin at the largest logit there can be, it never moves. Blocks of a cluster share their slots:
// each loads one half for both. From top to bottom: what a block has in shared memory; Loader, what the third warpgroup
// does; Summing, what the other two do; the kernel; the table of its instances.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "../margin.h"
#include "../tiles.h"
#include "sm90.h"

namespace sst_fast::cuda {

constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr float kNever = -1e30f;     // cosine of a masked slot: finite, so that nothing becomes NaN on the way
constexpr int kNoSlot = -(1 << 30);  // target of a probe that has none among the slots
constexpr float kLog2e = 1.4426950408889634f;

// Name of a float8 queue whose products are of float8, too: half as many instructions, but probes and weights are
// rounded to four significant bits.
struct Float8Products {};

template <typename Queue>
constexpr bool kConverts = std::is_same_v<Queue, __nv_fp8_e4m3>;
template <typename Queue>
constexpr bool kBytes = std::is_same_v<Queue, Float8Products>;

// What products are made of; every float8_e4m3fn is a float16.
template <typename Queue>
using Element = std::conditional_t<kBytes<Queue>, __nv_fp8_e4m3, std::conditional_t<kConverts<Queue>, __half, Queue>>;

// A weight may reach exp(kSlack) before the shift moves, to kHead below the largest logit: float16 holds exp(8). float8
// ends at 448 and has little below 1, so there weights are kept large.
template <typename Queue>
constexpr float kSlack = kBytes<Queue> ? 6.0f : 8.0f;
template <typename Queue>
constexpr float kHead = kBytes<Queue> ? 5.0f : 0.0f;

// Unit rows in float8 are multiplied by this, for the same reason.
constexpr float kUnitOfBytes = 64.0f;

// What a probe has seen of some slots.
struct alignas(32) RowSums {
  float shift, total, hardest, hard_sum;  // total: sum of exp(z - shift); hard_sum: of the hard slots' cosines
  int slot, beats, live, hard;            // slot: the hardest; the others are counts
};

struct SweepArguments {
  const void* prototypes;  // of float8 queues, which this kernel reads itself
  const void* window;
  const int64_t* window_start;
  const int* target;               // [N], kNoSlot where there is none
  const int64_t* identity;         // [N] or null
  const int64_t* slot_identity;    // [K] or null; like window_identity at a multiple of 16 bytes
  const int64_t* window_identity;  // [B] or null
  const float* cosine;             // [N], with the target
  const float* scale;              // [N]
  const float* phi_rows;           // [kPhiRow, N]
  RowSums* sums;                   // [splits, N]
  float* moment;                   // [splits, N, D]
  int N, K, B, rows_in_group, blocks_in_group, tiles, tiles_in_split;
  bool mask_empty, straight, npc;
};

template <typename T, int D>
struct Shared {
  static constexpr int kTiles = D == 512 ? 2 : 4, kPanel = kPanelBytes / sizeof(T);
  static constexpr bool kTurns = sizeof(T) == 1;  // products of float8 know rows_operands alone
  alignas(1024) T x[D / kPanel][kRows][kPanel];
  alignas(1024) T w[kTiles][D / kPanel][kSlots][kPanel];
  alignas(1024) T turned[kTurns ? kTiles : 1][kTurns ? D : 1][kSlots];  // narrow panels
  alignas(1024) T p[2][kRows][kSlots];                                  // a panel each; of float8, narrow
  float shift[2][kRows];
  // Of the probes, read anew for each tile: registers are scarce.
  alignas(16) float phi_row[kRows][kPhiRow];
  float target_cosine[kRows], scale[kRows];
  int64_t identity[kRows];
  int target[kRows];
  RowSums sums[kRows];  // that one warpgroup hands to the other at the end
  uint64_t x_full, full[kTiles][2], turns[kTiles], empty[kTiles][2], weights[2], taken[2];
};

// What a block has to do.
struct Work {
  int group, first_row, row0, first_tile, last_tile, pairs, window_start;  // first_row: in its group
  uint32_t cluster, rank;

  __device__ __forceinline__ Work(const SweepArguments& a, uint32_t cluster)
      : group(blockIdx.x / a.blocks_in_group),
        first_row(blockIdx.x % a.blocks_in_group * kRows),
        row0(group * a.rows_in_group + first_row),
        first_tile(blockIdx.y * a.tiles_in_split),
        last_tile(min(first_tile + a.tiles_in_split, a.tiles)),
        pairs((last_tile - first_tile + 1) / 2),
        window_start(a.B ? static_cast<int>(*a.window_start) : 0),
        cluster(cluster),
        rank(sm90::block_in_cluster()) {}
};

template <typename Queue_, int D_, typename Phi_, bool kMoment_>
struct Instance {
  using Queue = Queue_;
  using T = Element<Queue>;
  using Phi = Phi_;
  static constexpr int D = D_, kTiles = Shared<T, D>::kTiles, kPanel = Shared<T, D>::kPanel, kHalf = D / kPanel / 2;
  static constexpr bool kMoment = kMoment_, kConvert = kConverts<Queue>, kTurns = Shared<T, D>::kTurns && kMoment;
  static constexpr bool kWorkingLoader = kConvert || kTurns;
};

template <typename S>
__device__ __forceinline__ void begin_barriers(Shared<typename S::T, S::D>& shared, uint32_t cluster) {
  using namespace sm90;
  barrier_init(&shared.x_full, 1);
  for (int tile = 0; tile < S::kTiles; tile++) {
    for (int half = 0; half < 2; half++) {
      barrier_init(&shared.full[tile][half], S::kConvert ? kWarpgroup : 1);
      barrier_init(&shared.empty[tile][half], 4 * cluster);  // warps of one warpgroup, in each block
    }
    barrier_init(&shared.turns[tile], kWarpgroup);
  }
  for (int parity = 0; parity < 2; parity++) {
    barrier_init(&shared.weights[parity], kWarpgroup);
    barrier_init(&shared.taken[parity], 8);
  }
  barrier_init_done();
}

// --- loads -----------------------------------------------------------------------------------------------------------

// A warpgroup's part of loading a float8 queue that is multiplied as float16: half of a tile's columns, rows beyond
// `count` as zeros.
template <int D>
__device__ void widen(const unsigned char* from, int count, int half, Shared<__half, D>& shared, int at) {
  constexpr int kPanel = Shared<__half, D>::kPanel, kChunks = kSlots * D / 2 / 16;  // 16 numbers each
  constexpr int kAtOnce = kChunks / kWarpgroup < 4 ? kChunks / kWarpgroup : 4;      // loads under way
#pragma unroll 1
  for (int chunk = threadIdx.x; chunk < kChunks; chunk += kAtOnce * kWarpgroup) {
    uint4 bytes[kAtOnce] = {};
    const auto slot = [&](int i) { return (chunk + i * kWarpgroup) / (D / 32); };
    const auto column = [&](int i) { return half * (D / 2) + (chunk + i * kWarpgroup) % (D / 32) * 16; };
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
      if (slot(i) < count) bytes[i] = __ldg(reinterpret_cast<const uint4*>(from + int64_t(slot(i)) * D + column(i)));
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const uint32_t words[4] = {bytes[i].x, bytes[i].y, bytes[i].z, bytes[i].w};
      uint32_t wide[8];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const auto two = static_cast<__nv_fp8x2_storage_t>(words[k / 2] >> (k % 2 * 16));
        const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
        wide[k] = uint32_t(halves.y) << 16 | halves.x;
      }
      auto* panel = reinterpret_cast<unsigned char*>(shared.w[at][column(i) / kPanel]);
      const int to = column(i) % kPanel / 8;
      *reinterpret_cast<uint4*>(panel + swizzled(slot(i), to)) = {wide[0], wide[1], wide[2], wide[3]};
      *reinterpret_cast<uint4*>(panel + swizzled(slot(i), to + 1)) = {wide[4], wide[5], wide[6], wide[7]};
    }
  }
}

// Writes a tile of float8 with its slots along rows: four slots by sixteen columns at a time.
template <int D>
__device__ void turn(Shared<__nv_fp8_e4m3, D>& shared, int at) {
  constexpr int kPanel = Shared<__nv_fp8_e4m3, D>::kPanel;
  for (int part = threadIdx.x; part < kSlots / 4 * D / 16; part += kWarpgroup) {
    const int j = part % (kSlots / 4) * 4, column = part / (kSlots / 4) * 16;
    const auto* panel = reinterpret_cast<const unsigned char*>(shared.w[at][column / kPanel]);
    uint32_t words[4][4];  // of a slot, four columns each
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 row = *reinterpret_cast<const uint4*>(panel + swizzled(j + i, column % kPanel / 16));
      words[i][0] = row.x, words[i][1] = row.y, words[i][2] = row.z, words[i][3] = row.w;
    }
    auto* to = reinterpret_cast<unsigned char*>(shared.turned[at]);
#pragma unroll
    for (int d = 0; d < 16; d++) {
      uint32_t slots = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) slots |= (words[i][d / 4] >> (d % 4 * 8) & 0xff) << (8 * i);
      *reinterpret_cast<uint32_t*>(to + narrow_swizzled(column + d, j / 16) + j % 16) = slots;
    }
  }
}

template <typename S>
struct Loader {
  Shared<typename S::T, S::D>& shared;
  const Work& work;
  const SweepArguments& a;
  const CUtensorMap &x_map, &w_map, &window_map;

  __device__ __forceinline__ void run() {
    using namespace sm90;
    if (threadIdx.x == 0) {
      arrive_and_expect(&shared.x_full, sizeof(shared.x));
      load_tile(shared.x, x_map, &shared.x_full, 0, work.row0, 0);
    }
    if constexpr (S::kTurns) {  // the next tile is on its way while this one is turned
      if (threadIdx.x == 0) load(0);
      for (int t = 0; t < 2 * work.pairs; t++) {
        if (threadIdx.x == 0 && t + 1 < 2 * work.pairs) load(t + 1);
        for (int half = 0; half < 2; half++) wait(&shared.full[t % S::kTiles][half], t / S::kTiles & 1);
        turn<S::D>(shared, t % S::kTiles);
        publish();
        arrive(&shared.turns[t % S::kTiles]);
      }
    } else if (S::kConvert || threadIdx.x == 0) {
      for (int t = 0; t < 2 * work.pairs; t++) load(t);
    }
  }

  __device__ __forceinline__ void load(int t) {
    using namespace sm90;
    const int at = t % S::kTiles, round = t / S::kTiles;
    const SlotTile tile(work.first_tile + t, a.tiles, work.window_start, a.K, a.B);
    const int64_t first = tile.first + (tile.of_window ? int64_t(work.group) * a.B : 0);
    for (int half = 0; half < 2; half++) {
      uint64_t* const full = &shared.full[at][half];
      if constexpr (S::kConvert) {
        const auto* from = static_cast<const unsigned char*>(tile.of_window ? a.window : a.prototypes);
        if (round > 0) wait(&shared.empty[at][half], (round - 1) & 1);
        widen<S::D>(from + first * S::D, tile.end - tile.first, half, shared, at);
        publish();
        arrive(full);
      } else {
        const bool mine = work.cluster == 1 || work.rank == uint32_t(half);
        if (round > 0) wait(mine ? &shared.empty[at][half] : full, (round - 1) & 1);
        arrive_and_expect(full, sizeof(typename S::T) * kSlots * S::D / 2);
        const CUtensorMap& map = tile.of_window ? window_map : w_map;
        void* to = shared.w[at][half * S::kHalf];
        if (work.cluster == 1)
          load_tile(to, map, full, 0, first, half * S::kHalf);
        else if (mine)
          load_tile(to, map, full, 0, first, half * S::kHalf, 3);
      }
    }
  }
};

// --- cosines, weights, moments ---------------------------------------------------------------------------------------

// What a warpgroup does. A thread has parts of two rows, r = 0 and 1. Its cosines and weights are c[n]: of row n / 2 %
// 2, at column(n).
template <typename S>
struct Summing {
  using T = typename S::T;
  using Phi = typename S::Phi;
  static constexpr int D = S::D, kTiles = S::kTiles;
  static constexpr bool kMoment = S::kMoment, kPlain = Phi::kIdentity;
  // Whether a masked slot's cosine kNever makes a weight of 0 by itself.
  static constexpr bool kVanishes = Phi::kIdentity || Phi::kHard;
  static constexpr uint32_t kAll = 0xffffffffu;

  Shared<T, D>& shared;
  const Work& work;
  const SweepArguments& a;
  int half, lane, pair, row[2];
  float shift[2];
  float scale[2], phi_row[2][kPhiRow];  // while weights are found
  float o[kMoment ? D / 4 : 1] = {};
  float total[2] = {}, hard_sum[2] = {}, hardest[2] = {kNever, kNever};
  int hard[2] = {}, live[2] = {}, beats[2] = {}, hardest_slot[2] = {-1, -1};

  __device__ __forceinline__ Summing(Shared<T, D>& shared, const Work& work, const SweepArguments& a)
      : shared(shared), work(work), a(a) {
    half = sm90::uniform(threadIdx.x / kWarpgroup) - 1;
    lane = threadIdx.x % 32, pair = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row[r] = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4 + 8 * r;
      const int i = min(work.row0 + row[r], a.N - 1);  // a row beyond the end does as another, and is not stored
      const float its_scale = a.scale[i];
      if (half == 0) {
        if (pair < Phi::kRow) shared.phi_row[row[r]][pair] = a.phi_rows[int64_t(pair) * a.N + i];
        if (pair == 0) {
          shared.target_cosine[row[r]] = a.cosine[i], shared.scale[row[r]] = its_scale;
          shared.target[row[r]] = a.target[i], shared.identity[row[r]] = a.identity ? a.identity[i] : 0;
        }
      }
      // Weights of bfloat16 reach down to exp(-80): where no logit is above `scale`, and none below -scale, none is
      // lost.
      const bool steady = std::is_same_v<T, __nv_bfloat16> && kPlain && its_scale <= 40.0f;
      shift[r] = steady ? its_scale : kNever;
    }
  }

  __device__ __forceinline__ void run() {
    sm90::sync_threads<2 * kWarpgroup>();  // the loading warpgroup is not among them
    sm90::wait(&shared.x_full, 0);
    for (int step = 0; step < work.pairs; step++) {
      const int t = 2 * step + half;
      const SlotTile tile(work.first_tile + t, work.last_tile, work.window_start, a.K, a.B);
      float c[32], sum[2] = {};
      begin_cosines(c, t);
      const uint32_t alive = alive_slots(tile);  // meanwhile
      end_cosines(c, t);
      weigh(c, sum, alive, tile, step);
      if constexpr (kMoment) {
#pragma unroll
        for (int parity = 0; parity < 2; parity++) accumulate(parity, step, sum);
      }
    }
    finish();
  }

 private:
  __device__ __forceinline__ int column(int n) const { return n / 4 * 8 + 2 * pair + n % 2; }

  __device__ __forceinline__ void begin_cosines(float (&c)[32], int t) {
    using namespace sm90;
    const int at = t % kTiles;
    const uint64_t x = rows_operand(shared_address(shared.x)), w = rows_operand(shared_address(shared.w[at]));
#pragma unroll
    for (int side = 0; side < 2; side++) {
      wait(&shared.full[at][side], t / kTiles & 1);
      if (side == 0) {
        hold(c);
        begin_products();
      }
#pragma unroll
      for (int k = 0; k < 4 * S::kHalf; k++) {  // 32 bytes of each row
        const int bytes = (side * S::kHalf + k / 4) * kRows * kPanelBytes + k % 4 * 32;
        wgmma<T, false>(c, operand_at(x, bytes), operand_at(w, bytes), side != 0 || k != 0);
      }
    }
    end_products();
  }

  __device__ __forceinline__ void end_cosines(float (&c)[32], int t) {
    using namespace sm90;
    wait_for_products(c);
    if constexpr (kBytes<typename S::Queue>)
      for (float& cosine : c) cosine *= 1.0f / kUnitOfBytes;
    if constexpr (!kMoment) {  // nobody reads the tile again
      __syncwarp();
      if (lane == 0)
        for (int side = 0; side < 2; side++) arrive_at(&shared.empty[t % kTiles][side], work.cluster > 1 ? side : 0);
    }
  }

  // Which slots count, a bit for each of c.
  __device__ __forceinline__ uint32_t alive_slots(const SlotTile& tile) const {
    const int64_t* identities = tile.of_window ? a.window_identity : a.slot_identity;
    uint32_t alive = kAll;
    // Most tiles are whole, and hold no slot that an identity masks: seen from few words of each, many at once.
    bool exact = !tile.whole();
    if (identities && !exact) {
      const int mine[2] = {int(shared.identity[row[0]]), int(shared.identity[row[1]])};
      int lowest = 0;
      bool same = false;
#pragma unroll S::kWorkingLoader ? 2 : 4  // loads under way: registers are scarce
      for (int j = 0; j < 8; j++) {
        const int4 two = __ldg(reinterpret_cast<const int4*>(identities + tile.first + 8 * j + 2 * pair));
        lowest |= two.y | two.w;
        same |= (two.x == mine[0]) | (two.z == mine[0]) | (two.x == mine[1]) | (two.z == mine[1]);
      }
      exact = (a.mask_empty && lowest < 0) || (a.identity && same);
    }
    if (exact) alive = exactly_alive(tile, identities);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int at = tile.column(shared.target[row[r]]);
      if (at >= 0 && at < kSlots && at % 8 / 2 == pair) alive &= ~(1u << (at / 8 * 4 + 2 * r + at % 2));
    }
    return alive;
  }

  // The same, target apart, slot by slot; n and n + 2 are the same slot, in both rows.
  __device__ __forceinline__ uint32_t exactly_alive(const SlotTile& tile, const int64_t* identities) const {
    uint32_t alive = 0;
#pragma unroll 1
    for (int n = 0; n < 32; n += n % 4 ? 3 : 1) {
      if (tile.slot(column(n)) < 0) continue;
      uint32_t bits = 5;
      if (identities) {
        const int64_t theirs = __ldg(identities + tile.first + column(n));
        if (a.mask_empty && theirs < 0) bits = 0;
#pragma unroll
        for (int r = 0; r < 2; r++)
          if (a.identity && theirs == shared.identity[row[r]]) bits &= ~(1u << (2 * r));
      }
      alive |= bits << n;
    }
    return alive;
  }

  __device__ __forceinline__ float exponential_of_phi(float c, int r) const {
    if constexpr (Phi::kExp)
      return sm90::power_of_two(Phi::exponent(c, phi_row[r]) * kLog2e);
    else
      return 0.0f;
  }

  // Turns cosines into weights exp(z - shift) phi', which go to shared memory, and adds what is the row's own.
  __device__ __forceinline__ void weigh(
      float (&c)[32], float (&sum)[2], uint32_t alive, const SlotTile& tile, int step) {
    using namespace sm90;
    const bool masked = __any_sync(kAll, alive != kAll);
    if (masked) {
#pragma unroll
      for (int n = 0; n < 32; n++)
        if (!(alive >> n & 1)) c[n] = kNever;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      scale[r] = shared.scale[row[r]];
#pragma unroll
      for (int q = 0; q < Phi::kRow; q++) phi_row[r][q] = shared.phi_row[row[r]][q];
    }
    float top[2] = {kNever, kNever};
    count(c, top, alive, tile);
    if constexpr (!kPlain) {
#pragma unroll
      for (int n = 0; n < 32; n++) {
        const int r = n / 2 % 2;
        const float z = scale[r] * Phi::value(c[n], phi_row[r], exponential_of_phi(c[n], r));
        if (kVanishes || !masked || alive >> n & 1) top[r] = fmaxf(top[r], z);
      }
    }
    if constexpr (kMoment)
      if (half == 1) wait(&shared.weights[0], step & 1);
    float now[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAll, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAll, top[r], 2));
      now[r] = kMoment && half == 1 ? shared.shift[0][row[r]] : shift[r];
      if (top[r] > now[r] + kSlack<typename S::Queue>) now[r] = top[r] - kHead<typename S::Queue>;
    }
    exponentials(c, sum, now, alive);
    if constexpr (kMoment) {
      if (step > 0) wait(&shared.taken[half], (step - 1) & 1);
      store(c);
      if (pair == 0)
        for (int r = 0; r < 2; r++) shared.shift[half][row[r]] = now[r];
      publish();
      arrive(&shared.weights[half]);
    } else {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        total[r] = total[r] * power_of_two((shift[r] - now[r]) * kLog2e) + sum[r];
        shift[r] = now[r];
      }
    }
  }

  // Statistics; and, where phi is the identity, the largest logit of each row.
  __device__ __forceinline__ void count(const float (&c)[32], float (&top)[2], uint32_t alive, const SlotTile& tile) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float best = kNever;
#pragma unroll
      for (int n = 2 * r; n < 32; n += n % 2 ? 3 : 1) best = fmaxf(best, c[n]);
      live[r] += __popc(alive & (r ? 0xccccccccu : 0x33333333u));
      if (kPlain && best > kNever) top[r] = scale[r] * best;
      const float target_cosine = shared.target_cosine[row[r]];
      if (best > target_cosine) {  // seldom, once a probe is trained
#pragma unroll
        for (int n = 2 * r; n < 32; n += n % 2 ? 3 : 1) beats[r] += c[n] > target_cosine;
      }
      if (best > hardest[r]) {  // seldom, after the first tiles
        hardest[r] = best;
        int at = 0;
#pragma unroll
        for (int n = 2 * r; n < 32; n += n % 2 ? 3 : 1)
          if (c[n] == best) at = column(n);
        hardest_slot[r] = tile.slot(at);
      }
      if constexpr (Phi::kHard)
        if (a.npc && best > phi_row[r][0]) {
#pragma unroll
          for (int n = 2 * r; n < 32; n += n % 2 ? 3 : 1)
            if (c[n] > phi_row[r][0]) hard[r]++, hard_sum[r] += c[n];
        }
    }
  }

  // c becomes exp(z - now), times the slope of phi; sum: without.
  __device__ __forceinline__ void exponentials(
      float (&c)[32], float (&sum)[2], const float (&now)[2], uint32_t alive) const {
    float by[2], from[2];
#pragma unroll
    for (int r = 0; r < 2; r++) by[r] = scale[r] * kLog2e, from[r] = now[r] > kNever ? now[r] * kLog2e : 0.0f;
#pragma unroll
    for (int n = 0; n < 32; n++) {
      const int r = n / 2 % 2;
      const float e = exponential_of_phi(c[n], r);
      float p = sm90::power_of_two(Phi::value(c[n], phi_row[r], e) * by[r] - from[r]);
      if (!kVanishes && !(alive >> n & 1)) p = 0.0f;
      sum[r] += p;
      if (!kPlain && !a.straight) p *= Phi::slope(c[n], phi_row[r], e);
      c[n] = p;
    }
  }

  // Weights to shared memory, as an operand.
  __device__ __forceinline__ void store(const float (&c)[32]) {
    using namespace sm90;
    if constexpr (kBytes<typename S::Queue>) {
      auto* panel = reinterpret_cast<unsigned char*>(shared.p[half]);
#pragma unroll
      for (int n = 0; n < 32; n += 2) {
        const int chunk = n / 4;  // eight slots
        *reinterpret_cast<__nv_fp8x2_storage_t*>(
            panel + narrow_swizzled(row[n / 2 % 2], chunk / 2) + chunk % 2 * 8 + 2 * pair) =
            __nv_cvt_float2_to_fp8x2({c[n], c[n + 1]}, __NV_SATFINITE, __NV_E4M3);
      }
    } else {
      // Matrices are rows r = 0 and 1 of two neighbouring chunks of eight slots: this lane says where a row begins.
      const uint32_t to =
          shared_address(shared.p[half]) + swizzled(row[0] / 16 * 16 + lane / 8 % 2 * 8 + lane % 8, lane / 16);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int m = 0; m < 4; m++) words[m] = rounded(c[4 * j + 2 * m], c[4 * j + 2 * m + 1]);
        store_matrices(to ^ (j << 4), words);
      }
    }
  }

  // Two numbers of 16 bits.
  __device__ __forceinline__ static uint32_t rounded(float first, float second) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 two = __floats2half2_rn(first, second);
      memcpy(&word, &two, 4);
    } else {
      const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
      memcpy(&word, &two, 4);
    }
    return word;
  }

  // Adds weights times slots of one tile of the pair to this warpgroup's columns of the moment.
  __device__ __forceinline__ void accumulate(int parity, int step, const float (&sum)[2]) {
    using namespace sm90;
    const int t = 2 * step + parity, at = t % kTiles;
    wait(&shared.weights[parity], step & 1);
    float now[2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      now[r] = shared.shift[parity][row[r]];
      moved |= now[r] != shift[r];
    }
    if (__any_sync(kAll, moved)) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float fade = power_of_two((shift[r] - now[r]) * kLog2e);
        total[r] *= fade;
        shift[r] = now[r];
#pragma unroll
        for (int n = 2 * r; n < D / 4; n += n % 2 ? 3 : 1) o[n] *= fade;
      }
    }
    if (parity == half)
      for (int r = 0; r < 2; r++) total[r] += sum[r];
    if constexpr (S::kTurns) {
      wait(&shared.turns[at], t / kTiles & 1);
      add_products_of_bytes(parity, at);
    } else {
      wait(&shared.full[at][half], t / kTiles & 1);
      const uint64_t p = rows_operand(shared_address(shared.p[parity]));
      const uint64_t w = columns_operand(shared_address(shared.w[at][half * S::kHalf]), kSlots * kPanelBytes);
      hold(o);
      begin_products();
#pragma unroll
      for (int k = 0; k < kSlots / 16; k++)
        wgmma<T, true>(o, operand_at(p, 32 * k), operand_at(w, 16 * k * kPanelBytes), true);
      end_products();
      wait_for_products(o);
    }
    __syncwarp();
    if (lane == 0) {
      arrive_at(&shared.empty[at][half], work.cluster > 1 ? half : 0);
      arrive(&shared.taken[parity]);
    }
  }

  // Hopper adds products of float8 with 13 bits: a tile's are added up so, tiles in float32. Part of the columns at a
  // time, as registers are scarce.
  __device__ __forceinline__ void add_products_of_bytes(int parity, int at) {
    using namespace sm90;
    constexpr int kPart = 32;
    const uint64_t p = narrow_rows_operand(shared_address(shared.p[parity]));
    const uint64_t w = narrow_rows_operand(shared_address(shared.turned[at][half * (D / 2)]));
#pragma unroll
    for (int first = 0; first < D / 4; first += kPart) {
      float part[kPart];
      hold(part);
      begin_products();
#pragma unroll
      for (int k = 0; k < kSlots / 32; k++)
        wgmma<T, false>(part, operand_at(p, 32 * k), operand_at(w, 2 * first * kSlots + 32 * k), k != 0);
      end_products();
      wait_for_products(part);
#pragma unroll
      for (int n = 0; n < kPart; n++) o[first + n] += part[n];
    }
  }

  // Four lanes share a row, then both warpgroups.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; r++)
      for (int step = 1; step < 4; step *= 2) {
        total[r] += __shfl_xor_sync(kAll, total[r], step);
        hard_sum[r] += __shfl_xor_sync(kAll, hard_sum[r], step);
        hard[r] += __shfl_xor_sync(kAll, hard[r], step);
        live[r] += __shfl_xor_sync(kAll, live[r], step);
        beats[r] += __shfl_xor_sync(kAll, beats[r], step);
        const float other = __shfl_xor_sync(kAll, hardest[r], step);
        const int its_slot = __shfl_xor_sync(kAll, hardest_slot[r], step);
        if (other > hardest[r] || (other == hardest[r] && its_slot > hardest_slot[r]))
          hardest[r] = other, hardest_slot[r] = its_slot;
      }
    if (half == 1 && pair == 0)
      for (int r = 0; r < 2; r++)
        shared.sums[row[r]] = {shift[r],        total[r], hardest[r], hard_sum[r],
                               hardest_slot[r], beats[r], live[r],    hard[r]};
    sm90::sync_threads<2 * kWarpgroup>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (work.first_row + row[r] >= a.rows_in_group) continue;
      const int64_t out = int64_t(blockIdx.y) * a.N + work.row0 + row[r];
      if (half == 0 && pair == 0) {
        const RowSums other = shared.sums[row[r]];
        const float both = fmaxf(shift[r], other.shift);
        const bool mine = hardest[r] >= other.hardest;
        a.sums[out] = {
            both,
            total[r] * sm90::power_of_two((shift[r] - both) * kLog2e) +
                other.total * sm90::power_of_two((other.shift - both) * kLog2e),
            mine ? hardest[r] : other.hardest,
            hard_sum[r] + other.hard_sum,
            mine ? hardest_slot[r] : other.slot,
            beats[r] + other.beats,
            live[r] + other.live,
            hard[r] + other.hard};
      }
      if constexpr (kMoment) {
        float* to = a.moment + out * D + half * (D / 2) + 2 * pair;
#pragma unroll
        for (int n = 0; n < D / 16; n++)
          *reinterpret_cast<float2*>(to + 8 * n) = {o[4 * n + 2 * r], o[4 * n + 2 * r + 1]};
      }
    }
  }
};

// --- the kernel ------------------------------------------------------------------------------------------------------

// Grid [groups * blocks_in_group, splits], kThreads threads; maps of the unit probes, the queue and the window.
template <typename Queue, int D, typename Phi, bool kMoment>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
    const __grid_constant__ CUtensorMap window_map, const __grid_constant__ SweepArguments a, const uint32_t cluster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Instance<Queue, D, Phi, kMoment>;
  unsigned char* const raw = sm90::shared_memory();
  auto& shared = *reinterpret_cast<Shared<typename S::T, D>*>(raw + (-sm90::shared_address(raw) & 1023));
  const Work work(a, cluster);
  if (threadIdx.x == 0) begin_barriers<S>(shared, cluster);
  if (cluster > 1)
    sm90::sync_cluster();
  else
    __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    sm90::fewer_registers<S::kWorkingLoader ? 40 : 24>();
    Loader<S>{shared, work, a, x_map, w_map, window_map}.run();
  } else {
    sm90::more_registers<S::kWorkingLoader ? 232 : 240>();
    Summing<S>(shared, work, a).run();
  }
  // Nobody leaves while another block may still write here.
  if (cluster > 1) {
    __syncwarp();
    sm90::sync_cluster();
  }
#else
  __trap();  // never launched: sst_fast/backends/hopper.py asks what was built
#endif
}

struct SweepKernel {
  void (*kernel)(CUtensorMap, CUtensorMap, CUtensorMap, SweepArguments, uint32_t);
  int shared_bytes;
};

// D: 128, 256 or 512; of products of float8 not 128, which has no two halves of a panel. Defined in
// sweep_sm90_instances.h, in a source file for each Queue.
template <typename Queue>
SweepKernel sweep_kernel_of(int D, Kind kind, bool moment);

}  // namespace sst_fast::cuda
