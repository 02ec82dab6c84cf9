// Keep ratios of all groups in one launch, on flat ragged arrays in device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cost_tables.h"

namespace hwprune {

// As hwprune::RatioForward of cpu/ratio_update.hpp: one block per group, asynchronous on `stream`.
cudaError_t ratio_forward(const float* theta, const float* importance, const int64_t* offsets, const float* uniforms,
                          float* log_threshold, float* probability, float* mask, int64_t groups, float temperature,
                          uint64_t seed, cudaStream_t stream);

// As hwprune::RatioStep of cpu/ratio_update.hpp.
struct RatioStep {
  const float* grad_mask;    // [channels]
  const float* probability;  // [channels]
  const int64_t* offsets;    // [groups + 1], increasing
  const float* before;       // [groups], theta; a copy of it where tables are given, for every block reads all
  float* theta;              // [groups], written
  float* exp_avg;            // [groups], updated
  float* exp_avg_sq;         // [groups], updated
  float* ratio_grad;         // [groups], written
  float* cost;               // [1], written where tables are given
  float* cost_grad;          // [groups], d cost / d ratio; written where tables are given
  float multiplier, penalty, cut;
  float rate, beta1, take1, beta2, take2, correction2, eps;  // lr / (1 - beta1^step), 1 - beta, 1 / (1 - beta2^step)
};

// Bytes of shared memory that a block of ratio_step takes with tables of so many axes and terms.
int64_t ratio_step_shared(int64_t axes, int64_t terms);

// One block per group, asynchronous on `stream`. Without `tables` the gradient of the cost is given. With them,
// ratio_step_shared must not exceed what the device lets a block have.
cudaError_t ratio_step(const RatioStep& args, const CostTables* tables, int64_t groups, cudaStream_t stream);

}  // namespace hwprune
