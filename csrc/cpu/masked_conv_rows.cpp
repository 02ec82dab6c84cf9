#include "cpu/masked_conv_rows.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/parallel.hpp"

namespace hwprune {
namespace {

// Comparisons are written so that a NaN comes through, as in torch.
inline float clamped(float z, float low, float high) {
  const float raised = z < low ? low : z;
  return high < raised ? high : raised;
}

#if defined(__x86_64__)
// Bit i of bits[b] says whether channel 16 * b + i is listed.
__attribute__((target("avx512f"))) void pick_wide(const float* rows, int64_t count, const std::vector<uint16_t>& bits,
                                                  int64_t channels, float* out, int64_t stride) {
  for (int64_t row = 0; row < count; ++row) {
    const float* from = rows + row * channels;
    float* to = out + row * stride;
    for (const uint16_t here : bits) {
      const __m512 packed = _mm512_maskz_compress_ps(here, _mm512_maskz_loadu_ps(here, from));
      const int listed = __builtin_popcount(here);
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << listed) - 1), packed);
      from += 16;
      to += listed;
    }
  }
}

__attribute__((target("avx512f"))) void spread_wide(const float* listed, int64_t stride, int64_t count,
                                                    const std::vector<uint16_t>& bits, int64_t channels, float* rows) {
  for (int64_t row = 0; row < count; ++row) {
    const float* from = listed + row * stride;
    float* to = rows + row * channels;
    int64_t left = channels;
    for (const uint16_t here : bits) {
      const int taken = __builtin_popcount(here);
      const __m512 packed = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << taken) - 1), from);
      const __m512 spread = _mm512_maskz_expand_ps(here, packed);
      if (left >= 16)
        _mm512_storeu_ps(to, spread);
      else
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << left) - 1), spread);
      from += taken;
      to += 16;
      left -= 16;
    }
  }
}

bool runs_wide() { return __builtin_cpu_supports("avx512f"); }
#else
void pick_wide(const float*, int64_t, const std::vector<uint16_t>&, int64_t, float*, int64_t) {}
void spread_wide(const float*, int64_t, int64_t, const std::vector<uint16_t>&, int64_t, float*) {}
bool runs_wide() { return false; }
#endif

}  // namespace

HWPRUNE_CLONES void scaled(const float* x, int64_t count, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = factor * x[i];
}

void copy(const float* x, int64_t count, float factor, float* out) {
  if (factor == 0.0f)  // whatever x holds
    std::fill(out, out + count, 0.0f);
  else if (factor == 1.0f)
    std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
  else
    scaled(x, count, factor, out);
}

HWPRUNE_CLONES float dot(const float* x, const float* y, int64_t count) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += 16 * kBlock) {
    const int64_t end = std::min(count, begin + 16 * kBlock);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += x[i] * y[i];
    total += part;
  }
  return static_cast<float>(total);
}

HWPRUNE_CLONES void multiply(const float* x, const float* y, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * y[i];
}

HWPRUNE_CLONES void add_products(const float* x, const float* y, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += x[i] * y[i];
}

HWPRUNE_CLONES void add(const float* x, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += x[i];
}

HWPRUNE_CLONES void add_squares(const float* x, int64_t count, float* sums, float* squares) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += x[i];
    squares[i] += x[i] * x[i];
  }
}

HWPRUNE_CLONES void plane_forward(const float* raw, const float* residual, int64_t count, float a, float b, float low,
                                  float high, float* y) {
  if (raw && residual) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = clamped(a * raw[i] + b + residual[i], low, high);
  } else if (raw) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = clamped(a * raw[i] + b, low, high);
  } else if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = clamped(residual[i], low, high);
  } else {
    std::fill(y, y + count, clamped(0.0f, low, high));
  }
}

HWPRUNE_CLONES void row_forward(const float* raw, const float* residual, const float* mask, int64_t count,
                                const float* a, const float* b, float low, float high, float* y) {
  if (mask && residual) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      y[i] = clamped((mask[i] != 0.0f ? a[i] * raw[i] + b[i] : 0.0f) + residual[i], low, high);
  } else if (mask) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = clamped(mask[i] != 0.0f ? a[i] * raw[i] + b[i] : 0.0f, low, high);
  } else if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = clamped(a[i] * raw[i] + b[i] + residual[i], low, high);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = clamped(a[i] * raw[i] + b[i], low, high);
  }
}

Picker::Picker(const int64_t* index, int64_t kept, int64_t channels)
    : channels_(channels), wide_(runs_wide()), index_(index, index + kept) {
  bits_.resize(static_cast<size_t>((channels + 15) / 16));
  for (const int32_t i : index_) bits_[static_cast<size_t>(i / 16)] |= static_cast<uint16_t>(1u << (i % 16));
}

void Picker::pick(const float* rows, int64_t count, float* out, int64_t stride) const {
  if (wide_) return pick_wide(rows, count, bits_, channels_, out, stride);
  for (int64_t row = 0; row < count; ++row)
    for (size_t j = 0; j < index_.size(); ++j)
      out[row * stride + static_cast<int64_t>(j)] = rows[row * channels_ + index_[j]];
}

void Picker::spread(const float* listed, int64_t stride, int64_t count, float* rows) const {
  if (wide_) return spread_wide(listed, stride, count, bits_, channels_, rows);
  std::fill(rows, rows + count * channels_, 0.0f);
  for (int64_t row = 0; row < count; ++row)
    for (size_t j = 0; j < index_.size(); ++j)
      rows[row * channels_ + index_[j]] = listed[row * stride + static_cast<int64_t>(j)];
}

Floats repeated(const float* values, int64_t channels, float otherwise) {
  Floats found;
  for (int64_t row = 0; row < rows_at_once(channels); ++row)
    for (int64_t c = 0; c < channels; ++c) found.push_back(values ? values[c] : otherwise);
  return found;
}

void RowSums::flush() {
  for (size_t i = 0; i < first_.size(); ++i) {
    totals_[i] += first_[i];
    seconds_[i] += second_[i];
  }
  std::fill(first_.begin(), first_.end(), 0.0f);
  std::fill(second_.begin(), second_.end(), 0.0f);
  rows_ = 0;
}

void collect(std::vector<RowSums>& parts, int64_t channels, float* first, float* second) {
  for (RowSums& part : parts) part.flush();
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0.0, seconds = 0.0;
    for (const RowSums& part : parts) {
      for (size_t at = static_cast<size_t>(c); at < part.totals().size(); at += static_cast<size_t>(channels)) {
        total += part.totals()[at];
        seconds += part.seconds()[at];
      }
    }
    if (first) first[c] = static_cast<float>(total);
    if (second) second[c] = static_cast<float>(seconds);
  }
}

std::vector<int64_t> places(const int64_t* index, int64_t kept, int64_t channels) {
  std::vector<int64_t> place(static_cast<size_t>(channels), -1);
  for (int64_t j = 0; j < kept; ++j) place[static_cast<size_t>(kept == channels ? j : index[j])] = j;
  return place;
}

}  // namespace hwprune
