// How a sweep is cut into tasks: blocks of probes of one group x chunks of rows. Their number depends on shapes alone,
// never on the number of threads, so neither do the bits of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sweep.h"

namespace sst_fast::cpu {

struct Range {
  int64_t begin, end;
};

// Blocks of at most kBlock probes of one group.
struct Blocks {
  int64_t in_group, count;

  Blocks(int64_t N, int64_t groups)
      : in_group((N / groups + kBlock - 1) / kBlock), count(groups * in_group), group_rows(N / groups) {}

  int64_t group(int64_t block) const { return block / in_group; }
  Range rows(int64_t block) const {
    const int64_t begin = group(block) * group_rows + block % in_group * kBlock;
    return {begin, std::min(begin + kBlock, (group(block) + 1) * group_rows)};
  }
  int64_t most() const { return std::min<int64_t>(group_rows, kBlock); }

 private:
  int64_t group_rows;
};

struct Chunks {
  int64_t count, each;  // rows of a chunk

  // moment_bytes: of one task, 0 where there are none. All of them together are held to 8 MiB.
  Chunks(int64_t blocks, const Queue& slots, int64_t moment_bytes) : rows(slots.rows()) {
    constexpr int64_t tasks = 32, fewest = 256;
    count = (tasks + blocks - 1) / blocks;
    if (moment_bytes) count = std::min(count, (8 << 20) / (blocks * moment_bytes));
    count = std::max<int64_t>(1, std::min(count, rows / fewest));
    const int64_t unit = row_unit(slots.sub_centers, fewest);
    each = ((rows + count - 1) / count + unit - 1) / unit * unit;
    count = (rows + each - 1) / each;
  }

  Range range(int64_t chunk) const { return {chunk * each, std::min(rows, (chunk + 1) * each)}; }

 private:
  int64_t rows;
};

}  // namespace sst_fast::cpu
