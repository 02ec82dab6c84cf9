// The map from importance to keep probability, as the CPU and the CUDA backend share it.
//
//   z = temperature * (log importance - log threshold)
//   p = min(sigmoid(clip(z, +-kClip)) + kFloor, 1)
//
// Solving for the threshold runs in the variable s = temperature * (log threshold - log largest importance), so that a
// fixed tolerance on s is a tolerance on the log threshold that shrinks like 1 / temperature.
#pragma once

namespace hwprune {

constexpr float kClip = 20.0f;
constexpr float kFloor = 0.01f;                // every channel keeps at least one chance in a hundred
constexpr float kTolerance = 1.0f / 65536.0f;  // on s; the keep ratio is then off by at most a quarter of it
constexpr float kSmallestImportance = 1.17549435e-38f;
constexpr int kMaxIterations = 64;

}  // namespace hwprune
