// How work is shared out over threads: at::parallel_for. ThreadSanitizer does not see libgomp's threads wait for each
// other, so under it (make sanitize) every loop runs on threads of the standard library, in as many parts as there may
// be.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace sst_fast::cpu {

#ifdef __SANITIZE_THREAD__
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  constexpr int64_t most = 4;
  const int64_t parts = std::min(most, end - begin);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; i++)
    threads.emplace_back([&f, first = begin + (end - begin) * i / parts,
                          last = begin + (end - begin) * (i + 1) / parts] { f(first, last); });
  for (auto& thread : threads) thread.join();
}
#else
using at::parallel_for;
#endif

}  // namespace sst_fast::cpu
