// Loops over a row of channels or a plane of pixels, which what surrounds a convolution is made of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hwprune {

using Floats = std::vector<float>;

constexpr int64_t kGrain = 1 << 15;  // floats that are worth a thread
constexpr int64_t kBlock = 64;       // additions in float32 before a sum moves to float64

// out = factor * x, zeros for a factor of exactly zero, whatever x holds.
void copy(const float* x, int64_t count, float factor, float* out);
void scaled(const float* x, int64_t count, float factor, float* out);
float dot(const float* x, const float* y, int64_t count);
void multiply(const float* x, const float* y, int64_t count, float* out);
void add_products(const float* x, const float* y, int64_t count, float* out);
void add(const float* x, int64_t count, float* out);  // out += x
void add_squares(const float* x, int64_t count, float* sums, float* squares);

// y = a * raw + b + residual, clamped to [low, high]; `raw` and `residual` may be null, for zeros without a and b.
void plane_forward(const float* raw, const float* residual, int64_t count, float a, float b, float low, float high,
                   float* y);
// The same for a row of channels; `mask` and `residual` may be null.
void row_forward(const float* raw, const float* residual, const float* mask, int64_t count, const float* a,
                 const float* b, float low, float high, float* y);

// Takes listed channels out of a row of all channels, and puts them back. AVX-512 has an instruction for sixteen at a
// time; other processors move one by one.
class Picker {
 public:
  Picker(const int64_t* index, int64_t kept, int64_t channels);  // index [kept], increasing
  void pick(const float* row, float* out) const { pick(row, 1, out, 0); }
  void spread(const float* listed, float* row) const { spread(listed, 0, 1, row); }
  // The same of `count` rows of all channels, whose listed ones lie `stride` floats apart.
  void pick(const float* rows, int64_t count, float* out, int64_t stride) const;
  void spread(const float* listed, int64_t stride, int64_t count, float* rows) const;  // zeros elsewhere

 private:
  int64_t channels_;
  bool wide_;
  std::vector<int32_t> index_;
  std::vector<uint16_t> bits_;
};

// How many rows are taken for one: the loops above want some length, and short rows lie end to end.
inline int64_t rows_at_once(int64_t channels) { return std::max<int64_t>(1, 128 / std::max<int64_t>(1, channels)); }

// Values of channels, as many times as rows are taken at once. `values` may be null, for `otherwise`.
Floats repeated(const float* values, int64_t channels, float otherwise);

// Sums over rows of channels: in float32 for a while, then in float64.
class RowSums {
 public:
  explicit RowSums(int64_t channels)
      : first_(static_cast<size_t>(channels)), second_(first_), totals_(first_.size()), seconds_(first_.size()) {}
  float* first() { return first_.data(); }
  float* second() { return second_.data(); }
  void row_done() {
    if (++rows_ == kBlock) flush();
  }
  void flush();  // adds everything so far to `totals` and `seconds`
  const std::vector<double>& totals() const { return totals_; }
  const std::vector<double>& seconds() const { return seconds_; }

 private:
  Floats first_, second_;
  std::vector<double> totals_, seconds_;
  int64_t rows_ = 0;
};

// What one RowSums per thread holds, added up in the order of the threads; where they are of several rows at once,
// these are added up, too. `first` and `second` [channels] may be null.
void collect(std::vector<RowSums>& parts, int64_t channels, float* first, float* second);

// Where each channel lies in the compact tensor, or -1. index is not looked at where kept == channels.
std::vector<int64_t> places(const int64_t* index, int64_t kept, int64_t channels);

}  // namespace hwprune
