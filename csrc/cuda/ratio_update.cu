#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/ratio_update.cuh"
#include "philox.h"
#include "soft_threshold.h"

// One block per group. Channels are taken four at a time: one 16-byte load where the group begins at such an address,
// as the widths of most networks make it, and one Philox block of random numbers.
namespace hwprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQuads = 2;  // per thread, kept in registers; what a group has beyond 2048 channels is read again

using Partials = float2[2][kWarps];  // Block's, in shared memory

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Reductions of two values over the block, each result in every thread. Two buffers in turn: what a call reads is
// written again only after the barrier of the next, which no thread passes before all have read.
struct Block {
  Partials& partial;
  int turn = 0;

  template <typename Reduce>
  __device__ float2 reduce(float2 value, Reduce reduce) {
    for (int lane = 16; lane > 0; lane /= 2) {
      value.x = reduce(value.x, __shfl_xor_sync(0xffffffffu, value.x, lane));
      value.y = reduce(value.y, __shfl_xor_sync(0xffffffffu, value.y, lane));
    }
    float2* mine = partial[turn];
    turn ^= 1;
    if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = value;
    __syncthreads();
    value = mine[0];
    for (int warp = 1; warp < kWarps; ++warp) {
      value.x = reduce(value.x, mine[warp].x);
      value.y = reduce(value.y, mine[warp].y);
    }
    return value;
  }
};

struct Quad {
  float value[4];
};

// A group's channels: `first` of them in the flat arrays, `count` of them.
struct Span {
  int64_t first;
  int count;

  __device__ Quad load(const float* __restrict__ flat, int at, float outside) const {
    const float* from = flat + first + at;
    if (aligned_16(from) && at + 4 <= count) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      return {{four.x, four.y, four.z, four.w}};
    }
    Quad quad;
    for (int i = 0; i < 4; ++i) quad.value[i] = at + i < count ? from[i] : outside;
    return quad;
  }

  __device__ void store(float* __restrict__ flat, int at, const Quad& quad) const {
    float* to = flat + first + at;
    if (aligned_16(to) && at + 4 <= count) {
      *reinterpret_cast<float4*>(to) = {quad.value[0], quad.value[1], quad.value[2], quad.value[3]};
      return;
    }
    for (int i = 0; i < 4; ++i)
      if (at + i < count) to[i] = quad.value[i];
  }
};

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ float soft(float z) { return sigmoid(fminf(fmaxf(z, -kClip), kClip)); }

// temperature * (log importance - largest) of four channels; those outside are 0 and left out by their index.
__device__ Quad scaled(const Span& span, const float* importance, int at, float temperature, float largest) {
  Quad quad = span.load(importance, at, 1.0f);
  for (float& value : quad.value) value = temperature * (logf(fmaxf(value, kSmallestImportance)) - largest);
  return quad;
}

struct Extremes {
  float largest = -INFINITY, negated_least = -INFINITY;
  __device__ void operator()(float value) {
    largest = fmaxf(largest, value);
    negated_least = fmaxf(negated_least, -value);
  }
};

struct Moments {
  float total = 0.0f, squares = 0.0f;
  __device__ void operator()(float z) {
    total += z;
    squares += z * z;
  }
};

struct Mass {
  float s, total = 0.0f, slope = 0.0f;
  __device__ void operator()(float z) {
    const float probability = soft(z - s);
    total += fminf(probability + kFloor, 1.0f);
    slope += probability + kFloor < 1.0f ? probability * (1.0f - probability) : 0.0f;
  }
};

template <typename Accumulate>
__device__ void accumulate(Accumulate& into, const Quad& quad, int at, int count) {
  for (int i = 0; i < 4; ++i)
    if (at + i < count) into(quad.value[i]);
}

__global__ void __launch_bounds__(kThreads, 1)
    ratio_forward_kernel(const float* __restrict__ theta, const float* __restrict__ importance,
                         const int64_t* __restrict__ offsets, const float* __restrict__ uniforms,
                         float* __restrict__ log_threshold, float* __restrict__ probability, float* __restrict__ mask,
                         float temperature, uint64_t seed) {
  __shared__ Partials partial;
  Block block{partial};
  const int64_t group = blockIdx.x, start = offsets[group];
  const Span span{start, static_cast<int>(offsets[group + 1] - start)};
  const float width = static_cast<float>(span.count);
  const int mine = 4 * static_cast<int>(threadIdx.x), stride = 4 * kThreads;

  Quad kept[kQuads];
  // Every channel once: those in registers, then those that are read again.
  const auto each = [&](auto& into, float scale, float largest) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) accumulate(into, kept[j], mine + j * stride, span.count);
    for (int at = mine + kQuads * stride; at < span.count; at += stride)
      accumulate(into, scaled(span, importance, at, scale, largest), at, span.count);
  };

