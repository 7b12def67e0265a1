// The fused loss on the CPU: prepares rows, hands (block, chunk) tasks to the sweep, combines their sums.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../margin.h"
#include "../ops.h"
#include "../ring.h"
#include "storage.h"
#include "sweep.h"

namespace sst_fast::cpu {

// SST_FAST_CPU=generic|avx2|avx512|avx512bf16 narrows the choice, for tests.
const Sweeps& sweeps() {
  static const Sweeps chosen = [] {
    const char* limit = std::getenv("SST_FAST_CPU");
    Sweeps best = *sweeps_generic();
    auto allowed = [&](const char* name) { return !limit || !*limit || std::strcmp(limit, name) == 0; };
#if defined(__x86_64__) || defined(_M_X64)
    if (sweeps_avx2() && allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      best = *sweeps_avx2();
    if (sweeps_avx512() && (allowed("avx512") || allowed("avx512bf16")) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = *sweeps_avx512();
      if (pairs_avx512() && allowed("avx512bf16") && __builtin_cpu_supports("avx512bf16"))
        best.name = "avx512bf16", best.pairs = pairs_avx512();
    }
#endif
    return best;
  }();
  return chosen;
}

namespace {

// A row of any storage as doubles.
void read_row(const void* data, Storage storage, int64_t row, int64_t D, double* to) {
  auto copy = [&](auto* typed) {
    for (int64_t d = 0; d < D; d++) to[d] = double(static_cast<float>(typed[row * D + d]));
  };
  switch (storage) {
    case Storage::f64:
      std::copy_n(static_cast<const double*>(data) + row * D, D, to);
      return;
    case Storage::f32:
      return copy(static_cast<const float*>(data));
    case Storage::bf16:
      return copy(static_cast<const at::BFloat16*>(data));
    case Storage::f16:
      return copy(static_cast<const at::Half*>(data));
    case Storage::f8:
      return copy(static_cast<const at::Float8_e4m3fn*>(data));
  }
}

const int64_t* identities(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

// The arguments, made contiguous and checked as far as memory safety needs.
struct Problem : Arguments {
  Queue slots{};
  std::vector<char> ignored;  // [N]

  explicit Problem(const Arguments& arguments) : Arguments(arguments) {
    const auto make = [](OptionalTensor& t) {
      if (t) t = t->contiguous();
    };
    embedding = embedding.contiguous(), prototypes = prototypes.contiguous();
    make(positive);
#define SST_FIELD(name) make(name);
    SST_TENSORS(SST_FIELD)
#undef SST_FIELD
    check();
    slots.features = prototypes.const_data_ptr();
    slots.storage = storage_of(prototypes);
    slots.identity = identities(slot_identity);
    slots.K = prototypes.size(0);
    slots.D = prototypes.size(1);
    slots.mask_empty = mask_empty;
    slots.straight_through = straight_through;
    if (window) {
      slots.window = window->const_data_ptr();
      slots.window_size = window->size(1);
      slots.window_identity = identities(window_identity);
      slots.window_start = *window_start->const_data_ptr<int64_t>();
    }
    check_targets();
  }

  int64_t slot_of(int64_t row) const { return target ? target->const_data_ptr<int64_t>()[row] : -1; }

 private:
  void check() const {
    const int64_t N = embedding.size(0), K = prototypes.size(0), D = prototypes.size(1);
    TORCH_CHECK(embedding.size(1) == D && (target || positive), "margin_softmax: shapes disagree");
    TORCH_CHECK(K > 0 && K < (int64_t(1) << 31), "margin_softmax: K must be in [1, 2^31)");
    const auto expect = [&](const OptionalTensor& t, const char* name, at::ScalarType dtype, int64_t count) {
      TORCH_CHECK(
          !t || (t->scalar_type() == dtype && t->numel() == count && t->device().is_cpu()), "margin_softmax: ", name,
          " does not fit");
    };
    expect(target, "target", at::kLong, N);
    expect(identity, "identity", at::kLong, N);
    expect(slot_identity, "slot_identity", at::kLong, K);
    expect(window_start, "window.start", at::kLong, 1);
    expect(scale_rows, "scale", at::kDouble, N);
    TORCH_CHECK(!weight || weight->numel() == N, "margin_softmax: weight does not fit");
    TORCH_CHECK(
        !positive || (positive->dim() == 2 && positive->size(0) == N && positive->size(1) == D),
        "margin_softmax: positive does not fit");
    TORCH_CHECK(
        !margin_rows || (margin_rows->scalar_type() == at::kDouble && margin_rows->size(0) <= kParameters &&
                         margin_rows->size(1) == N),
        "margin_softmax: the margin's parameters do not fit");
    if (!window) return;
    TORCH_CHECK(
        window_start && window->dim() == 3 && window->size(2) == D && window->size(1) <= K && window->size(0) > 0 &&
            N % window->size(0) == 0 && window->scalar_type() == prototypes.scalar_type() &&
            (!slot_identity || window_identity),
        "margin_softmax: the window does not fit");
    expect(window_identity, "window.identities", at::kLong, window->size(1));
    const int64_t start = *window_start->const_data_ptr<int64_t>();
    TORCH_CHECK_INDEX(start >= 0 && start < K, "window.start is ", start, ", expected a slot in [0, ", K, ")");
  }

  void check_targets() {
    const int64_t N = embedding.size(0), K = slots.K;
    ignored.assign(N, 0);
    for (int64_t i = 0; i < N && target; i++) {
      const int64_t y = slot_of(i);
      ignored[i] = y == ignore_index;
      TORCH_CHECK_INDEX(
          ignored[i] || (y >= (positive ? -1 : 0) && y < K), "target[", i, "] is ", y,
          ", expected a row number of prototypes in [0, ", K, ")");
    }
  }
};

template <typename T>
const Sweep<T>& sweep_for(const Problem& p) {
  if constexpr (std::is_same_v<T, double>) {
    return sweeps().f64;
  } else {
    const bool pairs = storage_of(p.embedding) == Storage::bf16 && p.slots.D % 2 == 0 &&
                       (p.slots.storage == Storage::bf16 || p.slots.storage == Storage::f8);
    return pairs && sweeps().pairs ? *sweeps().pairs : sweeps().f32;
  }
}

template <typename T>
double inverse_norm(const Sweep<T>& sweep, const void* features, Storage storage, int64_t D, int64_t row) {
  double norm;
  sweep.norms(features, storage, D, row, row + 1, &norm);
  return normaliser(norm);
}

// Sum of value(d), eight sums side by side for the processor's sake.
template <typename F>
double sum_over(int64_t D, F value) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8)
    for (int i = 0; i < 8; i++) sums[i] += value(d + i);
  for (; d < D; d++) sums[0] += value(d);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The power of two at or below the largest feature of a row.
double unit_of(const double* x, int64_t D) {
  double largest = 0;
  for (int64_t d = 0; d < D; d++) largest = std::max(largest, std::abs(x[d]));
  return largest > 0 && std::isfinite(largest) ? std::ldexp(1.0, std::ilogb(largest)) : 1.0;
}

// Everything about rows that does not need the sweep, in double: N * D operations beside 4 * N * K * D.
template <typename T>
struct Rows {
  std::vector<double> inverse_norm, unit, cosine, sine;
  std::vector<T> scale, cosine_t, phi;
  std::vector<int64_t> target;  // slot; -1 where there is none

  explicit Rows(int64_t N)
      : inverse_norm(N), unit(N), cosine(N), sine(N), scale(N), cosine_t(N), phi(N * kPhiRow), target(N, -1) {}

  Probes<T> block(const Problem& p, int64_t begin, int64_t end) const {
    Probes<T> probes{};
    probes.features =
        static_cast<const char*>(p.embedding.const_data_ptr()) + begin * p.slots.D * p.embedding.element_size();
    probes.storage = storage_of(p.embedding);
    probes.inverse_norm = &inverse_norm[begin];
    probes.unit = &unit[begin];
    probes.scale = &scale[begin];
    probes.target_cosine = &cosine_t[begin];
    probes.phi = &phi[begin * kPhiRow];
    probes.target = target.data() + begin;
    probes.identity = p.identity ? identities(p.identity) + begin : nullptr;
    probes.rows = end - begin;
    return probes;
  }
};

struct Groups {  // of probes that see different windows
  int64_t count, rows, bytes;

  explicit Groups(const Problem& p)
      : count(p.window ? p.window->size(0) : 1),
        rows(p.embedding.size(0) / count),
        bytes(p.window ? p.slots.window_size * p.slots.D * p.prototypes.element_size() : 0) {}

  bool in_window(const Problem& p, int64_t slot) const {
    return p.window && (slot - p.slots.window_start + p.slots.K) % p.slots.K < p.slots.window_size;
  }

  // What the probe's target cosine is taken with, normalised if asked for.
  void target_row(const Problem& p, int64_t i, double* to) const {
    const int64_t y = p.slot_of(i), D = p.slots.D;
    if (p.positive)
      read_row(p.positive->const_data_ptr(), storage_of(*p.positive), i, D, to);
    else if (in_window(p, y))
      read_row(
          static_cast<const char*>(p.slots.window) + i / rows * bytes, p.slots.storage,
          (y - p.slots.window_start + p.slots.K) % p.slots.K, D, to);
    else
      read_row(p.slots.features, p.slots.storage, y, D, to);
    if (!p.normalize) return;
    const double inverse = inverse_norm(sweeps().f64, to, Storage::f64, D, 0);
    for (int64_t d = 0; d < D; d++) to[d] *= inverse;
  }
};

template <typename T>
Rows<T> prepare(const Problem& p, const Groups& groups) {
  const int64_t N = p.embedding.size(0), D = p.slots.D;
  const Storage storage = storage_of(p.embedding);
  const auto& sweep = sweep_for<T>(p);
  Rows<T> rows(N);
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> x(D), w(D);
    for (int64_t i = begin; i < end; i++) {
      rows.scale[i] = T(p.scale_of(i));
      rows.unit[i] = 1;
      if (p.ignored[i]) continue;  // as a row of zeros, whatever it holds
      rows.target[i] = p.slot_of(i);
      read_row(p.embedding.const_data_ptr(), storage, i, D, x.data());
      groups.target_row(p, i, w.data());
      rows.unit[i] = unit_of(x.data(), D);
      const double inverse = inverse_norm(sweep, p.embedding.const_data_ptr(), storage, D, i);
      const double dot = sum_over(D, [&](int64_t d) { return x[d] * inverse * w[d]; });
      const double across = std::sqrt(sum_over(D, [&](int64_t d) {
        const double part = w[d] - dot * x[d] * inverse;
        return part * part;
      }));
      const auto row = phi_row<double>(p.margin_of(i), dot, across);
      rows.inverse_norm[i] = inverse;
      rows.cosine[i] = dot;
      rows.sine[i] = across;
      rows.cosine_t[i] = T(dot);
      for (int q = 0; q < kPhiRow; q++) rows.phi[i * kPhiRow + q] = T(row.at[q]);
    }
  });
  return rows;
}

// The slots as the sweep takes them, and what the inverse norms are kept in.
template <typename T>
struct Prepared {
  std::vector<T> norms, window_norms;  // inverse
  Slots<T> slots;

