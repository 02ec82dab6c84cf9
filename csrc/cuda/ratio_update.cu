#include "cuda/ratio_update.cuh"
#include "soft_threshold.h"

namespace hwprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The reduction of `value` over the block, in every thread.
template <typename Reduce>
__device__ float block_reduce(float value, Reduce reduce) {
  __shared__ float partial[kWarps];
  for (int lane = 16; lane > 0; lane /= 2) value = reduce(value, __shfl_xor_sync(0xffffffffu, value, lane));
  __syncthreads();  // the last call's partials have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < kWarps; ++warp) value = reduce(value, partial[warp]);
  return value;
}

__device__ float keep_probability(float z) {
  const float clipped = fminf(fmaxf(z, -kClip), kClip);
  return fminf(1.0f / (1.0f + expf(-clipped)) + kFloor, 1.0f);
}

__device__ float log_importance(float importance) { return logf(fmaxf(importance, kSmallestImportance)); }

__global__ void __launch_bounds__(kThreads)
    ratio_forward_kernel(const float* __restrict__ theta, const float* __restrict__ importance,
                         const int64_t* __restrict__ offsets, const float* __restrict__ uniforms,
                         float* __restrict__ log_threshold, float* __restrict__ probability, float* __restrict__ mask,
                         float temperature) {
  const int64_t group = blockIdx.x, start = offsets[group], end = offsets[group + 1];
  float largest = -INFINITY, negated_smallest = -INFINITY;
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
    const float value = log_importance(importance[i]);
    largest = fmaxf(largest, value);
    negated_smallest = fmaxf(negated_smallest, -value);
  }
  largest = block_reduce(largest, Max());
  negated_smallest = block_reduce(negated_smallest, Max());

  const float wanted = static_cast<float>(end - start) / (1.0f + expf(-theta[group]));
  float low = -temperature * (largest + negated_smallest) - kClip, high = kClip;
  for (int iteration = 0; iteration < kMaxIterations && high - low > kTolerance; ++iteration) {
    const float middle = 0.5f * (low + high);
    float total = 0.0f;
    for (int64_t i = start + threadIdx.x; i < end; i += kThreads)
      total += keep_probability(temperature * (log_importance(importance[i]) - largest) - middle);
    total = block_reduce(total, Sum());  // the same in every thread: all take the same branch
    (total > wanted ? low : high) = middle;
  }

  const float s = 0.5f * (low + high);
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
    const float p = keep_probability(temperature * (log_importance(importance[i]) - largest) - s);
    probability[i] = p;
    mask[i] = uniforms[i] < p ? 1.0f : 0.0f;
  }
  if (threadIdx.x == 0) log_threshold[group] = largest + s / temperature;
}

}  // namespace

cudaError_t ratio_forward(const float* theta, const float* importance, const int64_t* offsets, const float* uniforms,
                          float* log_threshold, float* probability, float* mask, int64_t groups, float temperature,
                          cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  ratio_forward_kernel<<<static_cast<unsigned>(groups), kThreads, 0, stream>>>(
      theta, importance, offsets, uniforms, log_threshold, probability, mask, temperature);
  return cudaGetLastError();
}

}  // namespace hwprune
