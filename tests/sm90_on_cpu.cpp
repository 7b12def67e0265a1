// Runs the code of csrc/cuda/*_sm90.h on the CPU: every CUDA thread is a fiber here, and what sm90.h takes from the GPU
// is done as the PTX ISA describes it, as late or as early as it allows. No proof of the instructions themselves; but
// masks, index arithmetic, barriers and sums are the kernels' own. Built and called by tests/test_sweep_sm90.py.
//
// What it is strict about: products run when they are awaited (or, in some warps, at once), and until then their sums
// are NaN; copies arrive late, in any order, and their places hold NaN from the moment they are asked for; a thread
// reads a copy's place only after it has itself seen the copy's barrier; threads run in random order, some warps much
// slower than others; and no block ends while a copy or an arrival is on its way to it.
#include <setjmp.h>
#include <ucontext.h>
#define SST_FAST_SM90_H
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "tiles.h"

#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __forceinline__
#define __forceinline__ inline
#endif

using std::min;

struct CUtensorMap {  // rows of so many bytes; a box has 64 rows and `panels` times 128 bytes of each
  const unsigned char* data;
  int64_t rows, bytes;
  int panels;
};

namespace {

constexpr int kFirst = 1040;  // shared memory does not begin at a multiple of 1,024
constexpr size_t kStack = 256 << 10;

enum class Digits { bf16, f16, e4m3 };

struct Product {
  uint64_t left, right;
  bool columns, accumulate;
  Digits digits;
};

struct Index {
  int x, y;
};

struct Block;

struct Fiber {
  ucontext_t begin;
  jmp_buf at;
  bool begun = false, done = false;
  Block* block;
  int number, collectives = 0;  // in its block; of its warp, so far
  Index thread;
  // Products: begun_products .. end_products .. awaited.
  bool fenced = false, committed = false, unpublished = false;
  std::vector<Product> products;
  float *sums = nullptr, hidden[128];
  int count = 0;
};

struct Launch* launch = nullptr;
Fiber* me = nullptr;

[[noreturn]] void fault(const std::string& what);
void yield();
void wake(Fiber* fiber);
uint32_t chance();

struct Gate {  // lets its fibers go on once all have come
  int all, come = 0;
  std::vector<Fiber*> waiting;
  template <typename F>
  void pass(F last) {
    if (++come == all) {
      last();
      come = 0;
      for (Fiber* fiber : waiting) wake(fiber);
      waiting.clear();
    } else {
      waiting.push_back(me);
      yield();
    }
  }
  void pass() {
    pass([] {});
  }
};

struct Barrier {
  int64_t arrivals, pending, bytes = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
  std::vector<uint64_t> seen;  // by each thread of the block: phases that it knows to be over

  Barrier(int64_t arrivals, int threads) : arrivals(arrivals), pending(arrivals), seen(threads) {}
  void add(int64_t arrived, int64_t expected) {
    pending -= arrived, bytes += expected;
    if (pending < 0) fault("more arrivals at a barrier than it expects");
    if (pending > 0 || bytes != 0) return;
    pending = arrivals, phase++;
    for (Fiber* fiber : waiting) wake(fiber);
    waiting.clear();
  }
  void wait(uint32_t parity);
};

struct Warp {
  Gate gate{32, 0, {}};
  uint64_t values[2][32];
  bool slow, late;
};

struct Block {
  std::vector<unsigned char> memory;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  Gate all, consumers{256, 0, {}};
  std::vector<std::unique_ptr<Barrier>> barriers;
  struct Arrival {  // which copy has written 1,024 bytes: seen once the barrier's phase is over
    Barrier* barrier = nullptr;
    uint64_t phase = 0;
  };
  std::vector<Arrival> written;
  Index at;
  uint32_t rank;
  int running;