  explicit Prepared(const Problem& p) {
    slots = {p.slots, nullptr, nullptr};
    if (!p.normalize) return;
    norms = inverse_norms(p.slots.features, p.slots.K, p);
    slots.inverse_norm = norms.data();
    if (!p.window) return;
    window_norms = inverse_norms(p.slots.window, p.window->size(0) * p.slots.window_size, p);
    slots.window_inverse_norm = window_norms.data();
  }

  static std::vector<T> inverse_norms(const void* features, int64_t count, const Problem& p) {
    std::vector<T> norms(count);
    const auto& sweep = sweep_for<T>(p);
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++) norms[j] = T(inverse_norm(sweep, features, p.slots.storage, p.slots.D, j));
    });
    return norms;
  }
};

auto allocate(int64_t bytes) {
  std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)), &std::free);
  TORCH_CHECK(memory, "margin_softmax: out of memory for ", bytes, " bytes");
  return memory;
}

// What each row's loss is multiplied by before the rows are summed, and the reduced loss.
template <typename T>
void reduce(const Problem& p, const T* each, Results& out) {
  const int64_t N = p.embedding.size(0);
  T* weights = out.row_weight.mutable_data_ptr<T>();
  const at::Tensor given = p.weight ? p.weight->to(at::kDouble) : at::Tensor();
  double total = 0;
  for (int64_t i = 0; i < N; i++) {
    const double weight = p.ignored[i] ? 0.0 : p.weight ? given.const_data_ptr<double>()[i] : 1.0;
    weights[i] = T(weight);
    total += weight;
  }
  const bool mean = p.reduce() == Reduction::mean;
  double sum = 0;
  for (int64_t i = 0; i < N; i++) {
    if (mean && total != 0) weights[i] = T(double(weights[i]) / total);
    const double product = weights[i] == 0 ? 0.0 : double(weights[i]) * double(each[i]);
    if (p.reduce() == Reduction::none) out.loss.mutable_data_ptr<T>()[i] = T(product);
    sum += product;
  }
  if (p.reduce() != Reduction::none) *out.loss.mutable_data_ptr<T>() = T(sum);
}

