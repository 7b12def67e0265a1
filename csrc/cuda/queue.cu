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
#include <tuple>

#include "../ops.h"
#include "../ring.h"

namespace sst_fast::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8;

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// A warp writes one row as a unit row (unless it is one already), in another dtype. `Width` elements are read and
// written at once: 16 bytes of the wider type where D allows it.
template <typename From, typename To, int Width>
__device__ __forceinline__ void write_unit_row(
    const From* __restrict__ row, To* __restrict__ to, int64_t D, bool unit) {
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
  const Sum scale = unit ? Sum(1) : normaliser(sqrt(square));
  for (int64_t d = lane * Width; d < D; d += kWarp * Width) {
    const auto pack = *reinterpret_cast<const Pack<From, Width>*>(row + d);
    Pack<To, Width> out;
#pragma unroll
    for (int i = 0; i < Width; i++) out.at[i] = static_cast<To>(Sum(pack.at[i]) * scale);
    *reinterpret_cast<Pack<To, Width>*>(to + d) = out;
  }
}

template <typename From, typename To, int Width>
__global__ void enqueue_kernel(
    const From* __restrict__ features, const int64_t* __restrict__ identities, To* __restrict__ queue,
    int64_t* __restrict__ queue_identities, int64_t* state, unsigned* tickets, int64_t B, int64_t D, int64_t K,
    bool unit) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  // Every block reads the position before the last one to finish moves it.
  const int64_t start = *reinterpret_cast<volatile int64_t*>(state + kPosition);
  if (b < B) {
    const int64_t slot = ring_slot(start, b, K);
    write_unit_row<From, To, Width>(features + b * D, queue + slot * D, D, unit);
    if (threadIdx.x % kWarp == 0) queue_identities[slot] = identities[b];
  }
  // The last block to arrive moves the ring on and resets the counter for the next launch (or graph replay).
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(tickets, 1u) == gridDim.x - 1) {
      state[kPosition] = ring_slot(start, B, K);
      const int64_t fill = state[kFill] + B;
      state[kFill] = fill < K ? fill : K;
      *tickets = 0;
    }
  }
}

// rows of features: H B. What the next enqueue of B rows will write, and where.
template <typename From, typename To, int Width>
__global__ void window_kernel(
    const From* __restrict__ features, To* __restrict__ out, const int64_t* __restrict__ state,
    int64_t* __restrict__ start, int64_t* __restrict__ slots, int64_t rows, int64_t B, int64_t D, int64_t K) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t position = state[kPosition];
  if (row < rows) write_unit_row<From, To, Width>(features + row * D, out + row * D, D, false);
  if (threadIdx.x % kWarp == 0 && row < B) slots[row] = ring_slot(position, row, K);
  if (row == 0 && threadIdx.x == 0) *start = position;
}

__global__ void dequeue_kernel(int64_t* identities, int64_t* gone, int64_t* state, int64_t count, int64_t K) {
  const int64_t position = state[kPosition], fill = state[kFill];
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

// Calls launch(Row<From, To, Width>) for the dtypes of two matrices with D columns, as wide as D and the first one's
// address allow; the other's rows begin where an allocation does.
template <typename From_, typename To_, int width>
struct Row {
  using From = From_;
  using To = To_;
  static constexpr int Width = width;
};

template <typename Launch>
void with_row(const at::Tensor& from, at::ScalarType to, Launch launch) {
  const int64_t D = from.size(-1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "queue", [&] {
    using From = scalar_t;
    SST_DISPATCH_QUEUE(to, [&] {
      using To = scalar_t;
      constexpr int wide = 16 / int(sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
      if (D % wide == 0 && reinterpret_cast<uintptr_t>(from.const_data_ptr()) % 16 == 0)
        launch(Row<From, To, wide>());
      else
        launch(Row<From, To, 1>());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

unsigned blocks_of(int64_t rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

}  // namespace

// state: int64 [3], position, fill and the launch's counter.
void enqueue(
    const at::Tensor& features_, const at::Tensor& identities_, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit) {
  const at::Tensor features = features_.contiguous(), identities = identities_.contiguous();
  const int64_t B = features.size(0), D = features.size(1), K = queue.size(0);
  TORCH_CHECK(queue.is_contiguous() && queue.size(1) == D && B <= K, "enqueue: shapes disagree");
  if (B == 0) return;
  const c10::cuda::CUDAGuard guard(queue.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  int64_t* ring = state.mutable_data_ptr<int64_t>();
  with_row(features, queue.scalar_type(), [&](auto row) {
    using R = decltype(row);
    enqueue_kernel<typename R::From, typename R::To, R::Width><<<blocks_of(B), kWarps * kWarp, 0, stream>>>(
        features.const_data_ptr<typename R::From>(), identities.const_data_ptr<int64_t>(),
        queue.mutable_data_ptr<typename R::To>(), queue_identities.mutable_data_ptr<int64_t>(), ring,
        reinterpret_cast<unsigned*>(ring + 2), B, D, K, unit);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> window(
    const at::Tensor& features_, const at::Tensor& state, int64_t size, at::ScalarType dtype) {
  const at::Tensor features = features_.contiguous();
  const int64_t B = features.size(1), D = features.size(2), rows = features.size(0) * B;
  const c10::cuda::CUDAGuard guard(features.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor unit = at::empty(features.sizes(), features.options().dtype(dtype));
  at::Tensor start = at::empty({}, state.options()), slots = at::empty({B}, state.options());
  with_row(features, dtype, [&](auto row) {
    using R = decltype(row);
    // A block at least: an empty batch has a start too.
    window_kernel<typename R::From, typename R::To, R::Width>
        <<<blocks_of(std::max<int64_t>(rows, 1)), kWarps * kWarp, 0, stream>>>(
            features.const_data_ptr<typename R::From>(), unit.mutable_data_ptr<typename R::To>(),
            state.const_data_ptr<int64_t>(), start.mutable_data_ptr<int64_t>(), slots.mutable_data_ptr<int64_t>(), rows,
            B, D, size);
  });
  return {unit, start, slots};
}

at::Tensor dequeue(int64_t count, at::Tensor& queue_identities, at::Tensor& state) {
  const c10::cuda::CUDAGuard guard(queue_identities.device());
  at::Tensor gone = at::empty({count}, queue_identities.options());
  dequeue_kernel<<<1, 1024, 0, c10::cuda::getCurrentCUDAStream()>>>(
      queue_identities.mutable_data_ptr<int64_t>(), gone.mutable_data_ptr<int64_t>(), state.mutable_data_ptr<int64_t>(),
      count, queue_identities.size(0));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return gone;
}

}  // namespace sst_fast::cuda
