// The sweep of the fused loss on Hopper: what kernels/margin_softmax.py does between `prepare` and `combine`, with the
// copy engine and the products of warpgroups. Not yet run on a GPU.
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
// The shift goes from tile to tile and follows a row's largest logit lazily, by more than kSlack at a time; where it
// may begin at the largest logit there can be, it never moves. Blocks of a cluster share their slots: each loads one
// half for both.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "../margin.h"
#include "../tiles.h"
#include "sm90.h"

namespace sst_fast::cuda {

constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr float kNever = -1e30f;  // cosine of a masked slot: finite, so that nothing becomes NaN on the way
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

struct Arguments {
  const void* prototypes;  // of float8 queues, which this kernel reads itself
  const void* window;
  const int64_t* window_start;
  const int64_t* target;
  const int64_t* identity;         // [N] or null
  const int64_t* slot_identity;    // [K] or null
  const int64_t* window_identity;  // [B] or null
  const float* cosine;
  const float* scales;
  const float* phi_rows;  // [kPhiRow, N]
  float* shift;           // this and the following: [splits, N]
  float* total;
  float* hard_sum;
  int* hard;
  int* live;
  float* hardest;
  int* slot;
  int* beats;
  float* moment;  // [splits, N, D]
  int N, K, B, rows_in_group, blocks_in_group, tiles, tiles_in_split;
  bool mask_empty, straight, npc;
};

// Sums of the rows that one warpgroup hands to the other at the end.
struct Sums {
  float shift[kRows], total[kRows], hard_sum[kRows], hardest[kRows];
  int hard[kRows], live[kRows], slot[kRows], beats[kRows];
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
  float phi_row[kRows][kPhiRow];  // registers are scarce
  Sums sums;
  uint64_t x_full, full[kTiles][2], turns[kTiles], empty[kTiles][2], weights[2], taken[2];
};

// A warpgroup's part of loading a float8 queue that is multiplied as float16: half of a tile's columns, rows beyond
// `count` as zeros.
template <int D>
__device__ void widen(const unsigned char* from, int count, int half, Shared<__half, D>& shared, int at) {
  constexpr int kPanel = Shared<__half, D>::kPanel, kChunks = kSlots * D / 2 / 16;  // 16 numbers each
#pragma unroll 2
  for (int chunk = threadIdx.x; chunk < kChunks; chunk += kWarpgroup) {
    const int j = chunk / (D / 32), column = half * (D / 2) + chunk % (D / 32) * 16;
    uint4 bytes = {0, 0, 0, 0};
    if (j < count) bytes = __ldg(reinterpret_cast<const uint4*>(from + int64_t(j) * D + column));
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    uint32_t wide[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const auto two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16));
      const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
      wide[i] = uint32_t(halves.y) << 16 | halves.x;
    }
    auto* panel = reinterpret_cast<unsigned char*>(shared.w[at][column / kPanel]);
    const int to = column % kPanel / 8;
    *reinterpret_cast<uint4*>(panel + swizzled(j, to)) = {wide[0], wide[1], wide[2], wide[3]};
    *reinterpret_cast<uint4*>(panel + swizzled(j, to + 1)) = {wide[4], wide[5], wide[6], wide[7]};
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

template <typename Queue, int D, typename Phi, bool kMoment>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
    const __grid_constant__ CUtensorMap window_map, const Arguments a, const uint32_t cluster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace sm90;
  using T = Element<Queue>;
  constexpr bool kPlain = std::is_same_v<Phi, PlainPhi>;
  constexpr bool kConvert = kConverts<Queue>, kTurns = Shared<T, D>::kTurns && kMoment;
  constexpr int kTiles = Shared<T, D>::kTiles, kPanel = Shared<T, D>::kPanel, kHalf = D / kPanel / 2;
  unsigned char* const raw = shared_memory();
  auto& shared = *reinterpret_cast<Shared<T, D>*>(raw + (-shared_address(raw) & 1023));