template <typename T>
Results run(const Problem& p) {
  const bool need_gradient = p.need_gradient;
  const int64_t N = p.embedding.size(0), D = p.slots.D, K = p.slots.K;
  const auto wide = p.embedding.options().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat);
  const auto value = [&] { return at::empty({N}, wide); };
  const auto number = [&] { return at::empty({N}, p.embedding.options().dtype(at::kLong)); };
  Results out{
      p.reduce() == Reduction::none ? value() : at::zeros({}, wide),
      value(),
      value(),
      value(),
      number(),
      number(),
      value(),
      value(),
      at::empty({need_gradient ? N : 0, D}, wide),
      number(),
      value()};
  if (N == 0) return out;
  std::vector<T> each(N);  // losses of the rows
  const Groups groups(p);
  const Rows<T> rows = prepare<T>(p, groups);
  const Prepared<T> prepared(p);

  // Tasks: blocks of probes of one group x chunks of slots. Their number depends on shapes alone, never on the number
  // of threads, so neither do the bits of the result. Partial moments are held to 8 MiB.
  const int64_t blocks_in_group = (groups.rows + kBlock - 1) / kBlock, blocks = groups.count * blocks_in_group;
  const int64_t block_bytes = kBlock * D * int64_t(sizeof(T));
  int64_t chunks = std::max<int64_t>(1, (32 + blocks - 1) / blocks);
  if (need_gradient) chunks = std::min(chunks, std::max<int64_t>(1, (8 << 20) / (blocks * block_bytes)));
  chunks = std::max<int64_t>(1, std::min(chunks, K / 192));
  const int64_t chunk_slots = (K + chunks - 1) / chunks;
  // Label smoothing needs the whole sum before it can weigh a slot: one more sweep. Otherwise moments come with the
  // sum.
  const bool second = need_gradient && p.label_smoothing > 0;

  std::vector<Partial<T>> partials(blocks * chunks);
  // With one chunk a block is finished by the task that swept it and needs no shared memory.
  auto shared_moments = allocate(need_gradient && chunks > 1 ? blocks * chunks * block_bytes : 0);
  std::vector<double> shifts(N), sums(N), wrong(N);
  std::vector<T> uniform(N);

  auto block_rows = [&](int64_t block) {
    const int64_t group = block / blocks_in_group;
    const int64_t begin = group * groups.rows + block % blocks_in_group * kBlock;
    return std::pair(begin, std::min(kBlock + begin, (group + 1) * groups.rows));
  };

  auto finish_loss = [&](int64_t block) {
    const auto [begin, end] = block_rows(block);
    const Partial<T>* parts = &partials[block * chunks];
    for (int64_t i = begin; i < end; i++) {
      const int64_t r = i - begin;
      double shift = -std::numeric_limits<double>::infinity(), l = 0, logits = 0, hard_sum = 0;
      bool poisoned = std::isnan(rows.cosine[i]);
      T top = parts[0].hardest[r];
      int64_t slot = parts[0].hardest_slot[r], above = 0, hard = 0, live = 0;
      for (int64_t c = 0; c < chunks; c++) {
        poisoned |= std::isnan(parts[c].sum[r]);
        if (parts[c].sum[r] > 0) shift = std::max(shift, parts[c].shift[r]);
        if (parts[c].hardest[r] > top) top = parts[c].hardest[r], slot = parts[c].hardest_slot[r];
        above += parts[c].beats[r];
        live += parts[c].live[r];
        hard += parts[c].hard[r];
        hard_sum += parts[c].hard_sum[r];
        logits += parts[c].logits[r];
      }
      for (int64_t c = 0; c < chunks; c++)
        if (parts[c].sum[r] > 0) l += std::exp(parts[c].shift[r] - shift) * parts[c].sum[r];
      // others = log sum exp of the other slots; excess = others - t. Never sums the target with them, so nothing
      // cancels as its probability nears 1: loss = log(1 + e^excess), 1 - p = e^excess / (1 + e^excess).
      auto psi =
          target_margin<double>(p.margin_of(i), rows.cosine[i], rows.sine[i], hard ? hard_sum / double(hard) : 0.0);
      if (p.slots.straight_through) psi.slope = 1;
      const double scale = p.scale_of(i), t = scale * psi.value;
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const double others = poisoned ? nan : l > 0 ? shift + std::log(l) : -std::numeric_limits<double>::infinity();
      const double excess = others - t;
      const double small = std::exp(-std::abs(excess));
      const double plain = std::isnan(excess) ? nan : std::max(excess, 0.0) + std::log1p(small);
      const double share = p.label_smoothing / double(1 + live);
      shifts[i] = shift;
      sums[i] = poisoned ? nan : l;
      wrong[i] = excess > 0 ? 1 / (1 + small) : small / (1 + small);
      uniform[i] = T(share);
      each[i] = T(plain - (share > 0 ? share * (logits - double(live) * t) : 0));
      out.lse.mutable_data_ptr<T>()[i] = T(plain + t);
      out.target_cosine.mutable_data_ptr<T>()[i] = T(rows.cosine[i]);
      out.hardest_cosine.mutable_data_ptr<T>()[i] = top;
      out.hardest_slot.mutable_data_ptr<int64_t>()[i] = slot;
      out.beats_target.mutable_data_ptr<int64_t>()[i] = above;
      out.negatives.mutable_data_ptr<int64_t>()[i] = live;
      const double residual = -(wrong[i] - p.label_smoothing + share);
      out.residual.mutable_data_ptr<T>()[i] = T(residual);
      out.target_slope.mutable_data_ptr<T>()[i] = T(scale * psi.slope * residual);
    }
  };

  // For the unit probe: scale * (mean of phi' w over the other slots) + target_slope * w_target, then the projection of
  // the normalisation.
  auto finish_gradient = [&](int64_t block) {
    const auto [begin, end] = block_rows(block);
    const Partial<T>* parts = &partials[block * chunks];
    std::vector<double> sum(D), w(D), x(D);
    for (int64_t i = begin; i < end; i++) {
      const int64_t r = i - begin;
      if (p.ignored[i]) {
        std::fill_n(out.gradient.mutable_data_ptr<T>() + i * D, D, T(0));
        continue;
      }
      const double nan = std::numeric_limits<double>::quiet_NaN();
      groups.target_row(p, i, w.data());
      read_row(p.embedding.const_data_ptr(), storage_of(p.embedding), i, D, x.data());
      std::fill(sum.begin(), sum.end(), std::isnan(sums[i]) ? nan : 0.0);
      for (int64_t c = 0; c < chunks && sums[i] > 0; c++) {
        const double share = second                ? 1.0
                             : parts[c].sum[r] > 0 ? std::exp(parts[c].shift[r] - shifts[i]) / sums[i] * wrong[i]
                                                   : 0.0;
        if (share == 0) continue;
        const int64_t width = parts[c].moment_width;
        const T* moment = parts[c].moment + r / width * D * width + r % width;
        for (int64_t d = 0; d < D; d++) sum[d] += share * double(moment[d * width]);
      }
      const double scale = p.scale_of(i), slope = out.target_slope.const_data_ptr<T>()[i];
      double along = 0;
      for (int64_t d = 0; d < D; d++) {
        sum[d] = scale * sum[d] + slope * w[d];
        x[d] *= rows.inverse_norm[i];
        along += sum[d] * x[d];
      }
      T* to = out.gradient.mutable_data_ptr<T>() + i * D;
      for (int64_t d = 0; d < D; d++) to[d] = T((sum[d] - along * x[d]) * rows.inverse_norm[i]);
    }
  };

  const auto& sweep = sweep_for<T>(p);
  auto sweep_all = [&](bool moments, bool again, auto finish) {
    at::parallel_for(0, blocks * chunks, 1, [&](int64_t first_task, int64_t last_task) {
      auto scratch = allocate(sweep.scratch(D));
      auto own_moment = allocate(moments && chunks == 1 ? block_bytes : 0);
      for (int64_t task = first_task; task < last_task; task++) {
        const int64_t block = task / chunks, chunk = task % chunks;
        const auto [begin, end] = block_rows(block);
        Probes<T> probes = rows.block(p, begin, end);
        if (again) probes.lse = out.lse.const_data_ptr<T>() + begin, probes.uniform = &uniform[begin];
        Slots<T> slots = prepared.slots;
        if (p.window) {
          const int64_t group = begin / groups.rows;
          slots.window = static_cast<const char*>(slots.window) + group * groups.bytes;
          if (p.normalize) slots.window_inverse_norm += group * slots.window_size;
        }
        char* moment = chunks == 1 ? own_moment.get() : shared_moments.get() + task * block_bytes;
        // The second sweep leaves the first one's sums alone.
        Partial<T> moments_only;
        Partial<T>& part = again ? moments_only : partials[task];
        part.moment = moments ? reinterpret_cast<T*>(moment) : nullptr;
        part.wants_logits = p.label_smoothing > 0;
        sweep.run(
            p.margin.kind, probes, slots, chunk * chunk_slots, std::min(K, (chunk + 1) * chunk_slots), scratch.get(),
            part);
        partials[task].moment = part.moment;
        partials[task].moment_width = part.moment_width;
        if (chunks == 1) finish(block);
      }
    });
    if (chunks > 1)
      at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++) finish(block);
      });
  };
  sweep_all(need_gradient && !second, false, [&](int64_t block) {
    finish_loss(block);
    if (need_gradient && !second) finish_gradient(block);
  });
  if (second) sweep_all(true, true, finish_gradient);
  reduce(p, each.data(), out);
  return out;
}