  Block(size_t bytes, int threads, Index at, uint32_t rank)
      : memory(kFirst + bytes, 0xff),
        warps(threads / 32),
        fibers(threads),
        all{threads, 0, {}},
        written((kFirst + bytes) / 1024 + 1),
        at(at),
        rank(rank),
        running(threads) {
    for (Warp& warp : warps) warp.slow = chance() % 4 == 0, warp.late = chance() % 4 != 0;
  }
};

struct Copy {
  Block* block;
  uint32_t to, barrier;  // addresses
  CUtensorMap map;
  int row, panel;
  uint64_t due;
};

struct Launch {
  std::mt19937 random;
  Index grid, threads;
  std::vector<std::unique_ptr<Block>> cluster;
  std::unique_ptr<Gate> together;
  std::vector<Fiber*> ready;
  std::vector<Copy> copies;
  std::function<void()> kernel;
  uint64_t steps = 0;
  jmp_buf scheduler;
  std::string problem;
};

uint32_t chance() { return launch->random(); }
void wake(Fiber* fiber) { launch->ready.push_back(fiber); }
void yield() {
  if (!_setjmp(me->at)) _longjmp(launch->scheduler, 1);
}
void fault(const std::string& what) {
  launch->problem = what + ", thread " + std::to_string(me ? me->number : -1);
  _longjmp(launch->scheduler, 2);
}
void Barrier::wait(uint32_t parity) {
  while ((phase & 1) == parity) {
    waiting.push_back(me);
    yield();
  }
  seen[me->number] = phase;
}

Warp& warp() { return me->block->warps[me->number / 32]; }
int lane() { return me->number % 32; }

// 128-byte mode: bits 4 to 6 of an address are exclusive-ored with bits 7 to 9; 64-byte mode: 4 and 5 with 7 and 8.
uint32_t permuted(uint32_t address, bool narrow = false) { return address ^ (address >> 7 & (narrow ? 3 : 7)) << 4; }

Barrier& barrier_at(Block& block, uint32_t address) {
  uint64_t word;
  std::memcpy(&word, &block.memory[address], 8);
  if (word == ~uint64_t(0)) fault("a barrier is used before it is initialised");
  return *reinterpret_cast<Barrier*>(word);
}

void land(const Copy& copy) {
  Block& block = *copy.block;
  Barrier& barrier = barrier_at(block, copy.barrier);
  for (int p = 0; p < copy.map.panels; p++)
    for (int r = 0; r < 64; r++)
      for (int c = 0; c < 128; c += 16) {
        const int64_t row = copy.row + r, column = (copy.panel + p) * 128 + c;
        unsigned char* to = &block.memory[permuted(copy.to + p * 8192 + r * 128 + c)];
        if (row < copy.map.rows && column < copy.map.bytes)
          std::memcpy(to, copy.map.data + row * copy.map.bytes + column, 16);
        else
          std::memset(to, 0, 16);
      }
  for (int at = 0; at < copy.map.panels * 8; at++) block.written[copy.to / 1024 + at] = {&barrier, barrier.phase + 1};
  barrier.add(0, -int64_t(copy.map.panels) * 8192);
}

// --- products --------------------------------------------------------------------------------------------------------

const float* table_of(Digits digits) {
  static const auto tables = [] {
    std::vector<std::vector<float>> all(3, std::vector<float>(65536));
    for (int i = 0; i < 65536; i++) {
      const auto word = static_cast<unsigned short>(i);
      all[0][i] = static_cast<float>(__nv_bfloat16(__nv_bfloat16_raw{word}));
      all[1][i] = static_cast<float>(__half(__half_raw{word}));
      __nv_fp8_e4m3 byte;
      byte.__x = static_cast<unsigned char>(i);
      all[2][i] = static_cast<float>(byte);
    }
    return all;
  }();
  return tables[int(digits)].data();
}

struct Operand {
  uint32_t start, leading, stride;
  bool narrow, columns;
  Operand(uint64_t d, bool columns)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        narrow(d >> 62 == 2),
        columns(columns) {}
  uint32_t address(int outer, int k, int size) const {
    return columns ? start + outer / 64 * leading + outer % 64 * 2 + k / 8 * stride + k % 8 * 128
                   : start + outer / 8 * stride + outer % 8 * (narrow ? 64 : 128) + size * k;
  }
  void read(const Block& block, Digits digits, int first, int count, int depth, float* to) const {  // [depth][count]
    const float* table = table_of(digits);
    for (int k = 0; k < depth; k++)
      for (int n = 0; n < count; n++) {
        const unsigned char* at = &block.memory[permuted(address(first + n, k, 32 / depth), narrow)];
        to[k * count + n] = table[digits == Digits::e4m3 ? at[0] : at[0] | at[1] << 8];
      }
  }
  void check(int outer) const {  // that this thread has seen arrive what it is about to read
    for (int n = 0; n < outer; n += 8) {
      const auto& written = me->block->written[permuted(address(n, 0, 1), narrow) / 1024];
      if (written.barrier && written.barrier->seen[me->number] < written.phase)
        fault("a product begins before its operand's barrier has been awaited");
    }
  }
};

__attribute__((optimize("O3"))) void multiply(
    const float* a, const float* b, float* sums, int count, int depth, bool bytes) {
  for (int r = 0; r < 16; r++) {
    float added[256] = {};
    for (int k = 0; k < depth; k++)
      for (int n = 0; n < count; n++) added[n] += a[k * 16 + r] * b[k * count + n];
    for (int n = 0; n < count; n++) {
      sums[r * count + n] += added[n];
      if (!bytes) continue;  // Hopper adds these with 13 bits
      uint32_t bits;
      std::memcpy(&bits, &sums[r * count + n], 4);
      bits &= ~0x3ffu;
      std::memcpy(&sums[r * count + n], &bits, 4);
    }
  }
}

// All that the warp has begun.
void run_products() {
  Block& block = *me->block;
  Fiber* lanes = &block.fibers[me->number / 32 * 32];
  const int columns = 2 * lanes->count, first_row = me->number / 32 % 4 * 16;
  std::vector<float> sums(16 * columns), b(32 * columns);
  float a[32 * 16];
  const auto exchange = [&](bool in) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < lanes[l].count; i++) {
        float& sum = sums[(l / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + 2 * (l % 4) + i % 2];
        in ? sum = lanes[l].hidden[i] : lanes[l].hidden[i] = sum;
      }
  };
  exchange(true);
  for (const Product& p : lanes->products) {
    const bool bytes = p.digits == Digits::e4m3;
    const int depth = bytes ? 32 : 16;
    if (!p.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
    Operand(p.left, false).read(block, p.digits, first_row, 16, depth, a);
    Operand(p.right, p.columns).read(block, p.digits, 0, columns, depth, b.data());
    multiply(a, b.data(), sums.data(), columns, depth, bytes);
  }
  exchange(false);
  for (int l = 0; l < 32; l++) lanes[l].products.clear();
}

// --- CUDA C++ --------------------------------------------------------------------------------------------------------

#define threadIdx me->thread
#define blockIdx me->block->at
#define blockDim launch->threads
#define gridDim launch->grid

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
int __popc(uint32_t bits) { return __builtin_popcount(bits); }
void __threadfence() {}
unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }
void __syncthreads() { me->block->all.pass(); }
void __syncwarp() { warp().gate.pass(); }

