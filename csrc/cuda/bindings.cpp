// hwprune._cuda: device addresses, sizes and a stream in, nothing out. Checks and allocation stand in hwprune/ops.
#include "cuda/bindings.hpp"

#include <cuda_runtime_api.h>

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Operators in CUDA; arguments are addresses of contiguous float32 and int64 arrays on the device.";
  module.attr("runtime_version") = CUDART_VERSION;
  hwprune::bind_masked_conv(module);
  hwprune::bind_ratio_update(module);
}
