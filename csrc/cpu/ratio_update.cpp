#include "cpu/ratio_update.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/parallel.hpp"
#include "philox.h"
#include "soft_threshold.h"

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

// `clip` is kClip. As a constant it would have compilers branch on the sigmoids of its two ends.
inline float sigmoid_of_clipped(float z, float clip) {
  const float clipped = std::min(std::max(z, -clip), clip);
  return 1.0f / (1.0f + exp_poly(-clipped));
}

struct Range {
  float least, largest;
};

HWPRUNE_CLONES Range logs(const float* importance, int64_t channels, float* out) {
  float least = std::numeric_limits<float>::infinity(), largest = -least;
#pragma omp simd reduction(min : least) reduction(max : largest)
  for (int64_t i = 0; i < channels; ++i) {
    const float value = log_poly(std::max(importance[i], kSmallestImportance));
    out[i] = value;
    least = std::min(least, value);
    largest = std::max(largest, value);
  }
  return {least, largest};
}

struct Moments {
  float mean, variance;
};

// values <- temperature * (values - largest)
HWPRUNE_CLONES Moments scale(float* values, int64_t channels, float temperature, float largest) {
  float total = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : total, squares)
  for (int64_t i = 0; i < channels; ++i) {
    const float z = temperature * (values[i] - largest);
    values[i] = z;
    total += z;
    squares += z * z;
  }
  const float mean = total / static_cast<float>(channels);
  return {mean, std::max(squares / static_cast<float>(channels) - mean * mean, 0.0f)};
}

struct Mass {
  float total;      // sum of p
  float slope;      // -d total / d s
  float curvature;  // d2 total / d s2
};

HWPRUNE_CLONES Mass mass_at(const float* scaled, int64_t channels, float s, float clip) {
  float total = 0.0f, slope = 0.0f, curvature = 0.0f;
#pragma omp simd reduction(+ : total, slope, curvature)
  for (int64_t i = 0; i < channels; ++i) {
    const float soft = sigmoid_of_clipped(scaled[i] - s, clip);
    const float spread = soft + kFloor < 1.0f ? soft * (1.0f - soft) : 0.0f;
    total += std::min(soft + kFloor, 1.0f);
    slope += spread;
    curvature += spread * (1.0f - 2.0f * soft);
  }
  return {total, slope, curvature};
}

HWPRUNE_CLONES void draw(const float* scaled, const float* uniforms, int64_t channels, float s, float clip,
                         float* probability, float* mask) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) {
    const float p = std::min(sigmoid_of_clipped(scaled[i] - s, clip) + kFloor, 1.0f);
    probability[i] = p;
    mask[i] = uniforms[i] < p ? 1.0f : 0.0f;
  }
}

// Uniform numbers first, first + 1, ... of a seed; `first` is a multiple of 4.
HWPRUNE_CLONES void draw_uniforms(uint64_t seed, int64_t first, int64_t count, float* out) {
  constexpr int64_t kBlocks = 64;
  uint32_t words[4][kBlocks];  // by word, so that every word's loop is vector code
  for (int64_t start = 0; start < count; start += 4 * kBlocks) {
    const uint64_t counter = static_cast<uint64_t>(first + start) / 4;
#pragma omp simd
    for (int64_t i = 0; i < kBlocks; ++i) {
      const PhiloxBlock block = philox(counter + static_cast<uint64_t>(i), seed);
      for (int word = 0; word < 4; ++word) words[word][i] = block.word[word];
    }
    const int64_t blocks = std::min(kBlocks, (count - start + 3) / 4);
    for (int64_t i = 0; i < blocks; ++i)
      for (int word = 0; word < 4; ++word) out[start + 4 * i + word] = uniform_of(words[word][i]);
  }
}

struct Near {
  float weighted, total;
};

// Sums over the channels near the threshold, of p (1 - p) with and without their gradients.
HWPRUNE_CLONES Near near_threshold(const float* probability, const float* grad_mask, int64_t channels, float cut) {
  float weighted = 0.0f, total = 0.0f;
#pragma omp simd reduction(+ : weighted, total)
  for (int64_t i = 0; i < channels; ++i) {
    const float p = probability[i], soft = p - kFloor;
    const float spread = p < 1.0f ? soft * (1.0f - soft) : 0.0f;  // at the cap p no longer moves
    weighted += spread > cut ? spread * grad_mask[i] : 0.0f;
    total += spread > cut ? spread : 0.0f;
  }
  return {weighted, total};
}

// Channels that are worth another thread: some ten microseconds of work.
constexpr int64_t kForwardGrain = 1 << 12, kStepGrain = 1 << 15;

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// One group; the scratch arrays hold its channels.
void forward_group(const RatioForward& args, int64_t group, float* scaled, float* drawn) {
  const int64_t start = args.offsets[group], channels = args.offsets[group + 1] - start;
  const float temperature = static_cast<float>(args.temperature);
  const Range range = logs(args.importance + start, channels, scaled);
  const Moments moments = scale(scaled, channels, temperature, range.largest);
  const float ratio = static_cast<float>(sigmoid(args.theta[group]));
  const float wanted = static_cast<float>(sigmoid(args.theta[group]) * static_cast<double>(channels));
  Threshold threshold(ratio, temperature * (range.least - range.largest), moments.mean, moments.variance);
  for (int iteration = 0; iteration < kMaxIterations; ++iteration) {
    const Mass mass = mass_at(scaled, channels, threshold.s, kClip);
    if (threshold.refine(mass.total, wanted, mass.slope, mass.curvature)) break;
  }
  args.log_threshold[group] = static_cast<float>(range.largest + threshold.s / args.temperature);
  const float* uniforms = args.uniforms + start;
  if (args.uniforms == nullptr) {
    const int64_t first = start / 4 * 4;
    draw_uniforms(args.seed, first, start - first + channels, drawn);
    uniforms = drawn + (start - first);
  }
  draw(scaled, uniforms, channels, threshold.s, kClip, args.probability + start, args.mask + start);
}

