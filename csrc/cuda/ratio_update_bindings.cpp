#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/bindings.hpp"
#include "cuda/ratio_update.cuh"

namespace py = pybind11;

namespace hwprune {
namespace ratio_update {  // of its own, for files of bindings may be compiled as one
namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error, const char* launch, int64_t groups) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(launch) + " with " + std::to_string(groups) +
                           " groups: " + cudaGetErrorString(error));
}

void forward(Address theta, Address importance, Address offsets, Address uniforms, Address log_threshold,
             Address probability, Address mask, int64_t groups, double temperature, std::uint64_t seed,
             Address stream) {
  check(ratio_forward(pointer<const float>(theta), pointer<const float>(importance), pointer<const int64_t>(offsets),
                      pointer<const float>(uniforms), pointer<float>(log_threshold), pointer<float>(probability),
                      pointer<float>(mask), groups, static_cast<float>(temperature), seed,
                      reinterpret_cast<cudaStream_t>(stream)),
        "ratio_forward", groups);
}

RatioStep step_arguments(Address grad_mask, Address probability, Address offsets, Address before, Address theta,
                         Address exp_avg, Address exp_avg_sq, Address ratio_grad, Address cost, Address cost_grad,
                         double multiplier, double penalty, double cut, double lr, double beta1, double beta2,
                         double eps, int64_t step) {
  const double steps = static_cast<double>(step);
  return {pointer<const float>(grad_mask),
          pointer<const float>(probability),
          pointer<const int64_t>(offsets),
          pointer<const float>(before),
          pointer<float>(theta),
          pointer<float>(exp_avg),
          pointer<float>(exp_avg_sq),
          pointer<float>(ratio_grad),
          pointer<float>(cost),
          pointer<float>(cost_grad),
          static_cast<float>(multiplier),
          static_cast<float>(penalty),
          static_cast<float>(cut),
          static_cast<float>(lr / (1.0 - std::pow(beta1, steps))),
          static_cast<float>(beta1),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(1.0 / (1.0 - std::pow(beta2, steps))),
          static_cast<float>(eps)};
}

void step_given(Address grad_mask, Address probability, Address offsets, Address cost_grad, Address theta,
                Address exp_avg, Address exp_avg_sq, Address ratio_grad, int64_t groups, double multiplier, double cut,
                double lr, double beta1, double beta2, double eps, int64_t step, Address stream) {
  const auto args = step_arguments(grad_mask, probability, offsets, theta, theta, exp_avg, exp_avg_sq, ratio_grad, 0,
                                   cost_grad, multiplier, 0.0, cut, lr, beta1, beta2, eps, step);
  check(ratio_step(args, nullptr, groups, reinterpret_cast<cudaStream_t>(stream)), "ratio_step", groups);
}

void step_priced(Address grad_mask, Address probability, Address offsets, const std::array<std::uintptr_t, 11>& tables,
                 const std::array<int64_t, 5>& sizes, Address before, Address theta, Address exp_avg,
                 Address exp_avg_sq, Address ratio_grad, Address cost, Address cost_grad, int64_t groups,
                 double multiplier, double penalty, double cut, double lr, double beta1, double beta2, double eps,
                 int64_t step, Address stream) {
  const auto args = step_arguments(grad_mask, probability, offsets, before, theta, exp_avg, exp_avg_sq, ratio_grad,
                                   cost, cost_grad, multiplier, penalty, cut, lr, beta1, beta2, eps, step);
  const CostTables lookup = cost_tables(tables, sizes);
  check(ratio_step(args, &lookup, groups, reinterpret_cast<cudaStream_t>(stream)), "ratio_step_priced", groups);
}

}  // namespace
}  // namespace ratio_update

void bind_ratio_update(py::module_& module) {
  module.def("ratio_forward", &ratio_update::forward, py::arg("theta"), py::arg("importance"), py::arg("offsets"),
             py::arg("uniforms"), py::arg("log_threshold"), py::arg("probability"), py::arg("mask"), py::arg("groups"),
             py::arg("temperature"), py::arg("seed"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def("ratio_step", &ratio_update::step_given, py::arg("grad_mask"), py::arg("probability"), py::arg("offsets"),
             py::arg("cost_grad"), py::arg("theta"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("ratio_grad"),
             py::arg("groups"), py::arg("multiplier"), py::arg("cut"), py::arg("lr"), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
  module.def("ratio_step_shared", &ratio_step_shared, py::arg("axes"), py::arg("terms"));
  module.def("ratio_step_priced", &ratio_update::step_priced, py::arg("grad_mask"), py::arg("probability"),
             py::arg("offsets"), py::arg("tables"), py::arg("sizes"), py::arg("before"), py::arg("theta"),
             py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("ratio_grad"), py::arg("cost"), py::arg("cost_grad"),
             py::arg("groups"), py::arg("multiplier"), py::arg("penalty"), py::arg("cut"), py::arg("lr"),
             py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace hwprune
