// Counting the scores of pairs of images, for sst_fast/evaluation/blocked.py, which says what bins and slots are.
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "parallel.h"

namespace sst_fast::cpu {

namespace {

constexpr int64_t kHalf = 1 << 16;           // values of half of a score's bits
constexpr uint32_t kSign = 0x8000;           // of the upper half; bins are numbered with it turned over
constexpr int64_t kPart = 2048;              // scores that are looked at together: they stay in the first-level cache
constexpr int64_t kForAThread = 16 * kHalf;  // scores that are worth a histogram

// Several threads count into one tensor, here and in the caller.
void add(int64_t& count, int64_t more) { std::atomic_ref<int64_t>(count).fetch_add(more, std::memory_order_relaxed); }

}  // namespace

void count_scores(const at::Tensor& scores, const at::Tensor& slots, at::Tensor& by_bin, at::Tensor& by_value) {
  const auto fits = [](const at::Tensor& t, at::ScalarType type) {
    return t.is_cpu() && t.is_contiguous() && t.scalar_type() == type;
  };
  TORCH_CHECK(
      fits(scores, at::kFloat) && fits(slots, at::kShort) && fits(by_bin, at::kLong) && fits(by_value, at::kLong) &&
          slots.numel() == kHalf && by_bin.numel() == kHalf,
      "count_scores: dtypes, shapes or layouts do not fit");
  TORCH_CHECK(scores.numel() <= std::numeric_limits<uint32_t>::max(), "count_scores: too many scores at once");
  const float* score = scores.const_data_ptr<float>();
  const int16_t* slot = slots.const_data_ptr<int16_t>();
  int64_t *bins = by_bin.mutable_data_ptr<int64_t>(), *values = by_value.mutable_data_ptr<int64_t>();
  TORCH_CHECK(
      *std::max_element(slot, slot + kHalf) < by_value.numel() / kHalf, "count_scores: by_value has too few slots");
  std::vector<uint8_t> has_slot(kHalf);  // by the upper half of the bits as it is
  for (int64_t half = 0; half < kHalf; half++) has_slot[half] = slot[half ^ kSign] >= 0;
  parallel_for(0, scores.numel(), kForAThread, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> counts(kHalf);
    std::array<uint32_t, kPart> chosen;
    std::array<int64_t*, kPart> places;
    for (int64_t first = begin; first < end; first += kPart) {
      const int64_t last = std::min(end, first + kPart);
      int64_t count = 0;
      for (int64_t i = first; i < last; i++) {
        uint32_t bits;
        std::memcpy(&bits, score + i, sizeof bits);
        counts[bits >> 16]++;
        chosen[count] = bits;  // the next one takes its place where the bin has no slot: nothing here branches
        count += has_slot[bits >> 16];
      }
      // All of these counts are far from each other, and are fetched together.
      for (int64_t i = 0; i < count; i++) {
        const uint32_t half = chosen[i] >> 16, low = half == kSign ? 0 : chosen[i] & (kHalf - 1);  // minus zero is zero
        places[i] = values + slot[half ^ kSign] * kHalf + low;
        __builtin_prefetch(places[i], 1);
      }
      for (int64_t i = 0; i < count; i++) add(*places[i], 1);
    }
    for (int64_t half = 0; half < kHalf; half++)
      if (counts[half]) add(bins[half ^ kSign], counts[half]);
  });
}

BestTensors best_scores(const at::Tensor& scores, const at::Tensor& wanted_rows, const at::Tensor& wanted_columns) {
  for (const at::Tensor* t : {&scores, &wanted_rows, &wanted_columns})
    TORCH_CHECK(
        t->is_cpu() && t->is_contiguous() && t->scalar_type() == at::kFloat,
        "best_scores: expected contiguous float32");
  TORCH_CHECK(
      scores.dim() == 2 && wanted_rows.numel() == scores.size(0) && wanted_columns.numel() == scores.size(1),
      "best_scores: shapes disagree");
  const int64_t R = scores.size(0), C = scores.size(1);
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  constexpr int64_t kLanes = 8;
  const auto numbers = scores.options().dtype(at::kInt);
  BestTensors out{
      at::full({R}, lowest, scores.options()), at::zeros({R}, numbers), at::full({C}, lowest, scores.options()),
      at::zeros({C}, numbers)};
  auto& [of_rows, ahead_of_rows, of_columns, ahead_of_columns] = out;
  const float *row_wants = wanted_rows.const_data_ptr<float>(), *__restrict wants =
                                                                    wanted_columns.const_data_ptr<float>();
  float* __restrict top = of_columns.mutable_data_ptr<float>();
  int32_t* __restrict ahead = ahead_of_columns.mutable_data_ptr<int32_t>();
  for (int64_t r = 0; r < R; r++) {
    const float* __restrict s = scores.const_data_ptr<float>() + r * C;
    for (int64_t c = 0; c < C; c++) {
      top[c] = s[c] > top[c] ? s[c] : top[c];
      ahead[c] += s[c] >= wants[c];
    }
    const float want = row_wants[r];
    float best[kLanes];
    int32_t count[kLanes] = {};
    std::fill(best, best + kLanes, lowest);
    const auto look = [&](int64_t c, int64_t lane) {
      best[lane] = s[c] > best[lane] ? s[c] : best[lane];
      count[lane] += s[c] >= want;
    };
    int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes)
      for (int64_t lane = 0; lane < kLanes; lane++) look(c + lane, lane);
    for (; c < C; c++) look(c, 0);
    of_rows.mutable_data_ptr<float>()[r] = *std::max_element(best, best + kLanes);
    ahead_of_rows.mutable_data_ptr<int32_t>()[r] = std::accumulate(count, count + kLanes, 0);
  }
  return out;
}

}  // namespace sst_fast::cpu
