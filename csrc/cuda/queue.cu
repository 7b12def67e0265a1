// The gallery queue on a CUDA device: one launch normalises, converts, writes the ring and advances it. Position and
// fill stay on the device, so nothing waits for the host and the launch can be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>

#include "../ops.h"
#include "../ring.h"

namespace sst_fast::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8;

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// One warp a row. `Width` elements are read and written at once: 16 bytes of the wider type where D allows it.
template <typename From, typename To, int Width>
__global__ void enqueue_kernel(
    const From* __restrict__ features, const int64_t* __restrict__ identities, To* __restrict__ queue,
    int64_t* __restrict__ queue_identities, int64_t* state, unsigned* tickets, int64_t B, int64_t D, int64_t K,
    bool unit) {
  using Sum = double;  // squares of large floats overflow a float; a row is too short for the price to show
  const int lane = threadIdx.x % kWarp;
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  // Every block reads the position before the last one to finish moves it.
  const int64_t start = ring_position(state, K);
  if (b < B) {
    const From* row = features + b * D;
    Sum square = 0;
    for (int64_t d = lane * Width; d < D; d += kWarp * Width) {
      const auto pack = *reinterpret_cast<const Pack<From, Width>*>(row + d);
#pragma unroll
      for (int i = 0; i < Width; i++) square += Sum(pack.at[i]) * Sum(pack.at[i]);
    }
#pragma unroll
    for (int step = kWarp / 2; step; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    // A row that is not finite would make every later loss NaN: its slot stays empty and holds zeros.
    const Sum norm = sqrt(square);
    const bool finite = isfinite(norm);
    const Sum scale = !finite ? Sum(0) : unit ? Sum(1) : normaliser(norm);
    const int64_t slot = ring_slot(start, b, K);
    To* to = queue + slot * D;
    for (int64_t d = lane * Width; d < D; d += kWarp * Width) {
      const auto pack = *reinterpret_cast<const Pack<From, Width>*>(row + d);
      Pack<To, Width> unit;
#pragma unroll
      for (int i = 0; i < Width; i++) unit.at[i] = static_cast<To>(scale == 0 ? Sum(0) : Sum(pack.at[i]) * scale);
      *reinterpret_cast<Pack<To, Width>*>(to + d) = unit;
    }
    if (lane == 0) {
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

}  // namespace

void enqueue(
    const at::Tensor& features_, const at::Tensor& identities_, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group) {
  const at::Tensor features =
      (group ? features_.index_select(0, group->to(at::kLong).view({1})).squeeze(0) : features_).contiguous();
  const at::Tensor identities = identities_.contiguous();
  const int64_t B = features.size(0), D = features.size(1), K = queue.size(0);
  TORCH_CHECK(
      queue.is_contiguous() && queue.size(1) == D && B <= K && state.numel() == kState, "enqueue: shapes disagree");
  if (B == 0) return;
  const c10::cuda::CUDAGuard guard(queue.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto grid = static_cast<unsigned>((B + kWarps - 1) / kWarps);
  int64_t* ring = state.mutable_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "enqueue", [&] {
    using From = scalar_t;
    SST_DISPATCH_QUEUE(queue.scalar_type(), [&] {
      using To = scalar_t;
      constexpr int wide = 16 / int(sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
      auto launch = [&](auto kernel) {
        kernel<<<grid, kWarps * kWarp, 0, stream>>>(
            features.const_data_ptr<From>(), identities.const_data_ptr<int64_t>(), queue.mutable_data_ptr<To>(),
            queue_identities.mutable_data_ptr<int64_t>(), ring, reinterpret_cast<unsigned*>(ring + kTickets), B, D, K,
            unit);
      };
      const bool aligned = D % wide == 0 && reinterpret_cast<uintptr_t>(features.const_data_ptr()) % 16 == 0;
      if (aligned)
        launch(enqueue_kernel<From, To, wide>);
      else
        launch(enqueue_kernel<From, To, 1>);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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
