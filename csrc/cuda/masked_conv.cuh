// Convolution that computes only what masks leave active, on NHWC tensors in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace hwprune {

enum class Number : int { kFloat32, kFloat16, kBFloat16 };
enum class Activation : int { kNone, kRelu, kRelu6, kSilu, kGelu };

// y [batch, out_height, out_width, out_channels] from x [batch, height, width, in_channels] and weight [out_channels,
// kernel_height, kernel_width, in_channels / groups], all dense. Every extent is positive, every image below 2^31
// elements, and each tensor's pixels are below 2^31.
struct Convolution {
  int batch, in_channels, height, width;
  int out_channels, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width;
  int padding_height, padding_width, dilation_height, dilation_width, groups;
  Number number;
  bool tf32;               // float32 products may be rounded to tf32
  const float* in_mask;    // [in_channels] or null; exact zeros are skipped
  const float* out_mask;   // [out_channels] or null
  const int64_t* columns;  // [column_count] increasing, (row * kernel_width + column) * in_channels + channel
  int column_count;        // -1 where all columns are walked
  int product_images;      // of so many images at a time backward-input sums the columns' products; 0: it is dense
};

// What the tiled kernels ask for in dynamic shared memory, by name and last template argument.
struct SharedMemory {
  const char* kernel;
  int tile, bytes;
};
std::array<SharedMemory, 5> masked_conv_shared();

// Bytes of scratch memory, aligned to 16, that each launcher below wants for this convolution.
int64_t masked_conv_workspace(const Convolution& conv);

// y = act(out_mask * (scale * conv(in_mask * x) + shift) + residual) and, where not null, raw = conv(in_mask * x) with
// zeros in inactive channels. All launches are asynchronous on `stream` and nothing waits for the device.
cudaError_t masked_conv_forward(const Convolution& conv, const void* x, const void* weight, const float* scale,
                                const float* shift, const void* residual, Activation act, void* y, void* raw,
                                void* workspace, cudaStream_t stream);

// raw as above, and per output channel its sum and the sum of its squares.
cudaError_t masked_conv_forward_stats(const Convolution& conv, const void* x, const void* weight, void* raw,
                                      float* sums, float* squares, void* workspace, cudaStream_t stream);

// grad_x, and where not null the gradient of in_mask.
cudaError_t masked_conv_backward_input(const Convolution& conv, const void* grad_raw, const void* x, const void* weight,
                                       void* grad_x, float* grad_in_mask, void* workspace, cudaStream_t stream);

// grad_weight, laid out as weight; zeros where inactive.
cudaError_t masked_conv_backward_weight(const Convolution& conv, const void* grad_raw, const void* x, void* grad_weight,
                                        void* workspace, cudaStream_t stream);

// act(mask * (scale * x + shift) + residual) per channel over x [pixels, channels]. With `sums`, scale and shift are
// those of BatchNorm in training: weight / sqrt(var + eps) and bias - mean * scale.
struct ChannelAffine {
  int64_t pixels;
  int channels;
  Number number;
  Activation act;
  float eps;
  const void* x;
  const void* residual;               // [pixels, channels] or null
  const float *mask, *scale, *shift;  // [channels] or null
  const float *sums, *squares;        // [channels]; both or none
};

// Writes y, and with `sums` the mean and biased variance per channel.
cudaError_t masked_affine_forward(const ChannelAffine& affine, void* y, float* mean, float* var, cudaStream_t stream);

int64_t masked_affine_workspace(const ChannelAffine& affine);

// Gradients per channel; null ones are not wanted. grad_sums and grad_squares go with `sums`, and `grad_scale`,
// `grad_shift` are then those of BatchNorm's weight and bias.
struct ChannelGradients {
  float *mask, *scale, *shift, *sums, *squares;
};

// From grad_y: grad_x, and where not null the residual's gradient.
cudaError_t masked_affine_backward(const ChannelAffine& affine, const void* grad_y, void* grad_x, void* grad_residual,
                                   const ChannelGradients& gradients, void* workspace, cudaStream_t stream);

}  // namespace hwprune
