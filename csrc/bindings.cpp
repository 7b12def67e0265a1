#include <torch/extension.h>
#include <torch/library.h>

#include "ops.h"
#include "tiles.h"

// The queue's operators, for Python and, through PyTorch's dispatcher, for C++ programs. sst_fast/queue.py checks
// arguments.
TORCH_LIBRARY_FRAGMENT(sst_fast, m) {
  m.def(
      "enqueue(Tensor features, Tensor identities, Tensor(a!) queue, Tensor(b!) queue_identities, Tensor(c!) state) "
      "-> ()");
  m.def("dequeue(int count, Tensor(a!) queue_identities, Tensor(b!) state) -> Tensor");
}
TORCH_LIBRARY_IMPL(sst_fast, CPU, m) {
  m.impl("enqueue", &sst_fast::cpu::enqueue);
  m.impl("dequeue", &sst_fast::cpu::dequeue);
}
#ifdef SST_FAST_CUDA
TORCH_LIBRARY_IMPL(sst_fast, CUDA, m) {
  m.impl("enqueue", &sst_fast::cuda::enqueue);
  m.impl("dequeue", &sst_fast::cuda::dequeue);
}
#endif

PYBIND11_MODULE(_C, m) {
  using namespace sst_fast;
  namespace py = pybind11;
  m.doc() = "Compiled operations of sst_fast; call them through sst_fast, which checks arguments.";
  const auto free_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_margin_softmax", &cpu::margin_softmax, free_gil);
  m.def("cpu_prototype_gradient", &cpu::prototype_gradient, free_gil);
  m.def("instruction_set", &cpu::instruction_set);
  // The formulas of margin.h alone, for tests: (psi, psi', phi, phi') at a target cosine a and another cosine c.
  m.def("margin", [](int64_t kind, const std::vector<double>& parameters, double a, double c, double hard_mean) {
    const Margin margin = make_margin(kind, parameters);
    const auto psi = target_margin<double>(margin, a, hard_mean);
    const auto row = phi_row<double>(margin, a);
    const auto phi = with_phi(margin.kind, [&](auto f) {
      double e = 0;
      if constexpr (f.kExp) e = std::exp(f.exponent(c, row.at));
      return std::pair(f.value(c, row.at, e), f.slope(c, row.at, e));
    });
    return std::tuple(psi.value, psi.slope, phi.first, phi.second);
  });
  // The index arithmetic of tiles.h, for tests.
  m.def("tile", [](int number, int last, int start, int K, int B) {
    const Tile tile(number, last, start, K, B);
    std::vector<int> slots, columns;
    for (int j = 0; j < kSlots; j++) slots.push_back(tile.slot(j)), columns.push_back(tile.column(slots.back()));
    return std::tuple(tile.of_window, tile.first, slots, columns, tile.whole());
  });
  m.def("swizzled", &swizzled);
  m.def("narrow_swizzled", &narrow_swizzled);
  m.def("rows_operand", &rows_operand);
  m.def("narrow_rows_operand", &narrow_rows_operand);
  m.def("columns_operand", &columns_operand);
#ifdef SST_FAST_CUDA
  m.def("cuda_sweep", &cuda::sweep, free_gil);
  m.attr("cuda") = SST_FAST_CUDA;
  m.attr("sm90a") = bool(SST_FAST_SM90A);
#else
  m.attr("cuda") = py::none();
#endif
  m.attr("kinds") = kKinds;
}
