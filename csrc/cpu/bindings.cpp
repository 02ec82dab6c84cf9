// hwprune._cpp: addresses and sizes in, nothing out. Checks and allocation stand in hwprune/ops.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/ratio_update.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void ratio_forward(Address theta, Address importance, Address offsets, Address uniforms, Address log_threshold,
                   Address probability, Address mask, int64_t groups, double temperature) {
  hwprune::ratio_forward({pointer<const float>(theta), pointer<const float>(importance),
                          pointer<const int64_t>(offsets), pointer<const float>(uniforms),
                          pointer<float>(log_threshold), pointer<float>(probability), pointer<float>(mask), groups,
                          temperature});
}

void ratio_step(Address grad_mask, Address probability, Address offsets, Address cost_grad, Address theta,
                Address exp_avg, Address exp_avg_sq, Address ratio_grad, int64_t groups, double multiplier, double cut,
                double lr, double beta1, double beta2, double eps, int64_t step) {
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
                       {lr, beta1, beta2, eps, step}});
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Operators in C++ for the CPU; arguments are addresses of contiguous float32 and int64 arrays.";
  module.def("ratio_forward", &ratio_forward, py::arg("theta"), py::arg("importance"), py::arg("offsets"),
             py::arg("uniforms"), py::arg("log_threshold"), py::arg("probability"), py::arg("mask"), py::arg("groups"),
             py::arg("temperature"), release());
  module.def("ratio_step", &ratio_step, py::arg("grad_mask"), py::arg("probability"), py::arg("offsets"),
             py::arg("cost_grad"), py::arg("theta"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("ratio_grad"),
             py::arg("groups"), py::arg("multiplier"), py::arg("cut"), py::arg("lr"), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("step"), release());
}
