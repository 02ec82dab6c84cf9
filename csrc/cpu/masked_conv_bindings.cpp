#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/masked_bn_act.hpp"
#include "cpu/masked_conv_product.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void gather_channels(Address x, const hwprune::Batch& batch, Address index, Address factor, int64_t kept, Address out) {
  hwprune::gather_channels(pointer<const float>(x), batch, pointer<const int64_t>(index), pointer<const float>(factor),
                           kept, pointer<float>(out));
}

void scatter_channels(Address compact, const hwprune::Batch& batch, Address index, Address factor, int64_t kept,
                      Address x, Address out, Address dots) {
  hwprune::scatter_channels(pointer<const float>(compact), batch, pointer<const int64_t>(index),
                            pointer<const float>(factor), kept, pointer<const float>(x), pointer<float>(out),
                            pointer<float>(dots));
}

hwprune::Epilogue make_epilogue(Address a, Address b, Address mask, Address residual, float low, float high) {
  return {pointer<const float>(a),
          pointer<const float>(b),
          pointer<const float>(mask),
          pointer<const float>(residual),
          low,
          high};
}

void epilogue(Address raw, const hwprune::Batch& batch, Address index, int64_t kept, const hwprune::Epilogue& args,
              Address y, Address raw_full) {
  hwprune::epilogue(pointer<const float>(raw), batch, pointer<const int64_t>(index), kept, args, pointer<float>(y),
                    pointer<float>(raw_full));
}

void epilogue_backward(Address grad_y, Address raw, const hwprune::Batch& batch, const hwprune::Epilogue& args,
                       Address grad_raw, Address grad_residual, Address sum, Address sum_raw) {
  hwprune::epilogue_backward(pointer<const float>(grad_y), pointer<const float>(raw), batch, args,
                             pointer<float>(grad_raw), pointer<float>(grad_residual), pointer<float>(sum),
                             pointer<float>(sum_raw));
}

void channel_sums(Address x, const hwprune::Batch& batch, Address sums, Address squares) {
  hwprune::channel_sums(pointer<const float>(x), batch, pointer<float>(sums), pointer<float>(squares));
}

hwprune::Norm make_norm(Address weight, Address bias, Address mask, Address residual, float eps, float low,
                        float high) {
  return {pointer<const float>(weight),
          pointer<const float>(bias),
          pointer<const float>(mask),
          pointer<const float>(residual),
          eps,
          low,
          high};
}

void norm_forward(Address x, const hwprune::Batch& batch, const hwprune::Norm& norm, Address y, Address mean,
                  Address var) {
  hwprune::norm_forward(pointer<const float>(x), batch, norm, pointer<float>(y), pointer<float>(mean),
                        pointer<float>(var));
}

void norm_backward(Address grad_y, Address x, const hwprune::Batch& batch, const hwprune::Norm& norm, Address mean,
                   Address var, Address grad_x, Address grad_weight, Address grad_bias, Address grad_mask,
                   Address grad_residual) {
  hwprune::norm_backward(pointer<const float>(grad_y), pointer<const float>(x), batch, norm, pointer<const float>(mean),
                         pointer<const float>(var), pointer<float>(grad_x), pointer<float>(grad_weight),
                         pointer<float>(grad_bias), pointer<float>(grad_mask), pointer<float>(grad_residual));
}

hwprune::Part make_part(int64_t width, Address rows, int64_t row_count, Address columns, int64_t column_count,
                        int64_t groups, int64_t threads) {
  return {width,  pointer<const int64_t>(rows), row_count, pointer<const int64_t>(columns), column_count, groups,
          threads};
}

void pick_part(Address matrix, const hwprune::Part& args, Address row_factor, Address column_factor, Address part) {
  hwprune::pick_part(pointer<const float>(matrix), args, pointer<const float>(row_factor),
                     pointer<const float>(column_factor), pointer<float>(part));
}

void spread_part(Address part, int64_t height, const hwprune::Part& args, Address matrix) {
  hwprune::spread_part(pointer<const float>(part), height, args, pointer<float>(matrix));
}

hwprune::Columns make_columns(int64_t channels, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                              int64_t kernel_width, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                              int64_t dilation_h, int64_t dilation_w, Address columns, int64_t count,
                              bool channels_last, int64_t threads) {
  return {channels,
          height,
          width,
          out_height,
          out_width,
          kernel_width,
          stride_h,
          stride_w,
          pad_h,
          pad_w,
          dilation_h,
          dilation_w,
          pointer<const int64_t>(columns),
          count,
          channels_last,
          threads};
}

void pack_columns(Address x, int64_t images, const hwprune::Columns& args, Address packed) {
  hwprune::pack_columns(pointer<const float>(x), images, args, pointer<float>(packed));
}

void unpack_columns(Address packed, int64_t images, const hwprune::Columns& args, Address x) {
  hwprune::unpack_columns(pointer<const float>(packed), images, args, pointer<float>(x));
}

hwprune::Convolution make_convolution(int64_t images, std::array<int64_t, 3> x, std::array<int64_t, 3> y,
                                      std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
                                      std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation, Address in_mask,
                                      Address out_mask, Address columns, int64_t column_count, bool channels_last,
                                      bool weight_last, int64_t threads, int64_t lanes) {
  return {images,
          x[0],
          x[1],
          x[2],
          y[0],
          y[1],
          y[2],
          kernel[0],
          kernel[1],
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          dilation[0],
          dilation[1],
          pointer<const float>(in_mask),
          pointer<const float>(out_mask),
          pointer<const int64_t>(columns),
          column_count,
          channels_last,
          weight_last,
          threads,
          lanes};
}

