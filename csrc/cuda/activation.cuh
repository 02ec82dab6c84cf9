// Activations, their slopes, and the choice of a number format at run time.
#pragma once

#include "cuda/masked_conv.cuh"
#include "cuda/mma.cuh"

namespace hwprune {

// NaN stays NaN, as in torch.
__device__ inline float activate(Activation act, float z) {
  switch (act) {
    case Activation::kRelu:
      return z < 0 ? 0 : z;
    case Activation::kRelu6:
      return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::kSilu:
      return z / (1 + expf(-z));
    case Activation::kGelu:
      return 0.5f * z * (1 + erff(z * 0.70710678f));
    default:
      return z;
  }
}

__device__ inline float slope(Activation act, float z) {
  switch (act) {
    case Activation::kRelu:
      return z > 0 ? 1 : 0;
    case Activation::kRelu6:
      return z > 0 && z < 6 ? 1 : 0;
    case Activation::kSilu: {
      const float gate = 1 / (1 + expf(-z));
      return gate * (1 + z * (1 - gate));
    }
    case Activation::kGelu:
      return 0.5f * (1 + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
    default:
      return 1;
  }
}

// 16 bytes of numbers, or one.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// Calls body(T()) for the number format's type.
template <typename Body>
cudaError_t for_number(Number number, Body body) {
  switch (number) {
    case Number::kFloat16:
      return body(Half());
    case Number::kBFloat16:
      return body(BFloat());
    default:
      return body(float());
  }
}

template <typename T>
__host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// The sum over `rows` of partial [rows, channels] for channel blockIdx.x * 32 + threadIdx.x, in every thread of a block
// of 32 x kReduceRows; in a fixed order, so that results repeat.
constexpr int kReduceRows = 32;
__device__ inline float column_total(const float* partial, int64_t rows, int channels) {
  __shared__ float part[kReduceRows][33];
  const int channel = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (channel < channels)
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kReduceRows) sum += partial[row * channels + channel];
  __syncthreads();  // the last call's parts have been read
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  float total = 0;
  for (int row = 0; row < kReduceRows; ++row) total += part[row][threadIdx.x];
  return total;
}

}  // namespace hwprune
