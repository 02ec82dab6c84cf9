// What surrounds the dense product of a masked convolution: picking channels, packing weight columns, the epilogue and
// its gradient, sums per channel. All tensors are dense float32, NCHW or NHWC.
#pragma once

#include <cstdint>

namespace hwprune {

struct Batch {
  int64_t images, channels, pixels;
  bool channels_last;  // NHWC: element (n, c, p) at (n * pixels + p) * channels + c; else (n * channels + c) * pixels +
                       // p
  int64_t threads;
};

// out [images, kept, pixels] = factor[j] * x[n, index[j], p]; index increases. `factor` may be null, for ones; where it
// is exactly zero, x does not count, not even a NaN.
void gather_channels(const float* x, const Batch& batch, const int64_t* index, const float* factor, int64_t kept,
                     float* out);

// The reverse: out[n, index[j], p] = factor[j] * compact[n, j, p], and zero in channels that are not listed. Where
// `dots` [kept] is given, dots[j] = sum of compact[n, j, p] * x[n, index[j], p].
void scatter_channels(const float* compact, const Batch& batch, const int64_t* index, const float* factor, int64_t kept,
                      const float* x, float* out, float* dots);

// z = a * raw + b + residual, y = z clamped to [low, high]. Where `mask` [channels] is exactly zero, a * raw + b is not
// computed and counts as zero. `mask` and `residual` may be null.
struct Epilogue {
  const float* a;         // [channels]
  const float* b;         // [channels]
  const float* mask;      // [channels]
  const float* residual;  // like y
  float low, high;
};
// `raw` is [images, kept, pixels]: channel j of it belongs to channel index[j], which is not looked at where kept ==
// channels. Channels that are not listed must be masked. `raw_full`, like y, gets a copy with zeros in them; may be
// null.
void epilogue(const float* raw, const Batch& batch, const int64_t* index, int64_t kept, const Epilogue& args, float* y,
              float* raw_full);
// d = grad_y where low < z < high, else zero; grad_raw = a * d; grad_residual = d (may be null); per channel the sums
// of d and of d * raw, zero where `mask` is. `raw` has all channels.
void epilogue_backward(const float* grad_y, const float* raw, const Batch& batch, const Epilogue& args, float* grad_raw,
                       float* grad_residual, float* sum, float* sum_raw);

// Sums and sums of squares of every channel.
void channel_sums(const float* x, const Batch& batch, float* sums, float* squares);

// grad += a[c] + b[c] * x
void add_affine(const float* x, const Batch& batch, const float* a, const float* b, float* grad);

// Some elements of a matrix of `width` columns: element (r, j) of the part lies in row rows[r] and in column
// columns[g * column_count + j] of it, where g is the group of r, the rows being as many in each. Without rows, or
// columns, these are all that there are.
struct Part {
  int64_t width;
  const int64_t* rows;  // [row_count]
  int64_t row_count;
  const int64_t* columns;  // [groups, column_count]
  int64_t column_count, groups;
  int64_t threads;
};
// part [row_count, column_count], times row_factor [row_count] and column_factor [groups, column_count], which may be
// null.
void pick_part(const float* matrix, const Part& args, const float* row_factor, const float* column_factor, float* part);
// The reverse, into a matrix of `height` rows: zero elsewhere. Rows increase.
void spread_part(const float* part, int64_t height, const Part& args, float* matrix);

// Weight columns (row * kernel_width + column) * channels + channel of a convolution without groups.
struct Columns {
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  const int64_t* columns;  // [count], increasing
  int64_t count;
  bool channels_last;
  int64_t threads;
};
// The listed columns of the unfolded images: [images * out pixels, count] for channels_last, else
// [count, images * out pixels].
void pack_columns(const float* x, int64_t images, const Columns& args, float* packed);
// The reverse: adds what was packed to the pixels it came from. x is overwritten.
void unpack_columns(const float* packed, int64_t images, const Columns& args, float* x);

}  // namespace hwprune
