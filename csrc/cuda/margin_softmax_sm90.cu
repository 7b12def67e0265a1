// The fused loss on Hopper, for PyTorch: its tensors as pointers, its kernels launched. Not yet run on a GPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "margin_softmax_sm90.h"
// After the kernels: their `Problem` is another than the operators' `Arguments`.
#include "../ops.h"

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
    TORCH_CHECK(status == cudaDriverEntryPointSuccess, "margin_softmax: the driver lacks cuTensorMapEncodeTiled");
    return function;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

struct Gpu {
  cudaStream_t stream;

  // Rows of D numbers as panels of 128 bytes, one in `parts` of them and 64 rows at once. Rows beyond the end are read
  // as zeros.
  static CUtensorMap describe(const void* rows, Number type, int64_t count, int D, int parts) {
    const cuuint64_t size = bytes_of(type), columns = kPanelBytes / size;
    const auto format = type == Number::f8    ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                        : type == Number::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[] = {columns, cuuint64_t(count), D / columns}, strides[] = {size * D, kPanelBytes};
    const cuuint32_t box[] = {cuuint32_t(columns), kSlots, cuuint32_t(D / columns / parts)}, steps[] = {1, 1, 1};
    CUtensorMap map;
    const CUresult status = encoder()(
        &map, format, 3, const_cast<void*>(rows), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCH_CHECK(
        status == CUDA_SUCCESS, "margin_softmax: the driver refuses the tensor's description, error ", int(status));
    return map;
  }

  template <typename... Parameters, typename... Values>
  void launch(
      void (*kernel)(Parameters...), Size grid, Size threads, int bytes, int cluster, const Values&... values) const {
    constexpr int kWithoutAsking = 48 << 10;
    if (bytes > kWithoutAsking)
      C10_CUDA_CHECK(cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.x, grid.y);
    config.blockDim = dim3(threads.x, threads.y);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(values)...));
  }
};

Number number_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Number::f64;
    case at::kFloat:
      return Number::f32;
    case at::kBFloat16:
      return Number::bf16;
    case at::kHalf:
      return Number::f16;
    case at::kFloat8_e4m3fn:
      return Number::f8;
    default:
      TORCH_CHECK(false, "margin_softmax: not for ", t.scalar_type());
  }
}

// Contiguous, at a multiple of 16 bytes, as the copy engine and wide loads need it.
at::Tensor in_place(const at::Tensor& t) {
  const at::Tensor flat = t.contiguous();
  return reinterpret_cast<uintptr_t>(flat.const_data_ptr()) % 16 ? flat.clone() : flat;
}

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace

Results margin_softmax(const Arguments& arguments) {
  Arguments a = arguments;
  const c10::cuda::CUDAGuard guard(a.embedding.device());
  a.embedding = in_place(a.embedding), a.prototypes = in_place(a.prototypes);
#define SST_FIELD(name) \
  if (a.name) a.name = in_place(*a.name);
  SST_TENSORS(SST_FIELD)
#undef SST_FIELD
  Problem p{};
  p.N = int(a.embedding.size(0)), p.K = int(a.prototypes.size(0)), p.D = int(a.embedding.size(1));
  p.B = a.window ? int(a.window->size(1)) : 0, p.groups = a.window ? int(a.window->size(0)) : 1;
  TORCH_CHECK(
      a.prototypes.size(0) < 1 << 30 && a.embedding.size(0) < 1 << 30, "margin_softmax: N and K must be < 2^30");
  p.embedding_type = number_of(a.embedding), p.queue_type = number_of(a.prototypes);
  p.weight_type = a.weight ? number_of(*a.weight) : Number::f32;
  p.embedding = a.embedding.const_data_ptr(), p.prototypes = a.prototypes.const_data_ptr();
  p.window = a.window ? a.window->const_data_ptr() : nullptr,
  p.weight = a.weight ? a.weight->const_data_ptr() : nullptr;
  p.target = pointer<int64_t>(a.target), p.identity = pointer<int64_t>(a.identity);
  p.slot_identity = pointer<int64_t>(a.slot_identity), p.window_identity = pointer<int64_t>(a.window_identity);
  p.window_start = pointer<int64_t>(a.window_start);
  p.margin_rows = pointer<double>(a.margin_rows), p.scale_rows = pointer<double>(a.scale_rows);
  p.margin_parameters = a.margin_rows ? int(a.margin_rows->size(0)) : 0;
  p.margin = a.margin, p.scale = a.scale, p.ignore_index = a.ignore_index;
  p.mean = a.reduce() == Reduction::mean, p.reduced = a.reduce() != Reduction::none;
  p.mask_empty = a.mask_empty, p.straight = a.straight_through, p.float8_products = a.float8_products;
  p.need_gradient = a.need_gradient;

  const auto floats = a.embedding.options().dtype(at::kFloat), longs = a.embedding.options().dtype(at::kLong);
  const auto value = [&] { return at::empty({p.N}, floats); };
  const auto count = [&] { return at::empty({p.N}, longs); };
  Results r;
  r.loss = p.reduced ? at::empty({}, floats) : value();
  for (auto* t : {&r.lse, &r.target_cosine, &r.hardest_cosine, &r.residual, &r.row_weight, &r.target_slope})
    *t = value();
  for (auto* t : {&r.hardest_slot, &r.beats_target, &r.negatives}) *t = count();
  r.gradient = at::empty({p.need_gradient ? p.N : 0, p.D}, floats);
  r.scale_slope = at::empty({0}, floats);
  r.kept = at::empty({0, 0}, floats.dtype(at::kByte));
  if (p.N == 0) {
    r.loss.zero_();
    return r;
  }
  Workspace w{};
  w.loss = r.loss.mutable_data_ptr<float>(), w.lse = r.lse.mutable_data_ptr<float>();
  w.target_cosine = r.target_cosine.mutable_data_ptr<float>();
  w.hardest_cosine = r.hardest_cosine.mutable_data_ptr<float>(), w.residual = r.residual.mutable_data_ptr<float>();
  w.row_weight = r.row_weight.mutable_data_ptr<float>(), w.gradient = r.gradient.mutable_data_ptr<float>();
  w.target_slope = r.target_slope.mutable_data_ptr<float>();
  w.hardest_slot = r.hardest_slot.mutable_data_ptr<int64_t>(), w.negatives = r.negatives.mutable_data_ptr<int64_t>();
  w.beats_target = r.beats_target.mutable_data_ptr<int64_t>();
  static const int processors = [] {
    int device, count;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }();
  const SweepPlan plan = plan_of(p, processors);
  const at::Tensor memory = at::empty({lay_out(p, plan, nullptr, w)}, floats.dtype(at::kByte));
  lay_out(p, plan, reinterpret_cast<char*>(memory.mutable_data_ptr()), w);
  Gpu gpu{c10::cuda::getCurrentCUDAStream()};
  margin_softmax(gpu, p, plan, w);
  return r;
}

}  // namespace sst_fast::cuda