// Every lane's value, as `read` wants it: the next collective of the warp uses the other half of `values`.
template <typename T, typename F>
auto exchanged(T value, F read) {
  static_assert(sizeof(T) <= 8);
  uint64_t* values = warp().values[me->collectives++ % 2];
  std::memcpy(&values[lane()], &value, sizeof(T));
  warp().gate.pass();
  return read([&](int of) {
    T other;
    std::memcpy(static_cast<void*>(&other), &values[of], sizeof(T));
    return other;
  });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return exchanged(value, [&](auto at) { return at(lane() ^ step); });
}
template <typename T>
T __shfl_sync(unsigned, T value, int of) {
  return exchanged(value, [&](auto at) { return at(of); });
}
bool __any_sync(unsigned, bool value) {
  return exchanged(value, [](auto at) {
    bool any = false;
    for (int of = 0; of < 32; of++) any |= at(of);
    return any;
  });
}

}  // namespace

namespace sst_fast::cuda::sm90 {

inline unsigned char* shared_memory() { return me->block->memory.data() + kFirst; }
inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const unsigned char*>(pointer) - me->block->memory.data());
}
inline int uniform(int x) { return __shfl_sync(0, x, 0); }
inline float power_of_two(float x) { return std::exp2(x); }
template <int threads>
void sync_threads() {
  static_assert(threads == 256);
  me->block->consumers.pass();
}
template <int count>
void more_registers() {}
template <int count>
void fewer_registers() {}

