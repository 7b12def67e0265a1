// The fused loss on the CPU: prepares rows, hands (block, chunk) tasks to the sweep, combines their sums.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../margin.h"
#include "../ops.h"
#include "sweep.h"

namespace sst_fast::cpu {
namespace {

// The widest instruction set that both the compiler and this processor know. SST_FAST_CPU=generic|avx2|avx512
// narrows the choice, for tests.
const Sweeps& sweeps() {
  static const Sweeps* chosen = [] {
    const char* limit = std::getenv("SST_FAST_CPU");
    const Sweeps* best = sweeps_generic();
    auto allowed = [&](const char* name) { return !limit || std::strcmp(limit, name) == 0; };
#if defined(__x86_64__) || defined(_M_X64)
    if (sweeps_avx2() && allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      best = sweeps_avx2();
    if (sweeps_avx512() && allowed("avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = sweeps_avx512();
#endif
    return best;
  }();
  return *chosen;
}

template <typename T>
const Sweep<T>& sweep_for() {
  if constexpr (std::is_same_v<T, float>)
    return sweeps().f32;
  else
    return sweeps().f64;
}

Storage storage_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Storage::f64;
    case at::kFloat:
      return Storage::f32;
    case at::kBFloat16:
      return Storage::bf16;
    case at::kHalf:
      return Storage::f16;
    default:
      TORCH_CHECK(false, "margin_softmax: dtype ", t.scalar_type(), " has no CPU kernel");
  }
}

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
  }
}

const int64_t* identities(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

struct Row {
  double norm, inverse_norm, cosine, logit, slope;
};

// Everything about a row that does not need the sweep, in double: N * D operations beside 4 * N * K * D.
Row prepare(const double* x, const double* w, int64_t D, const Margin& margin, double scale) {
  double largest = 0;
  for (int64_t d = 0; d < D; d++) largest = std::max(largest, std::abs(x[d]));
  // Scaled, so that squares of finite numbers neither overflow nor vanish.
  const double unit = largest > 0 && std::isfinite(largest) ? largest : 1.0;
  double square = 0, dot = 0;
  for (int64_t d = 0; d < D; d++) {
    square += (x[d] / unit) * (x[d] / unit);
    dot += (x[d] / unit) * w[d];
  }
  Row row;
  row.norm = unit * std::sqrt(square);
  // A vanishing embedding has no direction: cosine 0 with everything, gradient 0.
  row.inverse_norm = row.norm < 1e-12 ? 0.0 : 1.0 / row.norm;
  row.cosine = row.norm < 1e-12 ? 0.0 : dot / std::sqrt(square);
  const auto psi = target_margin<double>(margin, row.cosine);
  row.logit = scale * psi.value;
  row.slope = psi.slope;
  return row;
}

struct Output {
  at::Tensor loss, gradient, lse, target_cosine, hardest, hardest_slot, beats;
};

template <typename T>
Output run(
    const at::Tensor& embedding, const at::Tensor& prototypes, const at::Tensor& target, const OptionalTensor& identity,
    const OptionalTensor& window, Slots slots, const Margin& margin, double scale, bool need_gradient) {
  const int64_t N = embedding.size(0), D = slots.D, K = slots.K;
  const auto stats = embedding.options().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat);
  const auto counts = embedding.options().dtype(at::kLong);
  Output out{at::empty({N}, stats), at::empty({need_gradient ? N : 0, D}, embedding.options()),
             at::empty({N}, stats), at::empty({N}, stats),
             at::empty({N}, stats), at::empty({N}, counts),
             at::empty({N}, counts)};
  if (N == 0) return out;

  const Storage x_storage = storage_of(embedding);
  const int64_t* target_slot = target.const_data_ptr<int64_t>();
  const int64_t groups = window ? window->size(0) : 1, group_rows = N / groups;
  const int64_t group_bytes = window ? slots.window_size * D * prototypes.element_size() : 0;
  const char* windows = static_cast<const char*>(slots.window);

  auto target_row = [&](int64_t i, double* to) {
    int64_t in_window = (target_slot[i] - slots.window_start + K) % K;
    if (windows && in_window < slots.window_size)
      read_row(windows + (i / group_rows) * group_bytes, slots.storage, in_window, D, to);
    else
      read_row(slots.features, slots.storage, target_slot[i], D, to);
  };

  std::vector<Row> rows(N);
  std::vector<double> inverse_norm(N);
  std::vector<T> scales(N, T(scale)), cosines(N);
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> x(D), w(D);
    for (int64_t i = begin; i < end; i++) {
      read_row(embedding.const_data_ptr(), x_storage, i, D, x.data());
      target_row(i, w.data());
      rows[i] = prepare(x.data(), w.data(), D, margin, scale);
      inverse_norm[i] = rows[i].inverse_norm;
      cosines[i] = T(rows[i].cosine);
    }
  });

  // Tasks: blocks of probes of one group x chunks of slots. Their number depends on shapes alone, never on the number
  // of threads, so neither do the bits of the result. Partial moments are held to 8 MiB.
  const int64_t blocks_in_group = (group_rows + kBlock - 1) / kBlock, blocks = groups * blocks_in_group;
  const int64_t block_bytes = kBlock * D * int64_t(sizeof(T));
  int64_t chunks = std::max<int64_t>(1, (32 + blocks - 1) / blocks);
  if (need_gradient) chunks = std::min(chunks, std::max<int64_t>(1, (8 << 20) / (blocks * block_bytes)));
  chunks = std::max<int64_t>(1, std::min(chunks, K / 192));
  const int64_t chunk_slots = (K + chunks - 1) / chunks;

  auto allocate = [](int64_t bytes) {
    return std::unique_ptr<char, decltype(&std::free)>(
        static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)), &std::free);
  };
  std::vector<Partial<T>> partials(blocks * chunks);
  // With one chunk a block is finished by the task that swept it and needs no shared memory.
  auto shared_moments = allocate(need_gradient && chunks > 1 ? blocks * chunks * block_bytes : 0);
  TORCH_CHECK(shared_moments, "margin_softmax: out of memory for partial sums");

  auto block_rows = [&](int64_t block) {
    const int64_t group = block / blocks_in_group;
    const int64_t begin = group * group_rows + block % blocks_in_group * kBlock;
    return std::pair(begin, std::min(kBlock + begin, (group + 1) * group_rows));
  };

  auto finish = [&](int64_t block) {
    const auto [begin, end] = block_rows(block);
    const Partial<T>* parts = &partials[block * chunks];
    std::vector<double> sum(D), w(D), x(D), weight(chunks);
    for (int64_t i = begin; i < end; i++) {
      const int64_t r = i - begin;
      double shift = -std::numeric_limits<double>::infinity(), l = 0;
      bool poisoned = false;
      for (int64_t c = 0; c < chunks; c++) {
        poisoned |= std::isnan(parts[c].sum[r]);
        if (parts[c].sum[r] > 0) shift = std::max(shift, parts[c].shift[r]);
      }
      T hardest = parts[0].hardest[r];
      int64_t slot = parts[0].hardest_slot[r], beats = 0;
      for (int64_t c = 0; c < chunks; c++) {
        weight[c] = parts[c].sum[r] > 0 ? std::exp(parts[c].shift[r] - shift) : 0.0;
        l += weight[c] * parts[c].sum[r];
        if (parts[c].hardest[r] > hardest) hardest = parts[c].hardest[r], slot = parts[c].hardest_slot[r];
        beats += parts[c].beats[r];
      }
      // negatives = log sum exp of the other slots; excess = negatives - t. Never sums the target with them, so
      // nothing cancels as its probability nears 1: loss = log(1 + e^excess), 1 - p = e^excess / (1 + e^excess).
      const Row& row = rows[i];
      const double nan = std::numeric_limits<double>::quiet_NaN();
      const double negatives = poisoned ? nan : l > 0 ? shift + std::log(l) : -std::numeric_limits<double>::infinity();
      const double excess = negatives - row.logit;
      const double small = std::exp(-std::abs(excess));
      const double loss = std::isnan(excess) ? nan : std::max(excess, 0.0) + std::log1p(small);
      const double wrong = excess > 0 ? 1 / (1 + small) : small / (1 + small);
      out.loss.mutable_data_ptr<T>()[i] = T(loss);
      out.lse.mutable_data_ptr<T>()[i] = T(loss + row.logit);
      out.target_cosine.mutable_data_ptr<T>()[i] = T(row.cosine);
      out.hardest.mutable_data_ptr<T>()[i] = hardest;
      out.hardest_slot.mutable_data_ptr<int64_t>()[i] = slot;
      out.beats.mutable_data_ptr<int64_t>()[i] = beats;
      if (!need_gradient) continue;

      // For the unit probe: scale * (1 - p) * (mean of phi' w over the other slots - psi' w_target), then the
      // projection of the normalisation.
      target_row(i, w.data());
      read_row(embedding.const_data_ptr(), x_storage, i, D, x.data());
      for (int64_t d = 0; d < D; d++) sum[d] = poisoned ? nan : 0.0;
      for (int64_t c = 0; c < chunks && l > 0; c++) {
        if (weight[c] == 0) continue;
        const int64_t width = parts[c].moment_width;
        const T* moment = parts[c].moment + r / width * D * width + r % width;
        const double share = weight[c] / l;
        for (int64_t d = 0; d < D; d++) sum[d] += share * double(moment[d * width]);
      }
      double along = 0;
      for (int64_t d = 0; d < D; d++) {
        sum[d] = scale * wrong * (sum[d] - row.slope * w[d]);
        along += sum[d] * (x[d] * row.inverse_norm);
      }
      auto write = [&](auto* to) {
        using S = std::remove_pointer_t<decltype(to)>;
        for (int64_t d = 0; d < D; d++) {
          const double value = (sum[d] - along * (x[d] * row.inverse_norm)) * row.inverse_norm;
          if constexpr (std::is_same_v<S, double>)
            to[i * D + d] = value;
          else
            to[i * D + d] = S(float(value));
        }
      };
      switch (x_storage) {
        case Storage::f64:
          write(out.gradient.mutable_data_ptr<double>());
          break;
        case Storage::f32:
          write(out.gradient.mutable_data_ptr<float>());
          break;
        case Storage::bf16:
          write(out.gradient.mutable_data_ptr<at::BFloat16>());
          break;
        case Storage::f16:
          write(out.gradient.mutable_data_ptr<at::Half>());
          break;
      }
    }
  };

  const auto& sweep = sweep_for<T>();
  at::parallel_for(0, blocks * chunks, 1, [&](int64_t first_task, int64_t last_task) {
    auto scratch = allocate(sweep.scratch(D));
    auto own_moment = allocate(need_gradient && chunks == 1 ? block_bytes : 0);
    TORCH_CHECK(scratch && own_moment, "margin_softmax: out of memory for a tile");
    for (int64_t task = first_task; task < last_task; task++) {
      const int64_t block = task / chunks, chunk = task % chunks;
      const auto [begin, end] = block_rows(block);
      Partial<T>& part = partials[task];
      char* moment = chunks == 1 ? own_moment.get() : shared_moments.get() + task * block_bytes;
      part.moment = need_gradient ? reinterpret_cast<T*>(moment) : nullptr;
      Probes<T> probes{
          static_cast<const char*>(embedding.const_data_ptr()) + begin * D * embedding.element_size(),
          x_storage,
          &inverse_norm[begin],
          &scales[begin],
          &cosines[begin],
          target_slot + begin,
          identity ? identities(identity) + begin : nullptr,
          end - begin};
      Slots mine = slots;
      if (windows) mine.window = windows + begin / group_rows * group_bytes;
      sweep.run(probes, mine, chunk * chunk_slots, std::min(K, (chunk + 1) * chunk_slots), scratch.get(), part);
      if (chunks == 1) finish(block);
    }
  });
  if (chunks > 1)
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; block++) finish(block);
    });
  return out;
}

}  // namespace

