// The gallery queue on a CUDA device: one launch each for the window and for the enqueue, which normalise and convert;
// the latter writes the ring and advances it. Position and fill stay on the device, so nothing waits for the host and
// the launch can be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../ops.h"
#include "../ring.h"

namespace sst_fast::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8;

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// A warp writes one row as a unit row (unless it is one already), in another dtype, and says whether it is finite; one
// that is not becomes `bad` as a whole. `Width` elements are read and written at once: 16 bytes of the wider type where
// D allows it.
template <typename From, typename To, int Width>
__device__ __forceinline__ bool write_unit_row(
    const From* __restrict__ row, To* __restrict__ to, int64_t D, bool unit, double bad) {
  using Sum = double;  // squares of large floats overflow a float; a row is too short for the price to show
  const int lane = threadIdx.x % kWarp;
  Sum square = 0;
  for (int64_t d = lane * Width; d < D; d += kWarp * Width) {
    const auto pack = *reinterpret_cast<const Pack<From, Width>*>(row + d);
#pragma unroll
    for (int i = 0; i < Width; i++) square += Sum(pack.at[i]) * Sum(pack.at[i]);
  }
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
  const Sum norm = sqrt(square);
  const bool finite = isfinite(norm);
  const Sum scale = unit ? Sum(1) : normaliser(norm);
  for (int64_t d = lane * Width; d < D; d += kWarp * Width) {
    const auto pack = *reinterpret_cast<const Pack<From, Width>*>(row + d);
    Pack<To, Width> out;
#pragma unroll
    for (int i = 0; i < Width; i++) out.at[i] = static_cast<To>(finite ? Sum(pack.at[i]) * scale : bad);
    *reinterpret_cast<Pack<To, Width>*>(to + d) = out;
  }
  return finite;
}

template <typename From, typename To, int Width>
__global__ void enqueue_kernel(
    const From* __restrict__ features, const int64_t* __restrict__ identities, To* __restrict__ queue,
    int64_t* __restrict__ queue_identities, int64_t* state, unsigned* tickets, const int64_t* group, int64_t groups,
    int64_t B, int64_t D, int64_t K, bool unit) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  // Every block reads the position before the last one to finish moves it.
  const int64_t start = ring_position(state, K);
  if (b < B) {
    const int64_t slot = ring_slot(start, b, K);
    const From* row = features + ((group ? held_in(*group, groups) * B : 0) + b) * D;
    // A row that is not finite would make every later loss NaN: its slot stays empty and holds zeros.
    const bool finite = write_unit_row<From, To, Width>(row, queue + slot * D, D, unit, 0.0);
    if (threadIdx.x % kWarp == 0) {
      queue_identities[slot] = finite ? identities[b] : -1;
      if (!finite) atomicAdd(reinterpret_cast<unsigned long long*>(state + kRejected), 1ull);
    }
  }
  // The last block to arrive moves the ring on and resets the counter for the next launch (or graph replay).
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(tickets, 1u) == gridDim.x - 1) {
      state[kPosition] = ring_slot(start, B, K);
      const int64_t fill = ring_fill(state, K) + B;
      state[kFill] = fill < K ? fill : K;
      *tickets = 0;
    }
  }
}

constexpr int kMostGroups = 8;
struct Groups {  // of features [B, D]
  const void* at[kMostGroups];
  int64_t count;
};

// A warp for each row of the batch, over all groups: what the next enqueue of B rows will write, where, and whose it
// is.
template <typename From, typename To, int Width>
__global__ void window_kernel(
    const __grid_constant__ Groups groups, const int64_t* __restrict__ identities, To* __restrict__ out,
    const int64_t* __restrict__ state, int64_t* __restrict__ start, int64_t* __restrict__ targets,
    int64_t* __restrict__ owners, int64_t* __restrict__ held, int64_t B, int64_t D, int64_t K) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const bool first = threadIdx.x % kWarp == 0;
  const int64_t position = ring_position(state, K);
  if (b == 0 && first) *start = position;
  if (b >= B) return;
  bool finite = true;
  for (int64_t h = 0; h < groups.count; h++) {
    const From* row = static_cast<const From*>(groups.at[h]) + b * D;
    // The probe whose target the row is shall get a NaN loss.
    finite &= write_unit_row<From, To, Width>(row, out + (h * B + b) * D, D, false, nan(""));
    if (first) targets[h * B + b] = ring_slot(position, b, K), owners[h * B + b] = identities[b];
  }
  if (first) held[b] = finite ? identities[b] : -1;
}

__global__ void dequeue_kernel(int64_t* identities, int64_t* gone, int64_t* state, int64_t count, int64_t K) {
  const int64_t position = ring_position(state, K), fill = ring_fill(state, K);
  const int64_t oldest = ring_oldest(position, fill, K);
  for (int64_t b = threadIdx.x; b < count; b += blockDim.x) {
    int64_t identity = -1;
    if (b < fill) {
      const int64_t slot = ring_slot(oldest, b, K);
      identity = identities[slot];
      identities[slot] = -1;
    }
    gone[b] = identity;
  }
  __syncthreads();
  if (threadIdx.x == 0) state[kFill] = fill > count ? fill - count : 0;
}

