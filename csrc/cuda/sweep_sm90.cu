// Launches the sweep of sweep_sm90.h.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <type_traits>

#include "../ops.h"
#include "sweep_sm90.h"

namespace sst_fast::cuda {
namespace {

// The driver's function that describes a tensor to the copy engine, found at run time: nothing is linked against the
// driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    C10_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status));
    TORCH_CHECK(status == cudaDriverEntryPointSuccess, "sweep: the driver lacks cuTensorMapEncodeTiled");
    return function;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Rows of D numbers as panels of 128 bytes, one in `parts` of them and 64 rows at once. Rows beyond the end are read as
// zeros.
CUtensorMap describe(const at::Tensor& rows, int D, int parts) {
  const auto size = cuuint64_t(rows.element_size()), columns = kPanelBytes / size;
  const auto type = size == 1                         ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : rows.scalar_type() == at::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[] = {columns, cuuint64_t(rows.numel() / D), D / columns};
  const cuuint64_t strides[] = {size * D, kPanelBytes};
  const cuuint32_t box[] = {cuuint32_t(columns), kSlots, cuuint32_t(D / columns / parts)}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = encoder()(
      &map, type, 3, rows.data_ptr(), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(status == CUDA_SUCCESS, "sweep: the driver refuses the tensor's description, error ", int(status));
  return map;
}

template <typename Queue, int D, typename Phi, bool kMoment>
void launch(const CUtensorMap (&maps)[3], const Arguments& a, dim3 grid, int cluster) {
  const auto kernel = sweep_kernel<Queue, D, Phi, kMoment>;
  const int bytes = sizeof(Shared<Element<Queue>, D>) + 1024;  // to begin at a multiple of 1,024
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, maps[0], maps[1], maps[2], a, uint32_t(cluster)));
}

template <typename T>
T* pointer(const at::Tensor& tensor) {
  return tensor.numel() ? tensor.data_ptr<T>() : nullptr;
}

template <typename T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace

void sweep(
    const at::Tensor& unit, const at::Tensor& prototypes, const OptionalTensor& window,
    const OptionalTensor& window_start, const at::Tensor& target, const OptionalTensor& identity,
    const OptionalTensor& slot_identity, const OptionalTensor& window_identity, const at::Tensor& cosine,
    const at::Tensor& scales, const at::Tensor& phi_rows, const std::vector<at::Tensor>& out, const at::Tensor& moment,
    int64_t tiles_in_split, int64_t cluster, int64_t kind, bool mask_empty, bool straight_through) {
  const c10::cuda::CUDAGuard guard(unit.device());
  const int D = unit.size(1), groups = window ? window->size(0) : 1;
  const auto type = prototypes.scalar_type();
  const bool bytes = unit.scalar_type() == at::kFloat8_e4m3fn, converts = type == at::kFloat8_e4m3fn && !bytes;
  TORCH_CHECK(out.size() == 8, "sweep: eight tensors of results");
  TORCH_CHECK(unit.scalar_type() == (converts ? at::kHalf : type), "sweep: dtypes disagree");
  Arguments a{};
  a.N = unit.size(0), a.K = prototypes.size(0), a.B = window ? window->size(1) : 0;
  a.rows_in_group = a.N / groups, a.blocks_in_group = (a.rows_in_group + kRows - 1) / kRows;
  a.tiles = (a.K + kSlots - 1) / kSlots + (a.B + kSlots - 1) / kSlots;
  a.tiles_in_split = tiles_in_split;
  const int64_t splits = (a.tiles + tiles_in_split - 1) / tiles_in_split;
  for (const auto& tensor : out) TORCH_CHECK(tensor.numel() == splits * a.N, "sweep: results are [splits, N]");
  TORCH_CHECK(moment.numel() == 0 || moment.numel() == splits * a.N * D, "sweep: moment is [splits, N, D]");
  TORCH_CHECK(cluster == 1 || (cluster == 2 && a.blocks_in_group % 2 == 0 && !converts), "sweep: cluster");
  a.prototypes = prototypes.const_data_ptr(), a.window = window ? window->const_data_ptr() : nullptr;
  a.window_start = pointer<int64_t>(window_start), a.target = target.const_data_ptr<int64_t>();
  a.identity = pointer<int64_t>(identity), a.slot_identity = pointer<int64_t>(slot_identity);
  a.window_identity = pointer<int64_t>(window_identity);
  a.cosine = cosine.const_data_ptr<float>(), a.scales = scales.const_data_ptr<float>();
  a.phi_rows = phi_rows.const_data_ptr<float>();
  a.shift = pointer<float>(out[0]), a.total = pointer<float>(out[1]), a.hard_sum = pointer<float>(out[2]);
  a.hard = pointer<int>(out[3]), a.live = pointer<int>(out[4]), a.hardest = pointer<float>(out[5]);
  a.slot = pointer<int>(out[6]), a.beats = pointer<int>(out[7]), a.moment = pointer<float>(moment);
  a.mask_empty = mask_empty, a.straight = straight_through, a.npc = Kind(kind) == Kind::npc;

  const CUtensorMap x_map = describe(unit, D, 1);
  const CUtensorMap w_map = converts ? x_map : describe(prototypes, D, 2);
  const CUtensorMap window_map = converts || !window ? w_map : describe(*window, D, 2);
  const CUtensorMap maps[] = {x_map, w_map, window_map};
  const dim3 grid(groups * a.blocks_in_group, splits);
  const auto with_type = [&](auto queue, auto dim) {
    with_phi(Kind(kind), [&](auto phi) {
      using Queue = decltype(queue);
      using Phi = decltype(phi);
      if (moment.numel())
        launch<Queue, decltype(dim)::value, Phi, true>(maps, a, grid, cluster);
      else
        launch<Queue, decltype(dim)::value, Phi, false>(maps, a, grid, cluster);
    });
  };
  const auto with_dim = [&](auto dim) {
    if constexpr (decltype(dim)::value > 128)  // two halves of a panel at least
      if (bytes) return with_type(Float8Products{}, dim);
    TORCH_CHECK(!bytes, "sweep: products of float8 need D = 256 or 512");
    if (type == at::kBFloat16)
      with_type(__nv_bfloat16{}, dim);
    else if (type == at::kHalf)
      with_type(__half{}, dim);
    else
      with_type(__nv_fp8_e4m3{}, dim);
  };
  switch (D) {
    case 128:
      return with_dim(std::integral_constant<int, 128>{});
    case 256:
      return with_dim(std::integral_constant<int, 256>{});
    case 512:
      return with_dim(std::integral_constant<int, 512>{});
    default:
      TORCH_CHECK(false, "sweep: D must be 128, 256 or 512, not ", D);
  }
}

}  // namespace sst_fast::cuda