  const int group = blockIdx.x / a.blocks_in_group;
  const int first_row = blockIdx.x % a.blocks_in_group * kRows;  // in its group
  const int row0 = group * a.rows_in_group + first_row;
  const int first_tile = blockIdx.y * a.tiles_in_split;
  const int last_tile = min(first_tile + a.tiles_in_split, a.tiles);
  const int pairs = (last_tile - first_tile + 1) / 2;
  const uint32_t rank = block_in_cluster();
  const int window_start = a.B ? static_cast<int>(*a.window_start) : 0;

  if (threadIdx.x == 0) {
    barrier_init(&shared.x_full, 1);
    for (int tile = 0; tile < kTiles; tile++) {
      for (int half = 0; half < 2; half++) {
        barrier_init(&shared.full[tile][half], kConvert ? kWarpgroup : 1);
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
  if (cluster > 1)
    sync_cluster();
  else
    __syncthreads();

  if (threadIdx.x < kWarpgroup) {  // ---- loads
    fewer_registers<kConvert || kTurns ? 56 : 24>();
    if (threadIdx.x == 0) {
      arrive_and_expect(&shared.x_full, sizeof(shared.x));
      load_tile(shared.x, x_map, &shared.x_full, 0, row0, 0);
    }
    const auto load = [&](int t) {
      const int at = t % kTiles, round = t / kTiles;
      const Tile tile(first_tile + t, a.tiles, window_start, a.K, a.B);
      const int64_t first = tile.first + (tile.of_window ? int64_t(group) * a.B : 0);
      for (int half = 0; half < 2; half++) {
        uint64_t* const full = &shared.full[at][half];
        if constexpr (kConvert) {
          const auto* from = static_cast<const unsigned char*>(tile.of_window ? a.window : a.prototypes);
          if (round > 0) wait(&shared.empty[at][half], (round - 1) & 1);
          widen<D>(from + first * D, tile.end - tile.first, half, shared, at);
          publish();
          arrive(full);
        } else {
          const bool mine = cluster == 1 || rank == uint32_t(half);
          if (round > 0) wait(mine ? &shared.empty[at][half] : full, (round - 1) & 1);
          arrive_and_expect(full, sizeof(T) * kSlots * D / 2);
          const CUtensorMap& map = tile.of_window ? window_map : w_map;
          void* to = shared.w[at][half * kHalf];
          if (cluster == 1)
            load_tile(to, map, full, 0, first, half * kHalf);
          else if (mine)
            load_tile(to, map, full, 0, first, half * kHalf, 3);
        }
      }
    };
    if constexpr (kTurns) {  // the next tile is on its way while this one is turned
      if (threadIdx.x == 0) load(0);
      for (int t = 0; t < 2 * pairs; t++) {
        if (threadIdx.x == 0 && t + 1 < 2 * pairs) load(t + 1);
        for (int half = 0; half < 2; half++) wait(&shared.full[t % kTiles][half], t / kTiles & 1);
        turn<D>(shared, t % kTiles);
        publish();
        arrive(&shared.turns[t % kTiles]);
      }
    } else if (kConvert || threadIdx.x == 0) {
      for (int t = 0; t < 2 * pairs; t++) load(t);
    }
  } else {  // ---- cosines, weights, moments
    more_registers<kConvert || kTurns ? 224 : 240>();
    const int half = threadIdx.x / kWarpgroup - 1;
    const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
    const int row[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    const int pair = lane % 4;
    const int64_t N = a.N;

    bool real[2];
    float target_cosine[2], scale[2], shift[2];
    int target[2];
    int64_t identity[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      real[r] = first_row + row[r] < a.rows_in_group;
      const int64_t i = real[r] ? row0 + row[r] : row0;  // an unreal row does as the first, and is not stored
      target_cosine[r] = a.cosine[i];
      scale[r] = a.scales[i];
      target[r] = static_cast<int>(a.target[i]);
      identity[r] = a.identity ? a.identity[i] : 0;
      if (half == 0 && pair < Phi::kRow) shared.phi_row[row[r]][pair] = a.phi_rows[pair * N + i];
      // Weights of bfloat16 reach down to exp(-80): where no logit is above `scale`, and none below -scale, none is
      // lost.
      const bool steady = std::is_same_v<T, __nv_bfloat16> && kPlain && scale[r] <= 40.0f;
      shift[r] = steady ? scale[r] : kNever;
    }

    float o[kMoment ? D / 4 : 1] = {};
    float total[2] = {}, hard_sum[2] = {}, hardest[2] = {kNever, kNever};
    int hard[2] = {}, live[2] = {}, beats[2] = {}, hardest_slot[2] = {-1, -1};

    if constexpr (Phi::kRow > 0) sync_threads<2 * kWarpgroup>();

    const auto phi_of = [&](float c, int r, bool want_slope) {
      const float* of_row = shared.phi_row[row[r]];
      float e = 0.0f;
      if constexpr (Phi::kExp) e = power_of_two(Phi::exponent(c, of_row) * kLog2e);
      return want_slope ? Phi::slope(c, of_row, e) : Phi::value(c, of_row, e);
    };

    wait(&shared.x_full, 0);
    for (int step = 0; step < pairs; step++) {
      const int t = 2 * step + half, at = t % kTiles, phase = t / kTiles & 1;
      float c[32];
#pragma unroll
      for (int side = 0; side < 2; side++) {
        wait(&shared.full[at][side], phase);
        if (side == 0) {
          hold(c);
          begin_products();
        }
#pragma unroll
        for (int k = 0; k < 4 * kHalf; k++) {  // 32 bytes of each row
          const int panel = side * kHalf + k / 4, column = k % 4 * (kPanel / 4);
          product<T, false>(
              c, rows_operand(shared_address(&shared.x[panel][0][column])),
              rows_operand(shared_address(&shared.w[at][panel][0][column])), side != 0 || k != 0);
        }
      }
      end_products();

      // Meanwhile: which slots count, a bit for each of c.
      const Tile tile(first_tile + t, last_tile, window_start, a.K, a.B);
      const int64_t* identities = tile.of_window ? a.window_identity : a.slot_identity;
      const auto column = [&](int n) { return n / 4 * 8 + 2 * pair + n % 2; };  // of c[n]
      uint32_t alive = tile.whole() ? 0xffffffffu : 0;
      // n and n + 2 are the same slot, in both rows.
      if (!tile.whole())
#pragma unroll 1
        for (int n = 0; n < 32; n += n % 4 ? 3 : 1)
          if (tile.slot(column(n)) >= 0) alive |= 5u << n;
      if (identities)
#pragma unroll
        for (int n = 0; n < 32; n += n % 4 ? 3 : 1) {
          const int at = tile.first + column(n);
          const int64_t theirs = at < tile.end ? __ldg(identities + at) : -1;
          if (a.mask_empty && theirs < 0) alive &= ~(5u << n);
#pragma unroll
          for (int r = 0; r < 2; r++)
            if (a.identity && theirs == identity[r]) alive &= ~(1u << (n + 2 * r));
        }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int at = tile.column(target[r]);
        if (at >= 0 && at < kSlots && at % 8 / 2 == pair) alive &= ~(1u << (at / 8 * 4 + 2 * r + at % 2));
      }
      wait_for_products(c);
      if constexpr (kBytes<Queue>)
        for (float& cosine : c) cosine *= 1.0f / kUnitOfBytes;
      if constexpr (!kMoment) {  // nobody reads the tile again
        __syncwarp();
        if (lane == 0)
          for (int side = 0; side < 2; side++) arrive_at(&shared.empty[at][side], cluster > 1 ? side : 0);
      }

      // Statistics, and the largest logit of each row.
      float best[2] = {kNever, kNever}, top[2] = {kNever, kNever};
#pragma unroll
      for (int n = 0; n < 32; n++) {
        const int r = n / 2 % 2;
        if (!(alive >> n & 1)) c[n] = kNever;
        beats[r] += c[n] > target_cosine[r];
        best[r] = fmaxf(best[r], c[n]);
        if constexpr (std::is_same_v<Phi, HardPhi>)
          if (a.npc && c[n] > shared.phi_row[row[r]][0]) hard[r]++, hard_sum[r] += c[n];
        if constexpr (!kPlain)
          if (alive >> n & 1) top[r] = fmaxf(top[r], scale[r] * phi_of(c[n], r, false));
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        live[r] += __popc(alive & (r ? 0xccccccccu : 0x33333333u));
        if (kPlain && best[r] > kNever) top[r] = scale[r] * best[r];
        if (best[r] > hardest[r]) {  // seldom, after the first tiles
          hardest[r] = best[r];
          int at = 0;
#pragma unroll
          for (int n = 2 * r; n < 32; n += n % 2 ? 3 : 1)
            if (c[n] == best[r]) at = column(n);
          hardest_slot[r] = tile.slot(at);
        }
      }
      if constexpr (kMoment)
        if (half == 1) wait(&shared.weights[0], step & 1);
      float now[2], by[2], from[2], sum[2] = {};
#pragma unroll
      for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
        now[r] = kMoment && half == 1 ? shared.shift[0][row[r]] : shift[r];
        if (top[r] > now[r] + kSlack<Queue>) now[r] = top[r] - kHead<Queue>;
        by[r] = scale[r] * kLog2e, from[r] = now[r] > kNever ? now[r] * kLog2e : 0.0f;
      }

      if constexpr (kMoment)
        if (step > 0) wait(&shared.taken[half], (step - 1) & 1);
#pragma unroll
      for (int n = 0; n < 32; n += 2) {
        const int r = n / 2 % 2;
        float p[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          // Where phi(kNever) is kNever the power is 0 by itself.
          p[e] = power_of_two(phi_of(c[n + e], r, false) * by[r] - from[r]);
          if (!kPlain && !std::is_same_v<Phi, HardPhi> && !(alive >> (n + e) & 1)) p[e] = 0.0f;
          sum[r] += p[e];
          if (!kPlain && !a.straight) p[e] *= phi_of(c[n + e], r, true);
        }
        if constexpr (kMoment) {
          auto* panel = reinterpret_cast<unsigned char*>(shared.p[half]);
          const int chunk = n / 4, within = 4 * pair;  // of numbers of 16 bits
          if constexpr (kBytes<Queue>)
            *reinterpret_cast<__nv_fp8x2_storage_t*>(
                panel + narrow_swizzled(row[r], chunk / 2) + chunk % 2 * 8 + within / 2) =
                __nv_cvt_float2_to_fp8x2({p[0], p[1]}, __NV_SATFINITE, __NV_E4M3);
          else if constexpr (std::is_same_v<T, __half>)
            *reinterpret_cast<__half2*>(panel + swizzled(row[r], chunk) + within) = __floats2half2_rn(p[0], p[1]);
          else
            *reinterpret_cast<__nv_bfloat162*>(panel + swizzled(row[r], chunk) + within) =
                __floats2bfloat162_rn(p[0], p[1]);
        }
      }

      if constexpr (!kMoment) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          total[r] = total[r] * power_of_two((shift[r] - now[r]) * kLog2e) + sum[r];
          shift[r] = now[r];
        }
      } else {
        if (pair == 0)
          for (int r = 0; r < 2; r++) shared.shift[half][row[r]] = now[r];
        publish();
        arrive(&shared.weights[half]);
#pragma unroll
        for (int parity = 0; parity < 2; parity++) {
          const int u = 2 * step + parity, from = u % kTiles;
          wait(&shared.weights[parity], step & 1);
          float fade[2];
          bool moved = false;
#pragma unroll
          for (int r = 0; r < 2; r++) {
            now[r] = shared.shift[parity][row[r]];
            moved |= now[r] != shift[r];
            fade[r] = power_of_two((shift[r] - now[r]) * kLog2e);
            total[r] = total[r] * fade[r] + (parity == half ? sum[r] : 0.0f);
            shift[r] = now[r];
          }
          if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
            for (int n = 0; n < D / 4; n++) o[n] *= fade[n / 2 % 2];
          }
          if constexpr (kTurns)
            wait(&shared.turns[from], u / kTiles & 1);
          else
            wait(&shared.full[from][half], u / kTiles & 1);
          hold(o);
          begin_products();
          if constexpr (kTurns) {
#pragma unroll
            for (int k = 0; k < kSlots / 32; k++)
              product<T, false>(
                  o, narrow_rows_operand(shared_address(&shared.p[parity][0][32 * k])),
                  narrow_rows_operand(shared_address(&shared.turned[from][half * (D / 2)][32 * k])), true);
          } else {
#pragma unroll
            for (int k = 0; k < kSlots / 16; k++)
              product<T, true>(
                  o, rows_operand(shared_address(&shared.p[parity][0][16 * k])),
                  columns_operand(shared_address(&shared.w[from][half * kHalf][16 * k][0]), kSlots * kPanelBytes),
                  true);
          }
          end_products();
          wait_for_products(o);
          __syncwarp();
          if (lane == 0) {
            arrive_at(&shared.empty[from][half], cluster > 1 ? half : 0);
            arrive(&shared.taken[parity]);
          }
        }
      }
    }

