// A tile of slots: loading it, and its sides in the products.
#pragma once

#include "products.h"

namespace sst_fast::cpu::SST_NAMESPACE {

// A tile of rows of slots.
template <typename E>
struct SlotTile {
  const E* w;  // [count, D]
  Prefetch next;
  int64_t first, count;       // rows
  int32_t slot[kMaxTile];     // whose row it is
  SumOf<E> factor[kMaxTile];  // 1 / norm where rows are to be normalised: cosines are scaled, not rows
  int32_t id_low[kMaxTile], id_high[kMaxTile];  // halves of the identity
  bool empty[kMaxTile];                         // masked for every probe
};

// `count` rows from `first` on: the queue itself, or a copy where the batch window or another format is in the way.
// `last`: where the chunk ends that is being swept. An empty slot may hold anything, and a weight of 0 does not make a
// NaN harmless: such rows are loaded as zeros, unless `keep_empty`, where they get a gradient of their own (a target's
// slot may be empty).
template <typename E>
static void load_tile(
    const Slots<SumOf<E>>& slots, int64_t first, int64_t count, int64_t last, bool keep_empty, E* copy,
    SlotTile<E>& tile) {
  const int64_t D = slots.D, K = slots.K, row = D / Element<E>::kEach;
  tile.first = first;
  tile.count = count;
  // Where a slot lies in the window: its distance from the window's start, modulo K.
  const int64_t offset = first - slots.window_start < 0 ? first - slots.window_start + K : first - slots.window_start;
  const bool windowed = slots.window && !slots.window_is_masked && (offset < slots.window_size || offset + count > K);
  const char* base = static_cast<const char*>(slots.features);
  const int64_t bytes = D * bytes_of(slots.format), then = first + count;
  tile.next = {base + then * bytes, base + (last - then < count ? last : then + count) * bytes};
  const auto inside = [&](int64_t j) { return offset + j < K ? offset + j : offset + j - K; };
  const auto replaced = [&](int64_t j) { return slots.window && inside(j) < slots.window_size; };
  const auto own = [&](int64_t j) { return replaced(j) && !slots.window_is_masked; };
  bool any_blank = false;
  const auto blank = [&](int64_t j) { return tile.empty[j] && (own(j) || !keep_empty); };
  for (int64_t j = 0; j < count; j++) {
    const int64_t slot = (first + j) / slots.sub_centers;
    const int64_t id = !slots.identity ? 0 : own(j) ? slots.window_identity[inside(j)] : slots.identity[slot];
    tile.slot[j] = int32_t(slot);
    tile.empty[j] = (id < 0 && slots.mask_empty) || (replaced(j) && slots.window_is_masked);
    any_blank |= blank(j);
    tile.id_low[j] = int32_t(id & 0xffffffff);
    tile.id_high[j] = int32_t(id >> 32);
    if (slots.inverse_norm)
      tile.factor[j] = blank(j) ? 0 : own(j) ? slots.window_inverse_norm[inside(j)] : slots.inverse_norm[first + j];
  }
  const bool native = !windowed && !any_blank && slots.format == Element<E>::kFormat;
  tile.w = native ? static_cast<const E*>(slots.features) + first * row : copy;
  for (int64_t j = 0; j < count && !native; j++) {
    E* to = copy + j * row;
    if (blank(j))
      for (int64_t k = 0; k < row; k++) to[k] = E{};
    else
      read_elements(own(j) ? slots.window : slots.features, slots.format, (own(j) ? inside(j) : first + j) * D, D, to);
  }
}

// The tile as the left side of product 2: itself, or neighbouring slots in pairs [pair][d].
template <typename E>
static const E* along_slots(const SlotTile<E>& tile, int64_t D, E* pairs) {
  if constexpr (Element<E>::kEach == 1) {
    return tile.w;
  } else {
    const uint16_t* w = reinterpret_cast<const uint16_t*>(tile.w);
    for (int64_t j = 0; j < tile.count; j += 2) {
      const bool single = j + 1 == tile.count;
      const uint16_t *even = w + j * D, *odd = single ? even : even + D;
      const uint32_t keep = single ? 0 : 0xffff0000;
      for (int64_t d = 0; d < D; d++) pairs[j / 2 * D + d].bits = even[d] | ((uint32_t(odd[d]) << 16) & keep);
    }
    return pairs;
  }
}

}  // namespace sst_fast::cpu::SST_NAMESPACE
