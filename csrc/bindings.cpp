// The extension module sst_fast._C: loading it registers the operators of operators.cpp; what it offers to Python by
// name is for tests and for sst_fast.backends.
#include <torch/csrc/utils/pybind.h>

#include "arguments.h"
#include "ops.h"
#include "tiles.h"

PYBIND11_MODULE(_C, m) {
  using namespace sst_fast;
  namespace py = pybind11;
  m.doc() = "Registers the operators torch.ops.sst_fast.*; call them through sst_fast, which checks arguments.";
  m.attr("arguments") = argument_names();
  m.def("instruction_set", &cpu::instruction_set);
  // The operators by a call that reads Python's arguments itself: the general one takes several times as long.
  // torch.compile traces torch.ops.sst_fast alone.
  m.def("margin_softmax", &call_margin_softmax);
  m.def("window", &call_window);
  m.def("enqueue", &call_enqueue);
  // The formulas of margin.h alone, for tests: (psi, psi', phi, phi') at a target cosine a with its sine, and another
  // cosine c.
  m.def(
      "margin",
      [](int64_t kind, const std::vector<double>& parameters, double a, double sine, double c, double hard_mean) {
        TORCH_CHECK(kind >= 0 && kind < kKinds && parameters.size() <= kParameters, "no such margin");
        Margin margin{static_cast<Kind>(kind), {}};
        std::copy(parameters.begin(), parameters.end(), margin.p);
        const auto psi = target_margin<double>(margin, a, sine, hard_mean);
        const auto row = phi_row<double>(margin, a, sine);
        const auto phi = with_phi(margin.kind, [&](auto f) {
          double e = 0;
          if constexpr (f.kExp) e = std::exp(f.exponent(c, row.at));
          return std::pair(f.value(c, row.at, e), f.slope(c, row.at, e));
        });
        return std::tuple(psi.value, psi.slope, phi.first, phi.second);
      });
  // The index arithmetic of tiles.h, for tests.
  m.def("tile", [](int number, int last, int start, int K, int B) {
    const SlotTile tile(number, last, start, K, B);
    std::vector<int> slots, columns;
    for (int j = 0; j < kSlots; j++) slots.push_back(tile.slot(j)), columns.push_back(tile.column(slots.back()));
    return std::tuple(tile.of_window, tile.first, slots, columns, tile.whole());
  });
  m.def("plan_sweep", [](int rows_in_group, int groups, int K, int B, int D, int processors, bool can_share) {
    const SweepPlan plan = plan_sweep(rows_in_group, groups, K, B, D, processors, can_share);
    return std::tuple(plan.splits, plan.tiles_in_split, plan.cluster, plan.blocks_in_group);
  });
  m.def("swizzled", &swizzled);
  m.def("narrow_swizzled", &narrow_swizzled);
  m.def("rows_operand", &rows_operand);
  m.def("narrow_rows_operand", &narrow_rows_operand);
  m.def("columns_operand", &columns_operand);
#ifdef SST_FAST_CUDA
  m.attr("cuda") = SST_FAST_CUDA;
  m.attr("sm90a") = bool(SST_FAST_SM90A);
#else
  m.attr("cuda") = py::none();
#endif
#define SST_KIND(name) #name,
  m.attr("kinds") = std::vector<std::string>{SST_KINDS(SST_KIND)};
#undef SST_KIND
}