inline Block& block_of(uint32_t rank) {
  Block& block = *launch->cluster[rank];
  if (block.running == 0) fault("something is sent to a block that has ended");
  return block;
}
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  auto& barriers = me->block->barriers;
  barriers.push_back(std::make_unique<Barrier>(arrivals, int(me->block->fibers.size())));
  *barrier = reinterpret_cast<uint64_t>(barriers.back().get());
}
inline void barrier_init_done() {}
inline void arrive_at(uint64_t* barrier, uint32_t block) {
  barrier_at(block_of(block), shared_address(barrier)).add(1, 0);
}
inline void arrive(uint64_t* barrier) {
  if (me->unpublished) fault("what was written for products is announced before it is published");
  arrive_at(barrier, me->block->rank);
}
inline void arrive_and_expect(uint64_t* barrier, uint32_t bytes) {
  barrier_at(*me->block, shared_address(barrier)).add(1, bytes);
}
inline void wait(uint64_t* barrier, uint32_t parity) { barrier_at(*me->block, shared_address(barrier)).wait(parity); }
inline void publish() { me->unpublished = false; }
inline uint32_t block_in_cluster() { return me->block->rank; }
inline void sync_cluster() { launch->together->pass(); }

inline void load_tile(
    void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, int panel, uint16_t blocks) {
  if (column != 0 || shared_address(to) % 1024) fault("a copy to where its permutation does not begin");
  for (uint32_t rank = 0; rank < launch->cluster.size(); rank++) {
    if (!(blocks >> rank & 1)) continue;
    Block& block = block_of(rank);
    std::fill_n(&block.memory[shared_address(to)], map.panels * 8192, 0xff);
    for (int at = 0; at < map.panels * 8; at++) block.written[shared_address(to) / 1024 + at] = {};
    const uint64_t due = launch->steps + (uint64_t(1) << chance() % 14);
    launch->copies.push_back({&block, shared_address(to), shared_address(barrier), map, row, panel, due});
  }
}
inline void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, int panel) {
  load_tile(to, map, barrier, column, row, panel, uint16_t(1u << me->block->rank));
}

template <int count>
void hold(float (&)[count]) {}
inline void begin_products() { me->fenced = true; }

template <typename T, bool kColumns, int count>
void wgmma(float (&o)[count], uint64_t left, uint64_t right, bool accumulate) {
  constexpr Digits digits = std::is_same_v<T, __nv_bfloat16> ? Digits::bf16
                            : std::is_same_v<T, __half>      ? Digits::f16
                                                             : Digits::e4m3;
  static_assert(digits != Digits::e4m3 || !kColumns);
  if (!me->fenced) fault("products without a fence");
  if (lane() == 0) Operand(left, false).check(64), Operand(right, kColumns).check(2 * count);
  if (me->products.empty()) {
    me->sums = o, me->count = count;
    std::copy_n(o, count, me->hidden);
    std::fill_n(o, count, std::numeric_limits<float>::quiet_NaN());
  } else if (me->sums != o) {
    fault("products for two sums in one group");
  }
  me->products.push_back({left, right, kColumns, accumulate, digits});
}

inline void end_products() {
  me->fenced = false, me->committed = true;
  if (!warp().late) warp().gate.pass(run_products);
}

template <int count>
void wait_for_products(float (&o)[count]) {
  if (!me->committed || me->sums != o) fault("products are awaited that were not begun");
  if (warp().late) warp().gate.pass(run_products);
  std::copy_n(me->hidden, count, o);
  me->committed = false;
}

