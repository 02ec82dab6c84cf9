#include "cpu/masked_bn_act.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/masked_conv_rows.hpp"

namespace hwprune {
namespace {

// What the norm is with its statistics: scale * x + shift; and times the mask, zero where that is.
struct Affine {
  Floats scale, shift, a, b;

  Affine(const Batch& batch, const Norm& norm, const float* mean, const float* var) {
    for (int64_t c = 0; c < batch.channels; ++c) {
      const float factor = norm.weight[c] / std::sqrt(var[c] + norm.eps), mask = norm.mask ? norm.mask[c] : 1.0f;
      scale.push_back(factor);
      shift.push_back(norm.bias[c] - mean[c] * factor);
      a.push_back(mask != 0.0f ? mask * scale.back() : 0.0f);
      b.push_back(mask != 0.0f ? mask * shift.back() : 0.0f);
    }
  }

  Epilogue epilogue(const Norm& norm) const {
    return {a.data(), b.data(), norm.mask, norm.residual, norm.low, norm.high};
  }
};

double count_of(const Batch& batch) { return static_cast<double>(batch.images * batch.pixels); }

}  // namespace

void norm_forward(const float* x, const Batch& batch, const Norm& norm, float* y, float* mean, float* var) {
  channel_sums(x, batch, mean, var);
  const double count = count_of(batch);
  for (int64_t c = 0; c < batch.channels; ++c) {
    const double middle = mean[c] / count;
    var[c] = static_cast<float>(std::max(0.0, var[c] / count - middle * middle));
    mean[c] = static_cast<float>(middle);
  }
  const Affine affine(batch, norm, mean, var);
  epilogue(x, batch, nullptr, batch.channels, affine.epilogue(norm), y, nullptr);
}

void norm_backward(const float* grad_y, const float* x, const Batch& batch, const Norm& norm, const float* mean,
                   const float* var, float* grad_x, float* grad_weight, float* grad_bias, float* grad_mask,
                   float* grad_residual) {
  const Affine affine(batch, norm, mean, var);
  Floats total(static_cast<size_t>(batch.channels)), total_x(total), offset(total), factor(total);
  epilogue_backward(grad_y, x, batch, affine.epilogue(norm), grad_x, grad_residual, total.data(), total_x.data());
  const double count = count_of(batch);
  for (int64_t c = 0; c < batch.channels; ++c) {
    const auto i = static_cast<size_t>(c);
    const float mask = norm.mask ? norm.mask[c] : 1.0f;
    if (grad_mask) grad_mask[c] = mask != 0.0f ? total_x[i] * affine.scale[i] + total[i] * affine.shift[i] : 0.0f;
    const double inverse = 1.0 / std::sqrt(static_cast<double>(var[c]) + norm.eps);
    const double grad_shift = static_cast<double>(mask) * total[i];
    const double grad_scale = static_cast<double>(mask) * total_x[i] - grad_shift * mean[c];  // the shift holds it, too
    grad_weight[c] = static_cast<float>(grad_scale * inverse);
    grad_bias[c] = static_cast<float>(grad_shift);
    const double grad_var = var[c] > 0.0f ? grad_scale * norm.weight[c] * inverse * inverse * inverse / -2.0 : 0.0;
    const double grad_mean = -grad_shift * norm.weight[c] * inverse - 2.0 * mean[c] * grad_var;
    offset[i] = static_cast<float>(grad_mean / count);
    factor[i] = static_cast<float>(2.0 * grad_var / count);
  }
  add_affine(x, batch, offset.data(), factor.data(), grad_x);
}

}  // namespace hwprune