#pragma unroll
  for (int j = 0; j < kQuads; ++j) kept[j] = scaled(span, importance, mine + j * stride, 1.0f, 0.0f);
  Extremes extremes;
  each(extremes, 1.0f, 0.0f);
  const float2 ends = block.reduce({extremes.largest, extremes.negated_least}, Max());
  const float largest = ends.x;

#pragma unroll
  for (int j = 0; j < kQuads; ++j)
    for (float& value : kept[j].value) value = temperature * (value - largest);
  Moments moments;
  each(moments, temperature, largest);
  const float2 sums = block.reduce({moments.total, moments.squares}, Sum());
  const float mean = sums.x / width, variance = fmaxf(sums.y / width - mean * mean, 0.0f);

  const float ratio = sigmoid(theta[group]);
  Threshold threshold(ratio, -temperature * (ends.y + largest), mean, variance);
  for (int iteration = 0; iteration < kMaxIterations; ++iteration) {
    Mass mass{threshold.s};
    each(mass, temperature, largest);
    const float2 found = block.reduce({mass.total, mass.slope}, Sum());  // the same in every thread: all agree
    if (threshold.refine(found.x, ratio * width, found.y)) break;
  }

  const auto draw = [&](const Quad& z, int at) {
    Quad chance, drawn, uniform;
    if (uniforms != nullptr) {
      uniform = span.load(uniforms, at, 1.0f);
    } else {
      PhiloxBlock block;
      for (int i = 0; i < 4; ++i) {
        const uint64_t channel = static_cast<uint64_t>(span.first + at + i);
        if (i == 0 || channel % 4 == 0) block = philox(channel / 4, seed);
        uniform.value[i] = uniform_of(block.word[channel % 4]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      chance.value[i] = fminf(soft(z.value[i] - threshold.s) + kFloor, 1.0f);
      drawn.value[i] = uniform.value[i] < chance.value[i] ? 1.0f : 0.0f;
    }
    span.store(probability, at, chance);
    span.store(mask, at, drawn);
  };
#pragma unroll
  for (int j = 0; j < kQuads; ++j) draw(kept[j], mine + j * stride);
  for (int at = mine + kQuads * stride; at < span.count; at += stride)
    draw(scaled(span, importance, at, temperature, largest), at);
  if (threadIdx.x == 0) log_threshold[group] = largest + threshold.s / temperature;
}

// What table_cost keeps in dynamic shared memory.
int64_t table_bytes(int64_t axes, int64_t terms) {
  return (3 * axes + 2 * terms) * static_cast<int64_t>(sizeof(float));
}

// Looks the whole cost up, in every block for itself: the tables are a few thousand numbers, and reading them again
// from the cache is cheaper than a second launch. The cost, and its derivative by the ratio of `group`, in every
// thread.
__device__ float2 table_cost(const CostTables& tables, const float* __restrict__ before, int64_t group, Block& block) {
  // part [axes], per_step [axes], slopes [terms][2], interval [axes]
  float *part = reinterpret_cast<float*>(dynamic_shared()), *per_step = part + tables.axes,
        *slopes = per_step + tables.axes;
  int* interval = reinterpret_cast<int*>(slopes + 2 * tables.terms);
  for (int64_t axis = threadIdx.x; axis < tables.axes; axis += kThreads) {
    float size = tables.origin[axis];
    for (int64_t i = axis * tables.most_members; i < (axis + 1) * tables.most_members; ++i)
      size += tables.weights[i] * sigmoid(before[tables.members[i]]);
    const float* starts = tables.starts + axis * tables.intervals;
    int found = 0;
    for (int i = 1; i < tables.intervals; ++i) found += starts[i] <= size;
    per_step[axis] = tables.per_step[axis * tables.intervals + found];
    part[axis] = fminf(fmaxf((size - starts[found]) * per_step[axis], 0.0f), 1.0f);
    interval[axis] = found;
  }
  __syncthreads();
  float value = 0.0f;
  for (int64_t term = threadIdx.x; term < tables.terms; term += kThreads) {
    const int64_t a = tables.pair[2 * term], b = tables.pair[2 * term + 1];
    const int64_t right = tables.strides[2 * term], up = tables.strides[2 * term + 1];
    const float* corner = tables.flat + tables.base[term] + interval[a] * right + interval[b] * up;
    const float t00 = corner[0], t10 = corner[right], t01 = corner[up], t11 = corner[right + up];
    const float low = t00 + part[a] * (t10 - t00), high = t01 + part[a] * (t11 - t01);
    value += low + part[b] * (high - low);
    slopes[2 * term] = ((1.0f - part[b]) * (t10 - t00) + part[b] * (t11 - t01)) * per_step[a];
    slopes[2 * term + 1] = (high - low) * per_step[b];
  }
  __syncthreads();
  float slope = 0.0f;
  for (int64_t i = group * tables.most_uses + threadIdx.x; i < (group + 1) * tables.most_uses; i += kThreads)
    slope += tables.use_weights[i] * slopes[tables.uses[i]];
  return block.reduce({value, slope}, Sum());
}

template <bool kPriced>
__global__ void __launch_bounds__(kThreads, 1) ratio_step_kernel(RatioStep args, CostTables tables) {
  __shared__ Partials partial;
  Block block{partial};
  const int64_t group = blockIdx.x, start = args.offsets[group];
  const Span span{start, static_cast<int>(args.offsets[group + 1] - start)};

  float weighted = 0.0f, total = 0.0f;
  for (int at = 4 * static_cast<int>(threadIdx.x); at < span.count; at += 4 * kThreads) {
    const Quad p = span.load(args.probability, at, 1.0f), grad = span.load(args.grad_mask, at, 0.0f);
    for (int i = 0; i < 4; ++i) {
      const float soft = p.value[i] - kFloor;
      const float spread = p.value[i] < 1.0f ? soft * (1.0f - soft) : 0.0f;  // at the cap p no longer moves
      const bool near = spread > args.cut;
      weighted += near ? spread * grad.value[i] : 0.0f;
      total += near ? spread : 0.0f;
    }
  }
  const float2 sums = block.reduce({weighted, total}, Sum());

  float pull = args.multiplier, cost_grad = 0.0f;
  if constexpr (kPriced) {
    const float2 found = table_cost(tables, args.before, group, block);
    pull += args.penalty * found.x;
    cost_grad = found.y;
    if (threadIdx.x == 0) args.cost_grad[group] = cost_grad;
    if (threadIdx.x == 0 && group == 0) *args.cost = found.x;
  } else {
    cost_grad = args.cost_grad[group];
  }
  if (threadIdx.x != 0) return;

  const float mask_grad = sums.y > 0.0f ? static_cast<float>(span.count) * sums.x / sums.y : 0.0f;
  const float ratio_grad = mask_grad + pull * cost_grad;
  const float theta = args.before[group], ratio = sigmoid(theta);
  const float grad = ratio_grad * ratio * (1.0f - ratio);
  const float mean = args.beta1 * args.exp_avg[group] + args.take1 * grad;
  const float square = args.beta2 * args.exp_avg_sq[group] + args.take2 * grad * grad;
  args.exp_avg[group] = mean;
  args.exp_avg_sq[group] = square;
  args.theta[group] = theta - args.rate * mean / (sqrtf(square * args.correction2) + args.eps);
  args.ratio_grad[group] = ratio_grad;
}

}  // namespace

cudaError_t ratio_forward(const float* theta, const float* importance, const int64_t* offsets, const float* uniforms,
                          float* log_threshold, float* probability, float* mask, int64_t groups, float temperature,
                          uint64_t seed, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  return launch(ratio_forward_kernel, static_cast<unsigned>(groups), kThreads, 0, stream, theta, importance, offsets,
                uniforms, log_threshold, probability, mask, temperature, seed);
}

int64_t ratio_step_shared(int64_t axes, int64_t terms) {
  return static_cast<int64_t>(sizeof(Partials)) + table_bytes(axes, terms);
}

cudaError_t ratio_step(const RatioStep& args, const CostTables* tables, int64_t groups, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(groups);
  if (tables == nullptr) return launch(ratio_step_kernel<false>, grid, kThreads, 0, stream, args, CostTables{});
  const int shared = static_cast<int>(table_bytes(tables->axes, tables->terms));
  return launch(ratio_step_kernel<true>, grid, kThreads, shared, stream, args, *tables);
}

}  // namespace hwprune
