// What Hopper (sm_90a) offers beyond CUDA C++, as few PTX instructions under their own names: barriers in shared
// memory, loads of whole tiles by the copy engine, products of a warpgroup. PTX ISA 8.0, sections on mbarrier,
// cp.async.bulk.tensor and wgmma.
#ifndef SST_FAST_SM90_H  // not `pragma once`: tests/sm90_on_cpu.cpp puts another file in its place
#define SST_FAST_SM90_H

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace sst_fast::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* shared_memory() {  // of this block, as much as it was launched with
  extern __shared__ unsigned char raw[];
  return raw;
}

// Waits for so many threads of the block, at barrier 1: the others go on.
template <int threads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}

// Tells the compiler that all threads of the warp have the same number.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// 2^x with an error of 2 ulp; what is below 2^-126 becomes 0.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- barriers: a phase ends when all arrivals and all announced bytes are there; its parity alternates from 0
// ----------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine and to other blocks of the cluster, before these are told to
// begin.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the same barrier of a block of the cluster. As CUTLASS does, without `.release.cluster`, which becomes a memory
// barrier of the whole device: what went before are products that this thread has awaited.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Without `.acquire.cluster`, which would discard the first-level cache.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// What this thread wrote to shared memory becomes visible to products and the copy engine.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- clusters
// -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t block_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- tiles
// ----------------------------------------------------------------------------------------------------------------

// A box of the tensor to shared memory, of every block in `blocks` (a bit each) at the same place; its bytes are
// counted by the barrier.
__device__ __forceinline__ void load_tile(
    void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, int panel, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(panel),
      "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void load_tile(
    void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, int panel) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(panel)
      : "memory");
}

// --- products of a warpgroup
// --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving accumulators while products are under way.
template <int count>
__device__ __forceinline__ void hold(float (&o)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(o[i])::"memory");
}

template <int count>
__device__ __forceinline__ void wait_for_products(float (&o)[count]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(o);
}

// Four matrices of 8 x 8 numbers of 16 bits; lane l says where row l % 8 of matrix l / 8 begins, 16 bytes. A thread
// holds of matrix m, in words[m], row lane / 4, columns 2 * (lane % 4) + {0, 1}.
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// clang-format off
#define SST_LIST_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SST_LIST_64 \
  SST_LIST_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SST_LIST_128 \
  SST_LIST_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SST_REGISTERS_4(o, i) "+f"(o[i]), "+f"(o[(i) + 1]), "+f"(o[(i) + 2]), "+f"(o[(i) + 3])
#define SST_REGISTERS_16(o, i) SST_REGISTERS_4(o, i), SST_REGISTERS_4(o, (i) + 4), SST_REGISTERS_4(o, (i) + 8), SST_REGISTERS_4(o, (i) + 12)
#define SST_REGISTERS_32(o, i) SST_REGISTERS_16(o, i), SST_REGISTERS_16(o, (i) + 16)
#define SST_REGISTERS_64(o, i) SST_REGISTERS_32(o, i), SST_REGISTERS_32(o, (i) + 32)
#define SST_REGISTERS_128(o, i) SST_REGISTERS_64(o, i), SST_REGISTERS_64(o, (i) + 64)
// a, b, add, columns: the operands after `count` accumulators.
#define SST_WGMMA(count, columns, type, a, b, add, turned)                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\n"                                          \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                           \
               " {" SST_LIST_##count "}, %" #a ", %" #b ", p, 1, 1, 0, %" #turned ";\n}"                       \
               : SST_REGISTERS_##count(o, 0)                                                                  \
               : "l"(left), "l"(right), "r"(int(accumulate)), "n"(int(kColumns)))
#define SST_WGMMA_OF_BYTES(count, columns, a, b, add)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\n"                                          \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3"                                \
               " {" SST_LIST_##count "}, %" #a ", %" #b ", p, 1, 1;\n}"                                        \
               : SST_REGISTERS_##count(o, 0)                                                                  \
               : "l"(left), "l"(right), "r"(int(accumulate)))
// clang-format on

// o [64, 2 * count] = left [64, k] * right [k, 2 * count] (+ o), k = 16 or, of float8, 32: begun, not awaited. T:
// __nv_bfloat16, __half or __nv_fp8_e4m3. kColumns: `right` is a columns_operand. A thread holds of rows g = 16 * warp
// + lane / 4 and g + 8 the columns 8 j + 2
// * (lane % 4) + {0, 1}, as o[4 j + {0, 1}] and o[4 j + {2, 3}].
template <typename T, bool kColumns, int count>
__device__ __forceinline__ void wgmma(float (&o)[count], uint64_t left, uint64_t right, bool accumulate) {
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>, bytes = std::is_same_v<T, __nv_fp8_e4m3>;
  static_assert(bf16 || std::is_same_v<T, __half> || (bytes && !kColumns));
  static_assert(count == 32 || count == 64 || count == 128);
  if constexpr (count == 32 && bytes) SST_WGMMA_OF_BYTES(32, 64, 32, 33, 34);
  if constexpr (count == 32 && bf16) SST_WGMMA(32, 64, "bf16", 32, 33, 34, 35);
  if constexpr (count == 32 && !bf16 && !bytes) SST_WGMMA(32, 64, "f16", 32, 33, 34, 35);
  if constexpr (count == 64 && bytes) SST_WGMMA_OF_BYTES(64, 128, 64, 65, 66);
  if constexpr (count == 64 && bf16) SST_WGMMA(64, 128, "bf16", 64, 65, 66, 67);
  if constexpr (count == 64 && !bf16 && !bytes) SST_WGMMA(64, 128, "f16", 64, 65, 66, 67);
  if constexpr (count == 128 && bytes) SST_WGMMA_OF_BYTES(128, 256, 128, 129, 130);
  if constexpr (count == 128 && bf16) SST_WGMMA(128, 256, "bf16", 128, 129, 130, 131);
  if constexpr (count == 128 && !bf16 && !bytes) SST_WGMMA(128, 256, "f16", 128, 129, 130, 131);
}

// How many registers each thread of this warpgroup may use from here on.
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace sst_fast::cuda::sm90

#endif
