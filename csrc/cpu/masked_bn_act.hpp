// BatchNorm in training with the statistics of its input, a mask, a residual and an activation behind it. Dense
// float32, NCHW or NHWC.
#pragma once

#include "cpu/masked_conv.hpp"

namespace hwprune {

struct Norm {
  const float* weight;    // [channels]
  const float* bias;      // [channels]
  const float* mask;      // [channels]; null: ones
  const float* residual;  // like y; null: zeros
  float eps;
  float low, high;  // of the activation
};

// y = mask * (weight * (x - mean) / sqrt(var + eps) + bias) + residual, clamped; mean and biased var [channels] are
// those of x.
void norm_forward(const float* x, const Batch& batch, const Norm& norm, float* y, float* mean, float* var);

// Gradients of x, weight, bias, mask [channels] and residual; the last two may be null. `mean` and `var` are those of
// norm_forward.
void norm_backward(const float* grad_y, const float* x, const Batch& batch, const Norm& norm, const float* mean,
                   const float* var, float* grad_x, float* grad_weight, float* grad_bias, float* grad_mask,
                   float* grad_residual);

}  // namespace hwprune
