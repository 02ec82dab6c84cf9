// hwprune._cpp: addresses and sizes in, nothing out. Checks and allocation stand in hwprune/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/ratio_update.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

void bind_masked_conv(py::module_& module);

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void ratio_forward(Address theta, Address importance, Address offsets, Address uniforms, Address log_threshold,
                   Address probability, Address mask, int64_t groups, double temperature, std::uint64_t seed,
                   int64_t threads) {
  hwprune::ratio_forward({pointer<const float>(theta), pointer<const float>(importance),
                          pointer<const int64_t>(offsets), pointer<const float>(uniforms),
                          pointer<float>(log_threshold), pointer<float>(probability), pointer<float>(mask), groups,
                          temperature, seed, threads});
}

void ratio_step(Address grad_mask, Address probability, Address offsets, Address cost_grad, Address theta,
                Address exp_avg, Address exp_avg_sq, Address ratio_grad, int64_t groups, double multiplier, double cut,
                double lr, double beta1, double beta2, double eps, int64_t step, int64_t threads) {
  hwprune::ratio_step({pointer<const float>(grad_mask),
                       pointer<const float>(probability),
                       pointer<const int64_t>(offsets),
                       pointer<const float>(cost_grad),
                       pointer<float>(theta),
                       pointer<float>(exp_avg),
                       pointer<float>(exp_avg_sq),
                       pointer<float>(ratio_grad),
                       groups,
                       multiplier,
                       cut,
                       {lr, beta1, beta2, eps, step},
                       threads});
}

void ratio_step_priced(Address grad_mask, Address probability, Address offsets,
                       const std::array<std::uintptr_t, 11>& tables, const std::array<int64_t, 5>& sizes, Address theta,
                       Address exp_avg, Address exp_avg_sq, Address ratio_grad, Address cost, Address cost_grad,
                       int64_t groups, double multiplier, double penalty, double cut, double lr, double beta1,
                       double beta2, double eps, int64_t step, int64_t threads) {
  float* total = pointer<float>(cost);
  hwprune::table_cost(hwprune::cost_tables(tables, sizes), pointer<const float>(theta), groups, total,
                      pointer<float>(cost_grad));
  ratio_step(grad_mask, probability, offsets, cost_grad, theta, exp_avg, exp_avg_sq, ratio_grad, groups,
             multiplier + penalty * *total, cut, lr, beta1, beta2, eps, step, threads);
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Operators in C++ for the CPU; arguments are addresses of contiguous float32 and int64 arrays.";
  bind_masked_conv(module);
  module.def("ratio_forward", &ratio_forward, py::arg("theta"), py::arg("importance"), py::arg("offsets"),
             py::arg("uniforms"), py::arg("log_threshold"), py::arg("probability"), py::arg("mask"), py::arg("groups"),
             py::arg("temperature"), py::arg("seed"), py::arg("threads"), release());
  module.def("ratio_step", &ratio_step, py::arg("grad_mask"), py::arg("probability"), py::arg("offsets"),
             py::arg("cost_grad"), py::arg("theta"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("ratio_grad"),
             py::arg("groups"), py::arg("multiplier"), py::arg("cut"), py::arg("lr"), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("threads"), release());
  module.def("ratio_step_priced", &ratio_step_priced, py::arg("grad_mask"), py::arg("probability"), py::arg("offsets"),
             py::arg("tables"), py::arg("sizes"), py::arg("theta"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
             py::arg("ratio_grad"), py::arg("cost"), py::arg("cost_grad"), py::arg("groups"), py::arg("multiplier"),
             py::arg("penalty"), py::arg("cut"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
             py::arg("step"), py::arg("threads"), release());
}
