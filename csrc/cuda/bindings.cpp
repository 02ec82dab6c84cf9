// hwprune._cuda: device addresses, sizes and a stream in, nothing out. Checks and allocation stand in hwprune/ops.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

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
                   Address probability, Address mask, int64_t groups, double temperature, Address stream) {
  check(hwprune::ratio_forward(pointer<const float>(theta), pointer<const float>(importance),
                               pointer<const int64_t>(offsets), pointer<const float>(uniforms),
                               pointer<float>(log_threshold), pointer<float>(probability), pointer<float>(mask), groups,
                               static_cast<float>(temperature), reinterpret_cast<cudaStream_t>(stream)),
        "ratio_forward", groups);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Operators in CUDA; arguments are addresses of contiguous float32 and int64 arrays on the device.";
  module.attr("runtime_version") = CUDART_VERSION;
  module.def("ratio_forward", &ratio_forward, py::arg("theta"), py::arg("importance"), py::arg("offsets"),
             py::arg("uniforms"), py::arg("log_threshold"), py::arg("probability"), py::arg("mask"), py::arg("groups"),
             py::arg("temperature"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