template <typename T>
at::Tensor run_prototypes(
    const Problem& p, const at::Tensor& grad_rows, const at::Tensor& lse, const at::Tensor& negatives,
    const at::Tensor& target_slope) {
  const int64_t N = p.embedding.size(0), D = p.slots.D, K = p.slots.K;
  at::Tensor gradient = at::empty({K, D}, p.prototypes.options());
  if (N == 0) return gradient.zero_();
  const Groups groups(p);
  const Rows<T> rows = prepare<T>(p, groups);
  Prepared<T> prepared(p);
  prepared.slots.window_is_masked = p.window.has_value();
  const at::Tensor incoming = grad_rows.to(lse.scalar_type()).contiguous();
  const T* g = incoming.const_data_ptr<T>();
  std::vector<T> uniform(N), factor(N), target_weight(N);
  // Where a probe is nearly parallel to its target an angular margin's slope is large and what the normalisation leaves
  // of it is small: it would drown in the rounding of the sweep's sums, and is added in double after them.
  std::vector<int64_t> parallel;
  for (int64_t i = 0; i < N; i++) {
    uniform[i] = T(p.label_smoothing / double(1 + negatives.const_data_ptr<int64_t>()[i]));
    factor[i] = T(p.scale_of(i)) * g[i];
    // A target outside the prototypes gives them no gradient.
    const bool elsewhere = p.ignored[i] || p.positive || groups.in_window(p, p.slot_of(i));
    const bool apart = !elsewhere && p.normalize && rows.sine[i] < 1.0 / 16;
    if (apart) parallel.push_back(i);
    target_weight[i] = elsewhere || apart ? T(0) : target_slope.const_data_ptr<T>()[i] * g[i];
  }

  // Chunks of slots own their rows of the gradient; probes are packed once for all of them.
  const auto& sweep = sweep_for<T>(p);
  const int64_t count = (N + kBlock - 1) / kBlock, bytes = sweep.pack_bytes(D);
  constexpr int64_t kChunk = 192;
  auto packed = allocate(count * bytes);
  std::vector<Probes<T>> blocks;
  for (int64_t begin = 0; begin < N; begin += kBlock) {
    Probes<T>& block = blocks.emplace_back(rows.block(p, begin, std::min(N, begin + kBlock)));
    block.lse = lse.const_data_ptr<T>() + begin;
    block.uniform = &uniform[begin];
    block.factor = &factor[begin];
    block.target_weight = &target_weight[begin];
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) sweep.pack(blocks[b], D, packed.get() + b * bytes);
  });
  const Storage storage = storage_of(gradient);
  void* out = gradient.mutable_data_ptr();
  at::parallel_for(0, (K + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    auto scratch = allocate(sweep.scratch(D));
    for (int64_t c = begin; c < end; c++)
      sweep.run_prototypes(
          p.margin.kind, blocks.data(), count, packed.get(), prepared.slots, c * kChunk, std::min(K, (c + 1) * kChunk),
          scratch.get(), storage, out);
  });
  if (parallel.empty()) return gradient;
  std::vector<double> x(D), w(D);
  const at::Tensor part = at::empty({D}, p.prototypes.options().dtype(at::kDouble));
  for (const int64_t i : parallel) {
    const int64_t y = p.slot_of(i);
    read_row(p.embedding.const_data_ptr(), storage_of(p.embedding), i, D, x.data());
    groups.target_row(p, i, w.data());
    const double weight = double(target_slope.const_data_ptr<T>()[i]) * double(g[i]) *
                          inverse_norm(sweep, p.slots.features, p.slots.storage, D, y);
    for (int64_t d = 0; d < D; d++)
      part.mutable_data_ptr<double>()[d] = weight * (x[d] * rows.inverse_norm[i] - rows.cosine[i] * w[d]);
    gradient.select(0, y).add_(part);
  }
  return gradient;
}

}  // namespace

