#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/bindings.hpp"
#include "cuda/masked_conv.cuh"

namespace py = pybind11;

namespace hwprune {
namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error, const char* launch, const std::string& sizes) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(launch) + " " + sizes + ": " + cudaGetErrorString(error));
}

std::string sizes(const Convolution& c) {
  const auto text = [](int number) { return std::to_string(number); };
  return "of x [" + text(c.batch) + ", " + text(c.in_channels) + ", " + text(c.height) + ", " + text(c.width) +
         "] and weight [" + text(c.out_channels) + ", " + text(c.in_channels / c.groups) + ", " +
         text(c.kernel_height) + ", " + text(c.kernel_width) + "]";
}

std::string sizes(const ChannelAffine& a) {
  return "of x [" + std::to_string(a.pixels) + ", " + std::to_string(a.channels) + "]";
}

Convolution convolution(int batch, int in_channels, int height, int width, int out_channels, int out_height,
                        int out_width, int kernel_height, int kernel_width, int stride_height, int stride_width,
                        int padding_height, int padding_width, int dilation_height, int dilation_width, int groups,
                        int number, bool tf32, Address in_mask, Address out_mask, Address columns, int column_count,
                        int product_images) {
  return {batch,
          in_channels,
          height,
          width,
          out_channels,
          out_height,
          out_width,
          kernel_height,
          kernel_width,
          stride_height,
          stride_width,
          padding_height,
          padding_width,
          dilation_height,
          dilation_width,
          groups,
          static_cast<Number>(number),
          tf32,
          pointer<const float>(in_mask),
          pointer<const float>(out_mask),
          pointer<const int64_t>(columns),
          column_count,
          product_images};
}

void forward(const Convolution& conv, Address x, Address weight, Address scale, Address shift, Address residual,
             int act, Address y, Address raw, Address workspace, Address stream) {
  check(masked_conv_forward(conv, pointer<const void>(x), pointer<const void>(weight), pointer<const float>(scale),
                            pointer<const float>(shift), pointer<const void>(residual), static_cast<Activation>(act),
                            pointer<void>(y), pointer<void>(raw), pointer<void>(workspace),
                            reinterpret_cast<cudaStream_t>(stream)),
        "masked_conv_forward", sizes(conv));
}

void forward_stats(const Convolution& conv, Address x, Address weight, Address raw, Address sums, Address squares,
                   Address workspace, Address stream) {
  check(masked_conv_forward_stats(conv, pointer<const void>(x), pointer<const void>(weight), pointer<void>(raw),
                                  pointer<float>(sums), pointer<float>(squares), pointer<void>(workspace),
                                  reinterpret_cast<cudaStream_t>(stream)),
        "masked_conv_forward_stats", sizes(conv));
}

void backward_input(const Convolution& conv, Address grad_raw, Address x, Address weight, Address grad_x,
                    Address grad_in_mask, Address workspace, Address stream) {
  check(masked_conv_backward_input(conv, pointer<const void>(grad_raw), pointer<const void>(x),
                                   pointer<const void>(weight), pointer<void>(grad_x), pointer<float>(grad_in_mask),
                                   pointer<void>(workspace), reinterpret_cast<cudaStream_t>(stream)),
        "masked_conv_backward_input", sizes(conv));
}

void backward_weight(const Convolution& conv, Address grad_raw, Address x, Address grad_weight, Address workspace,
                     Address stream) {
  check(masked_conv_backward_weight(conv, pointer<const void>(grad_raw), pointer<const void>(x),
                                    pointer<void>(grad_weight), pointer<void>(workspace),
                                    reinterpret_cast<cudaStream_t>(stream)),
        "masked_conv_backward_weight", sizes(conv));
}

ChannelAffine affine(int64_t pixels, int channels, int number, int act, double eps, Address x, Address residual,
                     Address mask, Address scale, Address shift, Address sums, Address squares) {
  return {pixels,
          channels,
          static_cast<Number>(number),
          static_cast<Activation>(act),
          static_cast<float>(eps),
          pointer<const void>(x),
          pointer<const void>(residual),
          pointer<const float>(mask),
          pointer<const float>(scale),
          pointer<const float>(shift),
          pointer<const float>(sums),
          pointer<const float>(squares)};
}

