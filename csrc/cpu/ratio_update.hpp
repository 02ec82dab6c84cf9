// Keep ratios of all groups at once, on flat ragged arrays: group g owns the channels offsets[g] .. offsets[g + 1].
#pragma once

#include <cstdint>

#include "cost_tables.h"

namespace hwprune {

// Ratios to masks. Solves, for every group, the soft threshold at which the mean keep probability is sigmoid(theta[g]),
// and draws the Bernoulli masks: mask = 1 where uniform < probability.
struct RatioForward {
  const float* theta;       // [groups]
  const float* importance;  // [channels], >= 0
  const int64_t* offsets;   // [groups + 1], increasing
  const float* uniforms;    // [channels], in [0, 1), or null: then Philox numbers of `seed`
  float* log_threshold;     // [groups], written
  float* probability;       // [channels], written
  float* mask;              // [channels], written
  int64_t groups;
  double temperature;
  uint64_t seed;
  int64_t threads;  // at most
};
void ratio_forward(const RatioForward& args);

struct Adam {
  double lr, beta1, beta2, eps;
  int64_t step;  // counted from 1
};

// Mask gradients to ratios. Only channels whose p (1 - p) exceeds `cut` enter the gradient of a ratio; the gradient of
// the cost, times the multiplier, is added; Adam then moves theta in place.
struct RatioStep {
  const float* grad_mask;    // [channels]
  const float* probability;  // [channels]
  const int64_t* offsets;    // [groups + 1], increasing
  const float* cost_grad;    // [groups], d cost / d ratio
  float* theta;              // [groups], updated
  float* exp_avg;            // [groups], updated
  float* exp_avg_sq;         // [groups], updated
  float* ratio_grad;         // [groups], written
  int64_t groups;
  double multiplier;
  double cut;
  Adam adam;
  int64_t threads;  // at most
};
void ratio_step(const RatioStep& args);

// The cost at ratios sigmoid(theta), and its gradient by the ratios.
void table_cost(const CostTables& tables, const float* theta, int64_t groups, float* cost, float* cost_grad);

}  // namespace hwprune
