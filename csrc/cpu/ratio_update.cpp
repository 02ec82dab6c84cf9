#include "cpu/ratio_update.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "soft_threshold.h"

// One binary for every chip: the loader picks the widest clone that the processor runs. Sanitizers do not survive the
// indirect functions that this needs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HWPRUNE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HWPRUNE_CLONES
#endif

namespace hwprune {
namespace {

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// exp(x) for |x| <= 20, without branches so that loops over it become vector code (polynomial of Cephes' expf).
inline float exp_poly(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float rounded = x * 1.44269504088896341f + kRound;
  const int32_t exponent = bits_of(rounded) - bits_of(kRound);
  const float k = rounded - kRound;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * float_of((exponent + 127) << 23);
}

// log(x) for positive, normal x, without branches (polynomial of Cephes' logf).
inline float log_poly(float x) {
  const int32_t bits = bits_of(x);
  // Mantissa in [sqrt(1/2), sqrt(2)): the offset moves the exponent's step there from 1.
  const int32_t shifted = bits - 0x3f3504f3;
  const int32_t exponent = shifted >> 23;
  const float r = float_of((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float y = 7.0376836292e-2f;
  y = y * r - 1.1514610310e-1f;
  y = y * r + 1.1676998740e-1f;
  y = y * r - 1.2420140846e-1f;
  y = y * r + 1.4249322787e-1f;
  y = y * r - 1.6668057665e-1f;
  y = y * r + 2.0000714765e-1f;
  y = y * r - 2.4999993993e-1f;
  y = y * r + 3.3333331174e-1f;
  const float k = static_cast<float>(exponent);
  const float square = r * r;
  const float tail = y * r * square - 2.12194440e-4f * k - 0.5f * square;
  return r + tail + 0.693359375f * k;
}

inline float sigmoid_of_clipped(float z) {
  const float clipped = std::min(std::max(z, -kClip), kClip);
  return 1.0f / (1.0f + exp_poly(-clipped));
}

HWPRUNE_CLONES void logs(const float* importance, int64_t channels, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) out[i] = log_poly(std::max(importance[i], kSmallestImportance));
}

struct Mass {
  float total;  // sum of p
  float slope;  // -d total / d s
};

HWPRUNE_CLONES Mass mass_at(const float* scaled, int64_t channels, float s) {
  float total = 0.0f, slope = 0.0f;
#pragma omp simd reduction(+ : total, slope)
  for (int64_t i = 0; i < channels; ++i) {
    const float soft = sigmoid_of_clipped(scaled[i] - s);
    total += std::min(soft + kFloor, 1.0f);
    slope += soft + kFloor < 1.0f ? soft * (1.0f - soft) : 0.0f;
  }
  return {total, slope};
}

HWPRUNE_CLONES void draw(const float* scaled, const float* uniforms, int64_t channels, float s, float* probability,
                         float* mask) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) {
    const float p = std::min(sigmoid_of_clipped(scaled[i] - s) + kFloor, 1.0f);
    probability[i] = p;
    mask[i] = uniforms[i] < p ? 1.0f : 0.0f;
  }
}

// The s at which the mean of p is `ratio`: Newton's method inside a bracket that every evaluation tightens, halved
// wherever Newton leaves it or crawls. `scaled` is <= 0, largest 0.
float solve(const float* scaled, int64_t channels, float smallest, double ratio) {
  const double wanted = ratio * static_cast<double>(channels);
  float low = smallest - kClip, high = kClip;  // all kept at low, all at the floor at high
  float s = 0.5f * (low + high);
  float last_width = 2.0f * (high - low);
  for (int iteration = 0; iteration < kMaxIterations && high - low > kTolerance; ++iteration) {
    const Mass mass = mass_at(scaled, channels, s);
    const double excess = mass.total - wanted;
    (excess > 0.0 ? low : high) = s;
    const bool shrinking = high - low <= 0.5f * last_width;
    last_width = high - low;
    const float newton = s + static_cast<float>(excess / std::max(mass.slope, 1e-30f));
    if (newton > low && newton < high && (shrinking || std::fabs(newton - s) < 0.25f * last_width)) {
      const bool converged = std::fabs(newton - s) <= kTolerance;
      s = newton;
      if (converged) break;
    } else {
      s = 0.5f * (low + high);
    }
  }
  return s;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace

void ratio_forward(const RatioForward& args) {
  int64_t widest = 0;
  for (int64_t g = 0; g < args.groups; ++g) widest = std::max(widest, args.offsets[g + 1] - args.offsets[g]);
  std::vector<float> scaled(static_cast<size_t>(widest));
  const float temperature = static_cast<float>(args.temperature);
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t start = args.offsets[g], channels = args.offsets[g + 1] - start;
    logs(args.importance + start, channels, scaled.data());
    const auto [least, most] = std::minmax_element(scaled.begin(), scaled.begin() + channels);
    const float largest = *most, smallest = temperature * (*least - largest);
    for (int64_t i = 0; i < channels; ++i) scaled[i] = temperature * (scaled[i] - largest);
    const float s = solve(scaled.data(), channels, smallest, sigmoid(args.theta[g]));
    args.log_threshold[g] = static_cast<float>(largest + s / args.temperature);
    draw(scaled.data(), args.uniforms + start, channels, s, args.probability + start, args.mask + start);
  }
}

void ratio_step(const RatioStep& args) {
  const Adam& adam = args.adam;
  const double correction1 = 1.0 - std::pow(adam.beta1, static_cast<double>(adam.step));
  const double correction2 = 1.0 - std::pow(adam.beta2, static_cast<double>(adam.step));
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t start = args.offsets[g], end = args.offsets[g + 1];
    double weighted = 0.0, total = 0.0;
#pragma omp simd reduction(+ : weighted, total)
    for (int64_t i = start; i < end; ++i) {
      const float p = args.probability[i], soft = p - kFloor;
      const float spread = p < 1.0f ? soft * (1.0f - soft) : 0.0f;  // at the cap p no longer moves
      const bool near = spread > args.cut;
      weighted += near ? static_cast<double>(spread) * args.grad_mask[i] : 0.0;
      total += near ? static_cast<double>(spread) : 0.0;
    }
    const double mask_grad = total > 0.0 ? static_cast<double>(end - start) * weighted / total : 0.0;
    const double ratio_grad = mask_grad + args.multiplier * args.cost_grad[g];
    const double ratio = sigmoid(args.theta[g]);
    const double grad = ratio_grad * ratio * (1.0 - ratio);
    const double mean = adam.beta1 * args.exp_avg[g] + (1.0 - adam.beta1) * grad;
    const double square = adam.beta2 * args.exp_avg_sq[g] + (1.0 - adam.beta2) * grad * grad;
    args.theta[g] -= static_cast<float>(adam.lr * (mean / correction1) / (std::sqrt(square / correction2) + adam.eps));
    args.exp_avg[g] = static_cast<float>(mean);
    args.exp_avg_sq[g] = static_cast<float>(square);
    args.ratio_grad[g] = static_cast<float>(ratio_grad);
  }
}

}  // namespace hwprune
