#include <torch/extension.h>

#include "ops.h"

PYBIND11_MODULE(_C, m) {
  using namespace sst_fast;
  namespace py = pybind11;
  m.doc() = "Compiled operations of sst_fast; call them through sst_fast, which checks arguments.";
  const auto free_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_margin_softmax", &cpu::margin_softmax, free_gil);
  m.def("cpu_enqueue", &cpu::enqueue, free_gil);
  m.def("cpu_dequeue", &cpu::dequeue, free_gil);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("target_margin", [](int64_t kind, const std::vector<double>& parameters, double a) {
    const auto psi = target_margin<double>(make_margin(kind, parameters), a);
    return std::pair(psi.value, psi.slope);
  });
#ifdef SST_FAST_CUDA
  m.def("cuda_enqueue", &cuda::enqueue, free_gil);
  m.def("cuda_dequeue", &cuda::dequeue, free_gil);
  m.attr("cuda") = SST_FAST_CUDA;
#else
  m.attr("cuda") = py::none();
#endif
  m.attr("kinds") = kKinds;
}
