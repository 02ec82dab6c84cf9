// The convolution itself, between active channels or over listed columns, and its gradients. Dense float32, no groups.
#pragma once

#include <cstdint>

#include "cpu/masked_conv.hpp"

namespace hwprune {

struct Convolution {
  int64_t images, channels, height, width;  // of x
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  const float* in_mask;   // [channels]; null: all are active
  const float* out_mask;  // [out_channels]; null: all are active
  // Listed columns, (row * kernel_width + column) * channels + channel, increasing, instead of an input mask; -1 of
  // them: all.
  const int64_t* columns;
  int64_t column_count;
  bool channels_last;  // x, and all that is like it or like y: NHWC; else NCHW
  bool weight_last;    // the weight lies in memory as [out_channels, kernel, channels]; else channels before kernel
  int64_t threads;
  int64_t lanes;  // at most so many floats in a register, of those that the processor has: 4, 8 or 16
};

// raw = conv2d(in_mask * x), in the active outputs and zero in the others; y is its epilogue, whose a and b may be
// null, for ones and zeros. `raw`, `y` and the sums over raw and over its squares [out_channels] are written where they
// are not null. No masked input is read.
void convolve(const float* x, const float* weight, const Convolution& args, const Epilogue& epilogue, float* y,
              float* raw, float* sums, float* squares);

// The gradient of x, and with an input mask that of it, `grad_mask` [channels]; both are zero where that is. `grad`,
// like y, is not read in masked outputs. There must be no columns, and strides of 1.
void input_gradient(const float* grad, const float* x, const float* weight, const Convolution& args, float* grad_x,
                    float* grad_mask);

// The gradient of the weight, in the memory format of weight_last; zero where an input or an output is masked. There
// must be no columns.
void weight_gradient(const float* grad, const float* x, const Convolution& args, float* grad_weight);

}  // namespace hwprune
