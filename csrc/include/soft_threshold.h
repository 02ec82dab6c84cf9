// The map from importance to keep probability and the search for its threshold, shared by the CPU and the CUDA backend.
//
//   z = temperature * (log importance - log threshold)
//   p = min(sigmoid(clip(z, +-kClip)) + kFloor, 1)
//
// Solving for the threshold runs in the variable s = temperature * (log threshold - log largest importance), so that a
// fixed tolerance on s is a tolerance on the log threshold that shrinks like 1 / temperature.
#pragma once

#include <cmath>

#include "both.h"

namespace hwprune {

constexpr float kClip = 20.0f;
constexpr float kFloor = 0.01f;                // every channel keeps at least one chance in a hundred
constexpr float kTolerance = 1.0f / 65536.0f;  // on s; the keep ratio is then off by at most a quarter of it
// A Newton step d leaves an error below d * d / 2 on s, for |f''| <= |f'| of a sum of sigmoids, and, where it crosses
// the cap of p at 1, one below d / 100 on the keep ratio: after a step as small as this, both are within the tolerance.
constexpr float kLastStep = 1.0f / 1024.0f;
constexpr float kSmallestImportance = 1.17549435e-38f;
constexpr int kMaxIterations = 64;

// Finds the s at which the sum of p is `wanted`: Newton's method, or Halley's, inside a bracket that every evaluation
// tightens, halved wherever they leave it or crawl. Use: evaluate at s, call refine, until that returns true.
struct Threshold {
  float low, high, s, last_width;

  // From the least, the mean and the variance of z at s = 0, whose largest is 0. The first guess is exact for sigmoids
  // over a normal distribution as a probit approximates them: E sigmoid(z) = sigmoid(mean / sqrt(1 + pi variance / 8)).
  HWPRUNE_BOTH Threshold(float ratio, float least, float mean, float variance)
      : low(least - kClip), high(kClip), last_width(2.0f * (high - low)) {  // all kept at low, all at the floor at high
    const float soft = fminf(fmaxf(ratio - kFloor, 1e-3f), 1.0f - 1e-3f);
    const float guess = mean - sqrtf(1.0f + 0.3926991f * variance) * logf(soft / (1.0f - soft));
    s = fminf(fmaxf(guess, low), high);
  }

  // total: the sum of p at s. slope: -d total / d s. curvature: d2 total / d s2, for Halley's step; 0 makes it
  // Newton's.
  HWPRUNE_BOTH bool refine(float total, float wanted, float slope, float curvature = 0.0f) {
    const float excess = total - wanted;
    (excess > 0.0f ? low : high) = s;
    const bool shrinking = high - low <= 0.5f * last_width;
    last_width = high - low;
    const float steepness = fmaxf(slope, 1e-30f);
    float step = excess / steepness;
    if (fabsf(step) < 1.0f) step /= 1.0f - 0.5f * step * curvature / steepness;  // |curvature| <= slope
    const float next = s + step;
    if (next >= low && next <= high && (shrinking || fabsf(step) < 0.25f * last_width)) {
      s = next;
      return fabsf(step) <= kLastStep;
    }
    s = 0.5f * (low + high);
    return last_width <= kTolerance;
  }
};

}  // namespace hwprune
