// What follows a convolution, on its own: act(mask * (scale * x + shift) + residual) per channel, and its gradients.
// One pass over the tensors each, threads keeping to their channels so that these cost nothing.
#include <type_traits>

#include "cuda/activation.cuh"
#include "cuda/launch.cuh"
#include "cuda/masked_conv.cuh"

namespace hwprune {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;  // along the pixels

struct Factors {
  float mask, scale, shift, mean, rstd;
};

__device__ Factors factors_of(const ChannelAffine& a, int channel) {
  Factors f = {1, 1, 0, 0, 1};
  if (a.mask != nullptr) f.mask = a.mask[channel];
  if (a.scale != nullptr) f.scale = a.scale[channel];
  if (a.shift != nullptr) f.shift = a.shift[channel];
  if (a.sums != nullptr) {
    f.mean = a.sums[channel] / a.pixels;
    f.rstd = 1 / sqrtf(fmaxf(a.squares[channel] / a.pixels - f.mean * f.mean, 0) + a.eps);
    f.scale *= f.rstd;
  }
  return f;
}

// Threads (x, y) of block (bx, by) take the channels kCount (bx * blockDim.x + x) onwards of every pixel by *
// blockDim.y
// + y, and so on.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) forward_kernel(ChannelAffine a, T* y, float* mean, float* var) {
  using Vector = Pack<T, kCount>;
  const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * kCount;
  if (channel >= a.channels) return;
  Factors factors[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    factors[i] = factors_of(a, channel + i);
    if (mean != nullptr && blockIdx.y == 0 && threadIdx.y == 0) {
      const float m = factors[i].mean;
      mean[channel + i] = m;
      var[channel + i] = fmaxf(a.squares[channel + i] / a.pixels - m * m, 0);
    }
  }
  for (int64_t pixel = blockIdx.y * blockDim.y + threadIdx.y; pixel < a.pixels; pixel += gridDim.y * blockDim.y) {
    const int64_t at = pixel * a.channels + channel;
    const Vector x = *reinterpret_cast<const Vector*>(static_cast<const T*>(a.x) + at);
    Vector residual = {}, out;
    if (a.residual != nullptr) residual = *reinterpret_cast<const Vector*>(static_cast<const T*>(a.residual) + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Factors& f = factors[i];
      const float z = f.mask == 0 ? 0 : f.mask * (f.scale * (to_float(x.values[i]) - f.mean) + f.shift);
      out.values[i] = from_float<T>(activate(a.act, z + to_float(residual.values[i])));
    }
    *reinterpret_cast<Vector*>(y + at) = out;
  }
}

// grad_x as if mean and rstd were constants; partial [2, gridDim.y, channels]: sums of dz and of dz (x - mean), where
// dz is the gradient before the activation.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(ChannelAffine a, const T* grad_y, T* grad_x, T* grad_residual, float* partial) {
  using Vector = Pack<T, kCount>;
  __shared__ float sums[2][kThreads * kCount];  // [.., threadIdx.y, channel of the block]
  const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * kCount;
  if (channel < a.channels) {
    Factors factors[kCount];
    float sum[kCount] = {}, product[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) factors[i] = factors_of(a, channel + i);
    for (int64_t pixel = blockIdx.y * blockDim.y + threadIdx.y; pixel < a.pixels; pixel += gridDim.y * blockDim.y) {
      const int64_t at = pixel * a.channels + channel;
      const Vector grad = *reinterpret_cast<const Vector*>(grad_y + at);
      const Vector x = *reinterpret_cast<const Vector*>(static_cast<const T*>(a.x) + at);
      Vector residual = {}, out, out_residual;
      if (a.residual != nullptr) residual = *reinterpret_cast<const Vector*>(static_cast<const T*>(a.residual) + at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Factors& f = factors[i];
        const float centred = f.mask == 0 ? 0 : to_float(x.values[i]) - f.mean;
        const float z = f.mask == 0 ? 0 : f.mask * (f.scale * centred + f.shift);
        const float dz = to_float(grad.values[i]) * slope(a.act, z + to_float(residual.values[i]));
        out_residual.values[i] = from_float<T>(dz);
        out.values[i] = from_float<T>(f.mask == 0 ? 0 : dz * f.mask * f.scale);
        sum[i] += dz;
        product[i] += dz * centred;
      }
      *reinterpret_cast<Vector*>(grad_x + at) = out;
      if (grad_residual != nullptr) *reinterpret_cast<Vector*>(grad_residual + at) = out_residual;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int place = (threadIdx.y * blockDim.x + threadIdx.x) * kCount + i;
      sums[0][place] = sum[i];
      sums[1][place] = product[i];
    }
  }
  __syncthreads();
  const int width = blockDim.x * kCount, first = blockIdx.x * width;
  for (int item = threadIdx.y * blockDim.x + threadIdx.x; item < 2 * width; item += blockDim.x * blockDim.y) {
    const int which = item / width, column = item % width;
    if (first + column >= a.channels) continue;
    float total = 0;
    for (int row = 0; row < static_cast<int>(blockDim.y); ++row) total += sums[which][row * width + column];
    partial[(static_cast<int64_t>(which) * gridDim.y + blockIdx.y) * a.channels + first + column] = total;
  }
}