inline void store_matrices(uint32_t to, const uint32_t (&words)[4]) {
  if (to % 16) fault("a matrix's row at no multiple of 16 bytes");
  me->unpublished = true;
  exchanged(to, [&](auto row) {
    for (int m = 0; m < 4; m++)
      std::memcpy(&me->block->memory[row(8 * m + lane() / 4) + 4 * (lane() % 4)], &words[m], 4);
    return 0;
  });
}

}  // namespace sst_fast::cuda::sm90

#include "cuda/margin_softmax_sm90.h"

namespace sst_fast::cuda {

// Two libraries, to be compiled side by side, and not of every instance: all families of margins at D = 128 with
// numbers of 16 bits, of the others those whose loops differ.
template <typename Queue>
constexpr bool kHere = SST_PART == 0 ? std::is_same_v<Queue, __nv_bfloat16> || kConverts<Queue>
                                     : std::is_same_v<Queue, __half> || kBytes<Queue>;

template <typename Queue>
SweepKernel sweep_kernel_of(int D, Kind kind, bool moment) {
  return with_phi(kind, [&](auto phi) -> SweepKernel {
    using Phi = decltype(phi);
    const auto of = [](auto dim, auto with_moment) -> SweepKernel {
      constexpr int dims = decltype(dim)::value;
      return {
          sweep_kernel<Queue, dims, Phi, decltype(with_moment)::value>, sizeof(Shared<Element<Queue>, dims>) + 1024};
    };
    const std::bool_constant<true> yes;
    const std::bool_constant<false> no;
    if constexpr (kHere<Queue>) {
      constexpr bool bytes = kBytes<Queue>, plain = Phi::kIdentity;
      if constexpr (!bytes && (plain || !kConverts<Queue>))
        if (D == 128)
          return moment ? of(std::integral_constant<int, 128>(), yes) : of(std::integral_constant<int, 128>(), no);
      if constexpr (plain || (bytes && Phi::kHard))
        if (D == 256 && moment) return of(std::integral_constant<int, 256>(), yes);
      if constexpr (bytes && Phi::kHard)
        if (D == 256) return of(std::integral_constant<int, 256>(), no);
      if constexpr (plain)
        if (D == 512 && moment) return of(std::integral_constant<int, 512>(), yes);
    }
    return {};
  });
}

}  // namespace sst_fast::cuda

namespace {

using namespace sst_fast;
using namespace sst_fast::cuda;

void begin_fiber() {
  launch->kernel();
  me->done = true;
  if (--me->block->running == 0)
    for (const Copy& copy : launch->copies)
      if (copy.block == me->block) fault("a block ends while a copy into it is on its way");
  _longjmp(launch->scheduler, 1);
}

// Until every thread of the cluster has ended.
void run_cluster(std::vector<std::unique_ptr<char[]>>& stacks) {
  size_t left = 0;
  for (auto& block : launch->cluster)
    for (Fiber& fiber : block->fibers) {
      if (left == stacks.size()) stacks.emplace_back(new char[kStack]);
      getcontext(&fiber.begin);
      fiber.begin.uc_stack.ss_sp = stacks[left++].get();
      fiber.begin.uc_stack.ss_size = kStack;
      fiber.begin.uc_link = nullptr;
      makecontext(&fiber.begin, begin_fiber, 0);
      wake(&fiber);
    }
  auto& ready = launch->ready;
  auto& copies = launch->copies;
  volatile size_t running = left;
  while (running) {
    launch->steps++;
    if (!copies.empty()) {
      const auto next = std::min_element(copies.begin(), copies.end(), [](auto& a, auto& b) { return a.due < b.due; });
      if (next->due <= launch->steps || ready.empty()) {
        const Copy copy = *next;
        copies.erase(next);
        me = nullptr;
        if (_setjmp(launch->scheduler) == 0) land(copy);
        if (!launch->problem.empty()) return;
        continue;
      }
    }
    if (ready.empty()) {
      launch->problem = "no thread can go on";
      return;
    }
    size_t at = 0;
    for (int tries = 0; tries < 6; tries++) {
      at = chance() % ready.size();
      if (!ready[at]->block->warps[ready[at]->number / 32].slow) break;
    }
    me = ready[at];
    ready[at] = ready.back();
    ready.pop_back();
    const int back = _setjmp(launch->scheduler);
    if (back == 0) {
      if (me->begun) _longjmp(me->at, 1);
      me->begun = true;
      setcontext(&me->begin);
    }
    if (back == 2) return;
    if (me->done) running = running - 1;
  }
}

struct Threads {  // in the place of a GPU
  uint64_t seed;
  std::string problem;
  std::vector<std::unique_ptr<char[]>> stacks;