    // Four lanes share a row, then both warpgroups.
#pragma unroll
    for (int r = 0; r < 2; r++)
      for (int step = 1; step < 4; step *= 2) {
        constexpr unsigned all = 0xffffffffu;
        total[r] += __shfl_xor_sync(all, total[r], step);
        hard_sum[r] += __shfl_xor_sync(all, hard_sum[r], step);
        hard[r] += __shfl_xor_sync(all, hard[r], step);
        live[r] += __shfl_xor_sync(all, live[r], step);
        beats[r] += __shfl_xor_sync(all, beats[r], step);
        const float other = __shfl_xor_sync(all, hardest[r], step);
        const int its_slot = __shfl_xor_sync(all, hardest_slot[r], step);
        if (other > hardest[r] || (other == hardest[r] && its_slot > hardest_slot[r]))
          hardest[r] = other, hardest_slot[r] = its_slot;
      }
    Sums& sums = shared.sums;
    if (half == 1 && pair == 0)
      for (int r = 0; r < 2; r++) {
        const int at = row[r];
        sums.shift[at] = shift[r], sums.total[at] = total[r], sums.hard_sum[at] = hard_sum[r];
        sums.hardest[at] = hardest[r], sums.hard[at] = hard[r], sums.live[at] = live[r];
        sums.slot[at] = hardest_slot[r], sums.beats[at] = beats[r];
      }
    sync_threads<2 * kWarpgroup>();  // the loading warpgroup is not among them
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!real[r]) continue;
      const int at = row[r];
      const int64_t out = int64_t(blockIdx.y) * N + row0 + at;
      if (half == 0 && pair == 0) {
        const float both = fmaxf(shift[r], sums.shift[at]);
        a.shift[out] = both;
        a.total[out] = total[r] * power_of_two((shift[r] - both) * kLog2e) +
                       sums.total[at] * power_of_two((sums.shift[at] - both) * kLog2e);
        a.hard_sum[out] = hard_sum[r] + sums.hard_sum[at];
        a.hard[out] = hard[r] + sums.hard[at];
        a.live[out] = live[r] + sums.live[at];
        a.beats[out] = beats[r] + sums.beats[at];
        const bool mine = hardest[r] >= sums.hardest[at];
        a.hardest[out] = mine ? hardest[r] : sums.hardest[at];
        a.slot[out] = mine ? hardest_slot[r] : sums.slot[at];
      }
      if constexpr (kMoment) {
        float* to = a.moment + out * D + half * (D / 2) + 2 * pair;
#pragma unroll
        for (int n = 0; n < D / 16; n++)
          *reinterpret_cast<float2*>(to + 8 * n) = {o[4 * n + 2 * r], o[4 * n + 2 * r + 1]};
      }
    }
  }
  // Nobody leaves while another block may still write here.
  if (cluster > 1) {
    __syncwarp();
    sm90::sync_cluster();
  }
#else
  __trap();  // never launched: sst_fast/dispatch.py asks what was built
#endif
}

}  // namespace sst_fast::cuda