// With n = scale * (x - mean) + shift and dn = mask * dz:
//   dmask = Σ dz n, dshift = Σ dn, d(weight * rstd) = Σ dn (x - mean),
//   dvar = -weight rstd³ / 2 * Σ dn (x - mean), dmean = -weight rstd Σ dn - 2 mean dvar.
__global__ void finish_kernel(ChannelAffine a, const float* partial, int rows, ChannelGradients out) {
  const float sum = column_total(partial, rows, a.channels);
  const float product = column_total(partial + static_cast<int64_t>(rows) * a.channels, rows, a.channels);
  const int channel = blockIdx.x * 32 + threadIdx.x;
  if (threadIdx.y != 0 || channel >= a.channels) return;
  const Factors f = factors_of(a, channel);
  const bool active = f.mask != 0;
  if (out.mask != nullptr) out.mask[channel] = active ? f.scale * product + f.shift * sum : 0;
  if (out.shift != nullptr) out.shift[channel] = active ? f.mask * sum : 0;
  if (out.scale != nullptr) out.scale[channel] = active ? f.mask * product * f.rstd : 0;
  if (out.sums == nullptr) return;
  const bool clamped = a.squares[channel] / a.pixels - f.mean * f.mean < 0;
  const float grad_var = active && !clamped ? -0.5f * f.mask * product * f.scale * f.rstd * f.rstd : 0;
  const float grad_mean = active ? -f.scale * f.mask * sum - 2 * f.mean * grad_var : 0;
  out.sums[channel] = grad_mean / a.pixels;
  out.squares[channel] = grad_var / a.pixels;
}

struct Grid {
  dim3 grid, block;
};

Grid grid_for(const ChannelAffine& a, int count) {
  const int units = ceil_div(a.channels, count);
  int lanes = 1;
  while (lanes < units && lanes < 32) lanes *= 2;
  const int rows = kThreads / lanes;
  const int64_t wanted = ceil_div<int64_t>(a.pixels, rows * 4);  // four pixels for every thread, at least
  return {dim3(ceil_div(units, lanes), static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks)),
          dim3(lanes, rows)};
}

// Calls body(T(), count) with as many numbers in 16 bytes, or 1 where a row is not made of aligned 16 bytes.
template <typename Body, typename... Pointers>
cudaError_t for_width(const ChannelAffine& a, Body body, Pointers... pointers) {
  return for_number(a.number, [&](auto number) {
    constexpr int kCount = 16 / static_cast<int>(sizeof(number));
    const bool whole =
        a.channels % kCount == 0 && aligned_16(a.x) && aligned_16(a.residual) && (... && aligned_16(pointers));
    return whole ? body(number, std::integral_constant<int, kCount>()) : body(number, std::integral_constant<int, 1>());
  });
}

}  // namespace

cudaError_t masked_affine_forward(const ChannelAffine& affine, void* y, float* mean, float* var, cudaStream_t stream) {
  return for_width(
      affine,
      [&](auto number, auto count) {
        using T = decltype(number);
        const Grid grid = grid_for(affine, count());
        return launch(forward_kernel<T, count()>, grid.grid, grid.block, 0, stream, affine, static_cast<T*>(y), mean,
                      var);
      },
      y);
}

int64_t masked_affine_workspace(const ChannelAffine& affine) {
  return int64_t{2} * kMaxBlocks * affine.channels * static_cast<int64_t>(sizeof(float));
}

cudaError_t masked_affine_backward(const ChannelAffine& affine, const void* grad_y, void* grad_x, void* grad_residual,
                                   const ChannelGradients& gradients, void* workspace, cudaStream_t stream) {
  float* partial = static_cast<float*>(workspace);
  return for_width(
      affine,
      [&](auto number, auto count) {
        using T = decltype(number);
        const Grid grid = grid_for(affine, count());
        HWPRUNE_TRY(launch(backward_kernel<T, count()>, grid.grid, grid.block, 0, stream, affine,
                           static_cast<const T*>(grad_y), static_cast<T*>(grad_x), static_cast<T*>(grad_residual),
                           partial));
        return launch(finish_kernel, ceil_div(affine.channels, 32), dim3(32, kReduceRows), 0, stream, affine, partial,
                      static_cast<int>(grid.grid.y), gradients);
      },
      grad_y, grad_x, grad_residual);
}

}  // namespace hwprune