void convolve(Address x, Address weight, const hwprune::Convolution& args, const hwprune::Epilogue& epilogue, Address y,
              Address raw, Address sums, Address squares) {
  hwprune::convolve(pointer<const float>(x), pointer<const float>(weight), args, epilogue, pointer<float>(y),
                    pointer<float>(raw), pointer<float>(sums), pointer<float>(squares));
}

void input_gradient(Address grad, Address x, Address weight, const hwprune::Convolution& args, Address grad_x,
                    Address grad_mask) {
  hwprune::input_gradient(pointer<const float>(grad), pointer<const float>(x), pointer<const float>(weight), args,
                          pointer<float>(grad_x), pointer<float>(grad_mask));
}

void weight_gradient(Address grad, Address x, const hwprune::Convolution& args, Address grad_weight) {
  hwprune::weight_gradient(pointer<const float>(grad), pointer<const float>(x), args, pointer<float>(grad_weight));
}

}  // namespace

// Called by the module's definition in bindings.cpp. An address of 0 is a null pointer.
void bind_masked_conv(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<hwprune::Batch>(module, "Batch")
      .def(py::init<int64_t, int64_t, int64_t, bool, int64_t>(), py::arg("images"), py::arg("channels"),
           py::arg("pixels"), py::arg("channels_last"), py::arg("threads"));
  py::class_<hwprune::Epilogue>(module, "Epilogue")
      .def(py::init(&make_epilogue), py::arg("a"), py::arg("b"), py::arg("mask"), py::arg("residual"), py::arg("low"),
           py::arg("high"));
  py::class_<hwprune::Norm>(module, "Norm")
      .def(py::init(&make_norm), py::arg("weight"), py::arg("bias"), py::arg("mask"), py::arg("residual"),
           py::arg("eps"), py::arg("low"), py::arg("high"));
  py::class_<hwprune::Part>(module, "Part")
      .def(py::init(&make_part), py::arg("width"), py::arg("rows"), py::arg("row_count"), py::arg("columns"),
           py::arg("column_count"), py::arg("groups"), py::arg("threads"));
  py::class_<hwprune::Columns>(module, "Columns")
      .def(py::init(&make_columns), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("out_height"),
           py::arg("out_width"), py::arg("kernel_width"), py::arg("stride_h"), py::arg("stride_w"), py::arg("pad_h"),
           py::arg("pad_w"), py::arg("dilation_h"), py::arg("dilation_w"), py::arg("columns"), py::arg("count"),
           py::arg("channels_last"), py::arg("threads"));
  py::class_<hwprune::Convolution>(module, "Convolution")
      .def(py::init(&make_convolution), py::arg("images"), py::arg("x"), py::arg("y"), py::arg("kernel"),
           py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("in_mask"), py::arg("out_mask"),
           py::arg("columns"), py::arg("column_count"), py::arg("channels_last"), py::arg("weight_last"),
           py::arg("threads"), py::arg("lanes"));
  module.def("convolve", &convolve, py::arg("x"), py::arg("weight"), py::arg("args"), py::arg("epilogue"), py::arg("y"),
             py::arg("raw"), py::arg("sums"), py::arg("squares"), release());
  module.def("input_gradient", &input_gradient, py::arg("grad"), py::arg("x"), py::arg("weight"), py::arg("args"),
             py::arg("grad_x"), py::arg("grad_mask"), release());
  module.def("weight_gradient", &weight_gradient, py::arg("grad"), py::arg("x"), py::arg("args"),
             py::arg("grad_weight"), release());
  module.def("gather_channels", &gather_channels, py::arg("x"), py::arg("batch"), py::arg("index"), py::arg("factor"),
             py::arg("kept"), py::arg("out"), release());
  module.def("scatter_channels", &scatter_channels, py::arg("compact"), py::arg("batch"), py::arg("index"),
             py::arg("factor"), py::arg("kept"), py::arg("x"), py::arg("out"), py::arg("dots"), release());
  module.def("epilogue", &epilogue, py::arg("raw"), py::arg("batch"), py::arg("index"), py::arg("kept"),
             py::arg("args"), py::arg("y"), py::arg("raw_full"), release());
  module.def("epilogue_backward", &epilogue_backward, py::arg("grad_y"), py::arg("raw"), py::arg("batch"),
             py::arg("args"), py::arg("grad_raw"), py::arg("grad_residual"), py::arg("sum"), py::arg("sum_raw"),
             release());
  module.def("channel_sums", &channel_sums, py::arg("x"), py::arg("batch"), py::arg("sums"), py::arg("squares"),
             release());
  module.def("norm_forward", &norm_forward, py::arg("x"), py::arg("batch"), py::arg("norm"), py::arg("y"),
             py::arg("mean"), py::arg("var"), release());
  module.def("norm_backward", &norm_backward, py::arg("grad_y"), py::arg("x"), py::arg("batch"), py::arg("norm"),
             py::arg("mean"), py::arg("var"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("grad_bias"),
             py::arg("grad_mask"), py::arg("grad_residual"), release());
  module.def("pick_part", &pick_part, py::arg("matrix"), py::arg("args"), py::arg("row_factor"),
             py::arg("column_factor"), py::arg("part"), release());
  module.def("spread_part", &spread_part, py::arg("part"), py::arg("height"), py::arg("args"), py::arg("matrix"),
             release());
  module.def("pack_columns", &pack_columns, py::arg("x"), py::arg("images"), py::arg("args"), py::arg("packed"),
             release());
  module.def("unpack_columns", &unpack_columns, py::arg("packed"), py::arg("images"), py::arg("args"), py::arg("x"),
             release());
}
