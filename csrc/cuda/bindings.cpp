// hwprune._cuda: device addresses, sizes and a stream in, nothing out. Checks and allocation stand in hwprune/ops.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/bindings.hpp"
#include "cuda/ratio_update.cuh"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error, const char* launch, int64_t groups) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(launch) + " with " + std::to_string(groups) +
                           " groups: " + cudaGetErrorString(error));
}

void ratio_forward(Address theta, Address importance, Address offsets, Address uniforms, Address log_threshold,
                   Address probability, Address mask, int64_t groups, double temperature, std::uint64_t seed,
                   Address stream) {
  check(hwprune::ratio_forward(pointer<const float>(theta), pointer<const float>(importance),
                               pointer<const int64_t>(offsets), pointer<const float>(uniforms),
                               pointer<float>(log_threshold), pointer<float>(probability), pointer<float>(mask), groups,
                               static_cast<float>(temperature), seed, reinterpret_cast<cudaStream_t>(stream)),
        "ratio_forward", groups);
}

hwprune::RatioStep ratio_step_arguments(Address grad_mask, Address probability, Address offsets, Address before,
                                        Address theta, Address exp_avg, Address exp_avg_sq, Address ratio_grad,
                                        Address cost, Address cost_grad, double multiplier, double penalty, double cut,
                                        double lr, double beta1, double beta2, double eps, int64_t step) {
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

void ratio_step(Address grad_mask, Address probability, Address offsets, Address cost_grad, Address theta,
                Address exp_avg, Address exp_avg_sq, Address ratio_grad, int64_t groups, double multiplier, double cut,
                double lr, double beta1, double beta2, double eps, int64_t step, Address stream) {
  const auto args = ratio_step_arguments(grad_mask, probability, offsets, theta, theta, exp_avg, exp_avg_sq, ratio_grad,
                                         0, cost_grad, multiplier, 0.0, cut, lr, beta1, beta2, eps, step);
  check(hwprune::ratio_step(args, nullptr, groups, reinterpret_cast<cudaStream_t>(stream)), "ratio_step", groups);
}

void ratio_step_priced(Address grad_mask, Address probability, Address offsets,
                       const std::array<std::uintptr_t, 11>& tables, const std::array<int64_t, 5>& sizes,
                       Address before, Address theta, Address exp_avg, Address exp_avg_sq, Address ratio_grad,
                       Address cost, Address cost_grad, int64_t groups, double multiplier, double penalty, double cut,
                       double lr, double beta1, double beta2, double eps, int64_t step, Address stream) {
  const auto args =
      ratio_step_arguments(grad_mask, probability, offsets, before, theta, exp_avg, exp_avg_sq, ratio_grad, cost,
                           cost_grad, multiplier, penalty, cut, lr, beta1, beta2, eps, step);
  const hwprune::CostTables lookup = hwprune::cost_tables(tables, sizes);
  check(hwprune::ratio_step(args, &lookup, groups, reinterpret_cast<cudaStream_t>(stream)), "ratio_step_priced",
        groups);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Operators in CUDA; arguments are addresses of contiguous float32 and int64 arrays on the device.";
  module.attr("runtime_version") = CUDART_VERSION;
  module.def("ratio_forward", &ratio_forward, py::arg("theta"), py::arg("importance"), py::arg("offsets"),
             py::arg("uniforms"), py::arg("log_threshold"), py::arg("probability"), py::arg("mask"), py::arg("groups"),
             py::arg("temperature"), py::arg("seed"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def("ratio_step", &ratio_step, py::arg("grad_mask"), py::arg("probability"), py::arg("offsets"),
             py::arg("cost_grad"), py::arg("theta"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("ratio_grad"),
             py::arg("groups"), py::arg("multiplier"), py::arg("cut"), py::arg("lr"), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
  module.def("ratio_step_priced", &ratio_step_priced, py::arg("grad_mask"), py::arg("probability"), py::arg("offsets"),
             py::arg("tables"), py::arg("sizes"), py::arg("before"), py::arg("theta"), py::arg("exp_avg"),
             py::arg("exp_avg_sq"), py::arg("ratio_grad"), py::arg("cost"), py::arg("cost_grad"), py::arg("groups"),
             py::arg("multiplier"), py::arg("penalty"), py::arg("cut"), py::arg("lr"), py::arg("beta1"),
             py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
}
