// The index arithmetic of the Hopper sweep (cuda/sweep_sm90.h): how the work is cut, which slots a tile holds, and
// where its numbers lie in shared memory. Shared with the CPU, where tests/test_sweep_sm90.py checks it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "margin.h"  // SST_HD

namespace sst_fast {

constexpr int kRows = 64, kSlots = 64;  // probes of a block, slots of a tile

// Blocks [blocks of rows] x [splits of the tiles]. `cluster` blocks of neighbouring rows share what they load.
struct SweepPlan {
  int splits, tiles_in_split, cluster, blocks_in_group;
};
constexpr int kMaxSplits = 256;

// The cut whose blocks, so many at a time as there are processors, are predicted to end first; not measured on a GPU.
// Time is in tiles of a block that shares its loads. kEnds: a block's beginning and end, its moments written and read
// again above all. kAlone: the second-level cache feeds 64-row blocks that share nothing at 5.5 of the 7.4 TB/s that
// the tensor cores can take.
inline SweepPlan plan_sweep(int rows_in_group, int groups, int K, int B, int D, int processors, bool can_share) {
  constexpr double kEnds = 8, kAlone = 7.4 / 5.5, kWorthwhile = 0.97;
  constexpr int64_t kMoments = 64 << 20;  // bytes, where one round of blocks would need fewer splits
  const int blocks = std::max(1, (rows_in_group + kRows - 1) / kRows);
  const int tiles = (K + kSlots - 1) / kSlots + (B + kSlots - 1) / kSlots;
  SweepPlan best{};
  double least = 0;
  for (int cluster = can_share && blocks > 1 ? 2 : 1; cluster > 0; cluster--) {
    const int in_group = (blocks + cluster - 1) / cluster * cluster;
    const int at_once = std::max(1, processors / cluster) * cluster;
    const int most = std::min({(tiles + 1) / 2, processors, kMaxSplits});
    for (int wanted = 1; wanted <= most; wanted++) {
      const int in_split = 2 * ((tiles + 2 * wanted - 1) / (2 * wanted));  // they are taken in pairs
      const int splits = (tiles + in_split - 1) / in_split;
      if (splits != wanted) continue;  // the same as with fewer
      const int64_t all = int64_t(groups) * in_group * splits, rounds = (all + at_once - 1) / at_once;
      if (rounds > 1 && splits > 1 && int64_t(splits) * groups * rows_in_group * D * 4 > kMoments) break;
      const double time = double(rounds) * (in_split * (can_share && cluster == 1 ? kAlone : 1.0) + kEnds);
      if (best.splits == 0 || time < kWorthwhile * least) best = {splits, in_split, cluster, in_group}, least = time;
    }
  }
  return best;
}

// A tile of slots: of the queue, or, after the queue's last one, of the batch window.
struct SlotTile {
  int first, end, start, K, B;
  bool of_window;

  // number: among the queue's tiles and then the window's; last: where the range of tiles ends that is being swept;
  // start: the window's first slot. B is 0 where there is no window.
  SST_HD SlotTile(int number, int last, int start, int K, int B) : start(start), K(K), B(B) {
    const int of_queue = (K + kSlots - 1) / kSlots;
    of_window = number >= of_queue;
    first = (of_window ? number - of_queue : number) * kSlots;
    end = number >= last ? 0 : of_window ? B : K;
  }
  // Whether slot() is a slot in every column.
  SST_HD bool whole() const {
    const int after = first < start ? first - start + K : first - start;
    return first + kSlots <= end && (of_window || B == 0 || (after >= B && after + kSlots <= K));
  }
  // The column of a slot, if it is from 0 to kSlots - 1.
  SST_HD int column(int slot) const {
    return (of_window ? slot < start ? slot - start + K : slot - start : slot) - first;
  }
  // The slot in column j; -1 where there is none or the window has it.
  SST_HD int slot(int j) const {
    const int at = first + j;
    if (at >= end) return -1;
    if (of_window) return at + start < K ? at + start : at + start - K;
    const int after = at - start;
    return B == 0 || (after < 0 ? after + K : after) >= B ? at : -1;
  }
};

// Tiles lie in panels: rows of 128 bytes (64 numbers of 16 bits, 128 of 8) one after the other, the eight 16-byte
// chunks of row r permuted by chunk ^ (r % 8), which keeps rows and columns free of bank conflicts. A panel begins at a
// multiple of 1,024 bytes. Panels of 64 bytes permute four chunks by chunk ^ (r / 2 % 4).
constexpr int kPanelBytes = 128;

SST_HD int swizzled(int row, int chunk) {  // in bytes, within a panel
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

SST_HD int narrow_swizzled(int row, int chunk) { return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4); }

// The descriptor (PTX ISA, wgmma, matrix descriptor) of an operand in this layout whose sum runs along its columns:
// `at` is the address in shared memory; eight rows on are 1,024 bytes on, in a narrow panel 512.
SST_HD uint64_t rows_operand(uint32_t at) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | (at & 0x3ffff) >> 4;
}

SST_HD uint64_t narrow_rows_operand(uint32_t at) {
  return uint64_t(2) << 62 | uint64_t(512 >> 4) << 32 | uint64_t(1) << 16 | (at & 0x3ffff) >> 4;
}

// The same memory read the other way: the sum runs over rows, eight of them 1,024 bytes on, and the next 64 columns are
// `panel` bytes on. For numbers of 16 bits alone.
SST_HD uint64_t columns_operand(uint32_t at, uint32_t panel) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(panel >> 4) << 16 | (at & 0x3ffff) >> 4;
}

// The operand so many bytes further on, a multiple of 16.
SST_HD uint64_t operand_at(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

}  // namespace sst_fast