void forward_groups(const RatioForward& args, int64_t begin, int64_t end) {
  int64_t widest = 0;
  for (int64_t g = begin; g < end; ++g) widest = std::max(widest, args.offsets[g + 1] - args.offsets[g]);
  std::vector<float> scaled(static_cast<size_t>(widest));
  std::vector<float> drawn(args.uniforms == nullptr ? static_cast<size_t>(widest) + 6 : 0);  // whole blocks of four
  for (int64_t g = begin; g < end; ++g) forward_group(args, g, scaled.data(), drawn.data());
}

void step_groups(const RatioStep& args, int64_t begin, int64_t end) {
  const Adam& adam = args.adam;
  const double correction1 = 1.0 - std::pow(adam.beta1, static_cast<double>(adam.step));
  const double correction2 = 1.0 - std::pow(adam.beta2, static_cast<double>(adam.step));
  for (int64_t g = begin; g < end; ++g) {
    const int64_t start = args.offsets[g], channels = args.offsets[g + 1] - start;
    const Near near =
        near_threshold(args.probability + start, args.grad_mask + start, channels, static_cast<float>(args.cut));
    const double mean_grad = near.total > 0.0f ? static_cast<double>(near.weighted) / near.total : 0.0;
    const double mask_grad = static_cast<double>(channels) * mean_grad;
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

// Calls body(begin, end) on ranges of groups that hold about as many channels each.
template <typename Body>
void parallel_groups(const int64_t* offsets, int64_t groups, int64_t grain, int64_t threads, const Body& body) {
  const int64_t* last = offsets + groups;
  const auto group_at = [=](int64_t channel) { return std::lower_bound(offsets, last, channel) - offsets; };
  if (groups == 0) return;
  parallel(*last, grain, threads, [&](int64_t, int64_t begin, int64_t end) { body(group_at(begin), group_at(end)); });
}

}  // namespace

void ratio_forward(const RatioForward& args) {
  parallel_groups(args.offsets, args.groups, kForwardGrain, args.threads,
                  [&](int64_t begin, int64_t end) { forward_groups(args, begin, end); });
}

void ratio_step(const RatioStep& args) {
  parallel_groups(args.offsets, args.groups, kStepGrain, args.threads,
                  [&](int64_t begin, int64_t end) { step_groups(args, begin, end); });
}

void table_cost(const CostTables& tables, const float* theta, int64_t groups, float* cost, float* cost_grad) {
  std::vector<double> ratios(static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g) ratios[g] = sigmoid(theta[g]);

  struct Place {
    int64_t interval;
    double part, per_step;
  };
  std::vector<Place> places(static_cast<size_t>(tables.axes));
  for (int64_t axis = 0; axis < tables.axes; ++axis) {
    double size = tables.origin[axis];
    for (int64_t i = axis * tables.most_members; i < (axis + 1) * tables.most_members; ++i)
      size += tables.weights[i] * ratios[tables.members[i]];
    const float* starts = tables.starts + axis * tables.intervals;
    int64_t interval = 0;
    for (int64_t i = 1; i < tables.intervals; ++i) interval += starts[i] <= size;
    const double per_step = tables.per_step[axis * tables.intervals + interval];
    places[axis] = {interval, std::clamp((size - starts[interval]) * per_step, 0.0, 1.0), per_step};
  }

  double total = 0.0;
  std::vector<double> slopes(static_cast<size_t>(2 * tables.terms));
  for (int64_t term = 0; term < tables.terms; ++term) {
    const Place &a = places[tables.pair[2 * term]], &b = places[tables.pair[2 * term + 1]];
    const int64_t right = tables.strides[2 * term], up = tables.strides[2 * term + 1];
    const float* corner = tables.flat + tables.base[term] + a.interval * right + b.interval * up;
    const double t00 = corner[0], t10 = corner[right], t01 = corner[up], t11 = corner[right + up];
    const double low = t00 + a.part * (t10 - t00), high = t01 + a.part * (t11 - t01);
    total += low + b.part * (high - low);
    slopes[2 * term] = ((1 - b.part) * (t10 - t00) + b.part * (t11 - t01)) * a.per_step;
    slopes[2 * term + 1] = (high - low) * b.per_step;
  }
  *cost = static_cast<float>(total);

  for (int64_t g = 0; g < groups; ++g) {
    double slope = 0.0;
    for (int64_t i = g * tables.most_uses; i < (g + 1) * tables.most_uses; ++i)
      slope += tables.use_weights[i] * slopes[tables.uses[i]];
    cost_grad[g] = static_cast<float>(slope);
  }
}

}  // namespace hwprune