const char* instruction_set() { return sweeps().name; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> margin_softmax(
    const at::Tensor& embedding_, const at::Tensor& prototypes_, const at::Tensor& target_,
    const OptionalTensor& identity_, const OptionalTensor& slot_identity_, const OptionalTensor& window_,
    const OptionalTensor& window_identity_, const OptionalTensor& window_start, int64_t kind,
    const std::vector<double>& parameters, double scale, bool mask_empty, bool need_gradient) {
  auto contiguous = [](const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; };
  const at::Tensor embedding = embedding_.contiguous(), prototypes = prototypes_.contiguous();
  const at::Tensor target = target_.contiguous();
  const OptionalTensor identity = contiguous(identity_), slot_identity = contiguous(slot_identity_);
  const OptionalTensor window = contiguous(window_), window_identity = contiguous(window_identity_);

  const int64_t N = embedding.size(0), K = prototypes.size(0), D = prototypes.size(1);
  TORCH_CHECK(embedding.size(1) == D && target.numel() == N, "margin_softmax: shapes disagree");
  TORCH_CHECK(K > 0 && K < (int64_t(1) << 31), "margin_softmax: K must be in [1, 2^31)");
  Slots slots{
      prototypes.const_data_ptr(),
      storage_of(prototypes),
      identities(slot_identity),
      nullptr,
      nullptr,
      0,
      0,
      K,
      D,
      mask_empty};
  if (window) {
    TORCH_CHECK(
        window_start && window->size(2) == D && window->size(1) <= K && N % window->size(0) == 0 &&
            window->scalar_type() == prototypes.scalar_type() && (!slot_identity || window_identity),
        "margin_softmax: the window does not fit");
    slots.window = window->const_data_ptr();
    slots.window_size = window->size(1);
    slots.window_identity = identities(window_identity);
    slots.window_start = *window_start->const_data_ptr<int64_t>();
    TORCH_CHECK_INDEX(
        slots.window_start >= 0 && slots.window_start < K, "margin_softmax: window start outside the queue");
  }
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < N; i++)
    TORCH_CHECK_INDEX(
        y[i] >= 0 && y[i] < K, "target[", i, "] is ", y[i], ", expected a row number of prototypes in [0, ", K, ")");

  const Margin margin = make_margin(kind, parameters);
  const bool wide = embedding.scalar_type() == at::kDouble || prototypes.scalar_type() == at::kDouble;
  Output o = wide ? run<double>(embedding, prototypes, target, identity, window, slots, margin, scale, need_gradient)
                  : run<float>(embedding, prototypes, target, identity, window, slots, margin, scale, need_gradient);
  return {o.loss, o.gradient, o.lse, o.target_cosine, o.hardest, o.hardest_slot, o.beats};
}

}  // namespace sst_fast::cpu
