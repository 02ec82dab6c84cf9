// Keep ratios of all groups in one launch, on flat ragged arrays in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace hwprune {

// As hwprune::RatioForward of cpu/ratio_update.hpp: one block per group, asynchronous on `stream`.
cudaError_t ratio_forward(const float* theta, const float* importance, const int64_t* offsets, const float* uniforms,
                          float* log_threshold, float* probability, float* mask, int64_t groups, float temperature,
                          cudaStream_t stream);

}  // namespace hwprune
