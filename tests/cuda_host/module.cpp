#include "cuda/masked_conv_bindings.cpp"  // as one file, since pybind11's headers take longest
#include "cuda/ratio_update_bindings.cpp"

PYBIND11_MODULE(cuda_host, module) {
  module.doc() = "hwprune._cuda's launches, carried out by the CPU.";
  hwprune::bind_masked_conv(module);
  hwprune::bind_ratio_update(module);
}