// Calls launch(Row<From, To, Width>) for the dtypes of two matrices with D columns, as wide as D allows where the first
// one's rows begin at multiples of 16 bytes; the other's rows begin where an allocation does.
template <typename From_, typename To_, int width>
struct Row {
  using From = From_;
  using To = To_;
  static constexpr int Width = width;
};

template <typename Launch>
void with_row(const at::Tensor& from, at::ScalarType to, bool aligned, Launch launch) {
  const int64_t D = from.size(-1);
  SST_DISPATCH_QUEUE(from.scalar_type(), [&] {
    using From = scalar_t;
    SST_DISPATCH_QUEUE(to, [&] {
      using To = scalar_t;
      constexpr int wide = 16 / int(sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
      if (D % wide == 0 && aligned)
        launch(Row<From, To, wide>());
      else
        launch(Row<From, To, 1>());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

unsigned blocks_of(int64_t rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

}  // namespace

void enqueue(
    const at::Tensor& features_, const at::Tensor& identities_, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group) {
  const at::Tensor features = features_.contiguous(), identities = identities_.contiguous();
  const int64_t B = features.size(-2), D = features.size(-1), K = queue.size(0);
  TORCH_CHECK_TYPE(
      !group || (group->scalar_type() == at::kLong && group->numel() == 1 && group->device() == queue.device()),
      "enqueue: group must be one int64 number on the queue's device");
  TORCH_CHECK(
      features.dim() == (group ? 3 : 2) && queue.is_contiguous() && queue_identities.is_contiguous() &&
          queue.size(1) == D && B <= K && identities.numel() == B && queue_identities.numel() == K &&
          state.numel() == kState,
      "enqueue: shapes disagree");
  if (B == 0) return;
  const c10::cuda::CUDAGuard guard(queue.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  int64_t* ring = state.mutable_data_ptr<int64_t>();
  const bool aligned = reinterpret_cast<uintptr_t>(features.const_data_ptr()) % 16 == 0;
  with_row(features, queue.scalar_type(), aligned, [&](auto row) {
    using R = decltype(row);
    enqueue_kernel<typename R::From, typename R::To, R::Width><<<blocks_of(B), kWarps * kWarp, 0, stream>>>(
        features.const_data_ptr<typename R::From>(), identities.const_data_ptr<int64_t>(),
        queue.mutable_data_ptr<typename R::To>(), queue_identities.mutable_data_ptr<int64_t>(), ring,
        reinterpret_cast<unsigned*>(ring + kTickets), group ? group->const_data_ptr<int64_t>() : nullptr,
        features.dim() == 3 ? features.size(0) : 1, B, D, K, unit);
  });
}

WindowTensors window(
    at::TensorList groups, const at::Tensor& identities_, const at::Tensor& state, int64_t size, at::ScalarType dtype) {
  const int64_t H = groups.size(), B = identities_.numel(), D = groups[0].size(1);
  TORCH_CHECK(H <= kMostGroups, "window: at most ", kMostGroups, " groups of probes, got ", H);
  const c10::cuda::CUDAGuard guard(groups[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor identities = identities_.contiguous();
  std::vector<at::Tensor> rows;
  Groups of{{}, H};
  bool aligned = true;
  for (int64_t h = 0; h < H; h++) {
    TORCH_CHECK(groups[h].size(0) == B && groups[h].size(1) == D, "window: shapes disagree");
    of.at[h] = rows.emplace_back(groups[h].contiguous()).const_data_ptr();
    aligned &= reinterpret_cast<uintptr_t>(of.at[h]) % 16 == 0;
  }
  const auto numbers = [&](at::IntArrayRef shape) { return at::empty(shape, state.options()); };
  WindowTensors out{
      at::empty({H, B, D}, groups[0].options().dtype(dtype)), numbers({}), numbers({H * B}), numbers({H * B}),
      numbers({B})};
  auto& [unit, start, targets, owners, held] = out;
  with_row(rows[0], dtype, aligned, [&](auto row) {
    using R = decltype(row);
    // A block at least: an empty batch has a start too.
    window_kernel<typename R::From, typename R::To, R::Width>
        <<<blocks_of(std::max<int64_t>(B, 1)), kWarps * kWarp, 0, stream>>>(
            of, identities.const_data_ptr<int64_t>(), unit.mutable_data_ptr<typename R::To>(),
            state.const_data_ptr<int64_t>(), start.mutable_data_ptr<int64_t>(), targets.mutable_data_ptr<int64_t>(),
            owners.mutable_data_ptr<int64_t>(), held.mutable_data_ptr<int64_t>(), B, D, size);
  });
  return out;
}

at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state) {
  TORCH_CHECK(state.numel() == kState && count >= 0 && count <= queue_identities.size(0), "dequeue: shapes disagree");
  const c10::cuda::CUDAGuard guard(queue_identities.device());
  at::Tensor gone = at::empty({count}, queue_identities.options());
  dequeue_kernel<<<1, 1024, 0, c10::cuda::getCurrentCUDAStream()>>>(
      queue_identities.mutable_data_ptr<int64_t>(), gone.mutable_data_ptr<int64_t>(), state.mutable_data_ptr<int64_t>(),
      count, queue_identities.size(0));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return gone;
}

}  // namespace sst_fast::cuda