const char* instruction_set() { return sweeps().name; }

Results margin_softmax(const Arguments& arguments) {
  const Problem p(arguments);
  return p.wide() ? run<double>(p) : run<float>(p);
}

at::Tensor prototype_gradient(
    const at::Tensor& grad_rows, const at::Tensor& lse, const at::Tensor& negatives, const at::Tensor& target_slope,
    const Arguments& arguments) {
  const Problem p(arguments);
  return p.wide() ? run_prototypes<double>(p, grad_rows, lse, negatives, target_slope)
                  : run_prototypes<float>(p, grad_rows, lse, negatives, target_slope);
}

at::Tensor scaled_rows(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& gradient, at::ScalarType dtype) {
  const int64_t N = gradient.size(0), D = gradient.size(1);
  at::Tensor out = at::empty({N, D}, gradient.options().dtype(dtype));
  const auto scale = [&](auto zero, auto* to) {
    using T = decltype(zero);
    using S = std::remove_pointer_t<decltype(to)>;
    const at::Tensor incoming = grad_loss.to(gradient.scalar_type()).contiguous();
    const T *g = incoming.const_data_ptr<T>(), *w = row_weight.const_data_ptr<T>(),
            *from = gradient.const_data_ptr<T>();
    const bool same = incoming.numel() == 1 && N != 1;
    at::parallel_for(0, N, std::max<int64_t>(1, 32768 / std::max<int64_t>(D, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T factor = w[i] == 0 ? T(0) : g[same ? 0 : i] * w[i];
        for (int64_t d = 0; d < D; d++) to[i * D + d] = static_cast<S>(factor * from[i * D + d]);
      }
    });
  };
  if (N == 0) return out;
  switch (dtype) {
    case at::kDouble:
      scale(double(), out.mutable_data_ptr<double>());
      break;
    case at::kFloat:
      gradient.scalar_type() == at::kDouble ? scale(double(), out.mutable_data_ptr<float>())
                                            : scale(float(), out.mutable_data_ptr<float>());
      break;
    case at::kBFloat16:
      gradient.scalar_type() == at::kDouble ? scale(double(), out.mutable_data_ptr<at::BFloat16>())
                                            : scale(float(), out.mutable_data_ptr<at::BFloat16>());
      break;
    default:
      gradient.scalar_type() == at::kDouble ? scale(double(), out.mutable_data_ptr<at::Half>())
                                            : scale(float(), out.mutable_data_ptr<at::Half>());
  }
  return out;
}

}  // namespace sst_fast::cpu