  template <typename... Parameters, typename... Values>
  void launch(void (*kernel)(Parameters...), Size grid, Size threads, int bytes, int cluster, const Values&... values) {
    if (!problem.empty()) return;
    if (!kernel) {
      problem = "this kernel is not compiled";
      return;
    }
    Launch now;
    ::launch = &now;
    now.random.seed(seed++);
    now.grid = {grid.x, grid.y}, now.threads = {threads.x, threads.y};
    now.kernel = [&] { kernel(values...); };
    const int count = threads.x * threads.y;
    for (int y = 0; y < grid.y && problem.empty(); y++)
      for (int x = 0; x < grid.x && problem.empty(); x += cluster) {
        now.cluster.clear();
        for (int rank = 0; rank < cluster; rank++)
          now.cluster.push_back(std::make_unique<Block>(bytes, count, Index{x + rank, y}, rank));
        now.together.reset(new Gate{cluster * count, 0, {}});
        for (auto& block : now.cluster)
          for (int t = 0; t < count; t++) {
            Fiber& fiber = block->fibers[t];
            fiber.block = block.get(), fiber.number = t, fiber.thread = {t % threads.x, t / threads.x};
          }
        run_cluster(stacks);
        problem = now.problem;
      }
    ::launch = nullptr;
  }

  CUtensorMap describe(const void* rows, Number type, int64_t count, int D, int parts) {
    const int64_t bytes = bytes_of(type) * D;
    if (reinterpret_cast<uintptr_t>(rows) % 16) problem = "rows at no multiple of 16 bytes";
    return {static_cast<const unsigned char*>(rows), count, bytes, int(bytes / kPanelBytes / parts)};
  }
};

}  // namespace

// Pointers, integers and numbers in the order in which they are taken here. Null, or what went wrong.
extern "C" const char* margin_softmax(
    void* const* pointers, const int64_t* integers, const double* numbers, uint64_t seed) {
  Problem p{};
  Workspace w{};
  const auto next = [&](auto*& pointer) {
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(*pointers++);
  };
  const auto number = [&](auto& value) { value = static_cast<std::remove_reference_t<decltype(value)>>(*integers++); };
  next(p.embedding), next(p.prototypes), next(p.window), next(p.weight), next(p.target), next(p.identity);
  next(p.slot_identity), next(p.window_identity), next(p.window_start), next(p.margin_rows), next(p.scale_rows);
  next(w.loss), next(w.lse), next(w.target_cosine), next(w.hardest_cosine), next(w.hardest_slot);
  next(w.beats_target), next(w.residual), next(w.row_weight), next(w.gradient), next(w.negatives);
  next(w.target_slope);
  int processors;
  number(p.N), number(p.K), number(p.D), number(p.B), number(p.groups), number(p.embedding_type);
  number(p.queue_type), number(p.weight_type), number(p.margin_parameters), number(p.margin.kind);
  number(p.ignore_index), number(p.mean), number(p.reduced), number(p.mask_empty), number(p.straight);
  number(p.float8_products), number(p.need_gradient), number(processors);
  p.scale = numbers[0];
  std::copy_n(numbers + 1, kParameters, p.margin.p);

  static std::string problem;
  const SweepPlan plan = plan_of(p, processors);
  std::vector<char> memory(lay_out(p, plan, nullptr, w) + 256, char(0xff));
  lay_out(p, plan, memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 255), w);
  Threads threads{seed, "", {}};
  margin_softmax(threads, p, plan, w);
  problem = threads.problem;
  return problem.empty() ? nullptr : problem.c_str();
}