void affine_forward(const ChannelAffine& a, Address y, Address mean, Address var, Address stream) {
  check(masked_affine_forward(a, pointer<void>(y), pointer<float>(mean), pointer<float>(var),
                              reinterpret_cast<cudaStream_t>(stream)),
        "masked_affine_forward", sizes(a));
}

void affine_backward(const ChannelAffine& a, Address grad_y, Address grad_x, Address grad_residual, Address grad_mask,
                     Address grad_scale, Address grad_shift, Address grad_sums, Address grad_squares, Address workspace,
                     Address stream) {
  const ChannelGradients gradients = {pointer<float>(grad_mask), pointer<float>(grad_scale), pointer<float>(grad_shift),
                                      pointer<float>(grad_sums), pointer<float>(grad_squares)};
  check(masked_affine_backward(a, pointer<const void>(grad_y), pointer<void>(grad_x), pointer<void>(grad_residual),
                               gradients, pointer<void>(workspace), reinterpret_cast<cudaStream_t>(stream)),
        "masked_affine_backward", sizes(a));
}

}  // namespace

void bind_masked_conv(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::dict shared;
  for (const SharedMemory& each : masked_conv_shared()) shared[py::make_tuple(each.kernel, each.tile)] = each.bytes;
  module.attr("dynamic_shared") = shared;
  py::class_<Convolution>(module, "Convolution", py::module_local(),
                          "The extents, formats and masks of masked_conv.cuh's launches.")
      .def(py::init(&convolution), py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("height"),
           py::arg("width"), py::arg("out_channels"), py::arg("out_height"), py::arg("out_width"),
           py::arg("kernel_height"), py::arg("kernel_width"), py::arg("stride_height"), py::arg("stride_width"),
           py::arg("padding_height"), py::arg("padding_width"), py::arg("dilation_height"), py::arg("dilation_width"),
           py::arg("groups"), py::arg("number"), py::arg("tf32"), py::arg("in_mask"), py::arg("out_mask"),
           py::arg("columns"), py::arg("column_count"), py::arg("product_images"))
      .def("workspace", &masked_conv_workspace);
  module.def("masked_conv_forward", &forward, py::arg("conv"), py::arg("x"), py::arg("weight"), py::arg("scale"),
             py::arg("shift"), py::arg("residual"), py::arg("act"), py::arg("y"), py::arg("raw"), py::arg("workspace"),
             py::arg("stream"), release());
  module.def("masked_conv_forward_stats", &forward_stats, py::arg("conv"), py::arg("x"), py::arg("weight"),
             py::arg("raw"), py::arg("sums"), py::arg("squares"), py::arg("workspace"), py::arg("stream"), release());
  module.def("masked_conv_backward_input", &backward_input, py::arg("conv"), py::arg("grad_raw"), py::arg("x"),
             py::arg("weight"), py::arg("grad_x"), py::arg("grad_in_mask"), py::arg("workspace"), py::arg("stream"),
             release());
  module.def("masked_conv_backward_weight", &backward_weight, py::arg("conv"), py::arg("grad_raw"), py::arg("x"),
             py::arg("grad_weight"), py::arg("workspace"), py::arg("stream"), release());
  py::class_<ChannelAffine>(module, "ChannelAffine", py::module_local(),
                            "The sizes and inputs of masked_conv.cuh's elementwise launches.")
      .def(py::init(&affine), py::kw_only(), py::arg("pixels"), py::arg("channels"), py::arg("number"), py::arg("act"),
           py::arg("eps"), py::arg("x"), py::arg("residual"), py::arg("mask"), py::arg("scale"), py::arg("shift"),
           py::arg("sums"), py::arg("squares"))
      .def("workspace", &masked_affine_workspace);
  module.def("masked_affine_forward", &affine_forward, py::arg("affine"), py::arg("y"), py::arg("mean"), py::arg("var"),
             py::arg("stream"), release());
  module.def("masked_affine_backward", &affine_backward, py::arg("affine"), py::arg("grad_y"), py::arg("grad_x"),
             py::arg("grad_residual"), py::arg("grad_mask"), py::arg("grad_scale"), py::arg("grad_shift"),
             py::arg("grad_sums"), py::arg("grad_squares"), py::arg("workspace"), py::arg("stream"), release());
}

}  // namespace hwprune
