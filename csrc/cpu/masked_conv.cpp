#include "cpu/masked_conv.hpp"

#include <algorithm>
#include <vector>

#include "cpu/masked_conv_rows.hpp"
#include "cpu/parallel.hpp"

namespace hwprune {
namespace {

// Zero where the factor is, whatever x holds there.
HWPRUNE_CLONES void mask_row(const float* factor, int64_t count, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = factor[i] != 0.0f ? factor[i] * x[i] : 0.0f;
}

HWPRUNE_CLONES void sum_squares(const float* x, int64_t count, double* total, double* total_squares) {
  for (int64_t begin = 0; begin < count; begin += 16 * kBlock) {
    const int64_t end = std::min(count, begin + 16 * kBlock);
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t i = begin; i < end; ++i) {
      sum += x[i];
      squares += x[i] * x[i];
    }
    *total += sum;
    *total_squares += squares;
  }
}

HWPRUNE_CLONES void plane_backward(const float* grad_y, const float* raw, const float* residual, int64_t count, float a,
                                   float b, bool active, float low, float high, float* grad_raw, float* grad_residual,
                                   double* total, double* total_raw) {
  for (int64_t begin = 0; begin < count; begin += 16 * kBlock) {
    const int64_t end = std::min(count, begin + 16 * kBlock);
    float sum = 0.0f, sum_raw = 0.0f;
#pragma omp simd reduction(+ : sum, sum_raw)
    for (int64_t i = begin; i < end; ++i) {
      const float r = active ? raw[i] : 0.0f;
      const float z = a * r + b + (residual ? residual[i] : 0.0f);
      const float d = (z > low) & (z < high) ? grad_y[i] : 0.0f;
      grad_raw[i] = active ? a * d : 0.0f;
      if (grad_residual) grad_residual[i] = d;
      sum += d;
      sum_raw += d * r;
    }
    *total += active ? sum : 0.0f;
    *total_raw += sum_raw;
  }
}

HWPRUNE_CLONES void row_backward(const float* grad_y, const float* raw, const float* residual, const float* mask,
                                 int64_t count, const float* a, const float* b, float low, float high, float* grad_raw,
                                 float* grad_residual, float* sum, float* sum_raw) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const bool active = mask[i] != 0.0f;
    const float r = active ? raw[i] : 0.0f;
    const float z = (active ? a[i] * r + b[i] : 0.0f) + (residual ? residual[i] : 0.0f);
    const float d = (z > low) & (z < high) ? grad_y[i] : 0.0f;
    const float through = active ? d : 0.0f;
    grad_raw[i] = active ? a[i] * d : 0.0f;
    if (grad_residual) grad_residual[i] = d;
    sum[i] += through;
    sum_raw[i] += through * r;
  }
}

HWPRUNE_CLONES void plane_add_affine(const float* x, int64_t count, float a, float b, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += a + b * x[i];
}

HWPRUNE_CLONES void row_add_affine(const float* x, int64_t count, const float* a, const float* b, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += a[i] + b[i] * x[i];
}

struct Tap {
  int64_t row, column, begin, end;  // kernel position, and its columns in the list
};

std::vector<Tap> taps(const Columns& args) {
  std::vector<Tap> found;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t position = args.columns[i] / args.channels;
    const int64_t row = position / args.kernel_width, column = position % args.kernel_width;
    if (found.empty() || found.back().row != row || found.back().column != column) found.push_back({row, column, i, i});
    found.back().end = i + 1;
  }
  return found;
}

// Outputs 0 .. size whose input position, output * stride + offset, lies within 0 .. limit.
struct Range {
  int64_t begin, end;
};

Range inside(int64_t size, int64_t stride, int64_t offset, int64_t limit) {
  const int64_t begin = offset < 0 ? (-offset + stride - 1) / stride : 0;
  const int64_t end = offset < limit ? (limit - 1 - offset) / stride + 1 : 0;
  return {std::min(begin, size), std::max(std::min(end, size), std::min(begin, size))};
}

}  // namespace

void gather_channels(const float* x, const Batch& batch, const int64_t* index, const float* factor, int64_t kept,
                     float* out) {
  const int64_t channels = batch.channels, pixels = batch.pixels;
  if (batch.channels_last) {
    const Picker picker(index, kept, channels);
    parallel(batch.images * pixels, kGrain / std::max<int64_t>(1, kept), batch.threads,
             [&](int64_t, int64_t begin, int64_t end) {
               picker.pick(x + begin * channels, end - begin, out + begin * kept, kept);
               for (int64_t row = begin; factor && row < end; ++row) mask_row(factor, kept, out + row * kept);
             });
    return;
  }
  parallel(batch.images * kept, kGrain / std::max<int64_t>(1, pixels), batch.threads,
           [=](int64_t, int64_t begin, int64_t end) {
             for (int64_t plane = begin; plane < end; ++plane) {
               const int64_t image = plane / kept, j = plane % kept;
               copy(x + (image * channels + index[j]) * pixels, pixels, factor ? factor[j] : 1.0f,
                    out + plane * pixels);
             }
           });
}

void scatter_channels(const float* compact, const Batch& batch, const int64_t* index, const float* factor, int64_t kept,
                      const float* x, float* out, float* dots) {
  const int64_t channels = batch.channels, pixels = batch.pixels;
  const auto parts = static_cast<size_t>(std::max<int64_t>(1, batch.threads));
  std::vector<RowSums> sums(dots ? parts : 0, RowSums(kept));
  if (batch.channels_last) {
    const Picker picker(index, kept, channels);
    parallel(batch.images * pixels, kGrain / std::max<int64_t>(1, channels), batch.threads,
             [&](int64_t thread, int64_t begin, int64_t end) {
               Floats picked(static_cast<size_t>(kept));
               for (int64_t row = begin; row < end; ++row) {
                 const float* from = compact + row * kept;
                 if (dots) {
                   RowSums& mine = sums[static_cast<size_t>(thread)];
                   picker.pick(x + row * channels, picked.data());
                   add_products(from, picked.data(), kept, mine.first());
                   mine.row_done();
                 }
                 if (factor) {
                   multiply(from, factor, kept, picked.data());
                   from = picked.data();
                 }
                 picker.spread(from, out + row * channels);
               }
             });
  } else {
    const std::vector<int64_t> place = places(index, kept, channels);
    parallel(batch.images * channels, kGrain / std::max<int64_t>(1, pixels), batch.threads,
             [&](int64_t thread, int64_t begin, int64_t end) {
               for (int64_t plane = begin; plane < end; ++plane) {
                 const int64_t image = plane / channels, j = place[static_cast<size_t>(plane % channels)];
                 if (j < 0) {
                   std::fill(out + plane * pixels, out + (plane + 1) * pixels, 0.0f);
                   continue;
                 }
                 const float* from = compact + (image * kept + j) * pixels;
                 copy(from, pixels, factor ? factor[j] : 1.0f, out + plane * pixels);
                 if (!dots) continue;
                 RowSums& mine = sums[static_cast<size_t>(thread)];
                 mine.first()[j] += dot(from, x + plane * pixels, pixels);
                 if (plane % channels == channels - 1) mine.row_done();
               }
             });
  }
  if (dots) collect(sums, kept, dots, nullptr);
}

void epilogue(const float* raw, const Batch& batch, const int64_t* index, int64_t kept, const Epilogue& args, float* y,
              float* raw_full) {
  const int64_t channels = batch.channels, pixels = batch.pixels;
  const bool some = kept < channels;
  if (batch.channels_last) {
    const Picker picker(index, some ? kept : 0, channels);
    const int64_t step = rows_at_once(channels);
    const Floats a = repeated(args.a, channels, 1.0f), b = repeated(args.b, channels, 0.0f);
    const Floats mask = repeated(args.mask, channels, 1.0f);
    parallel(batch.images * pixels, kGrain / std::max<int64_t>(1, channels), batch.threads,
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t row = begin; row < end; row += step) {
                 const int64_t count = std::min(step, end - row), at = row * channels;
                 float* spread = raw_full ? raw_full + at : y + at;
                 if (some)
                   picker.spread(raw + row * kept, kept, count, spread);
                 else if (raw_full)
                   std::copy_n(raw + at, count * channels, spread);
                 row_forward(some ? spread : raw + at, args.residual ? args.residual + at : nullptr,
                             args.mask ? mask.data() : nullptr, count * channels, a.data(), b.data(), args.low,
                             args.high, y + at);
               }
             });
    return;
  }
  const std::vector<int64_t> place = places(index, kept, channels);
  parallel(batch.images * channels, kGrain / std::max<int64_t>(1, pixels), batch.threads,
           [&](int64_t, int64_t begin, int64_t end) {
             for (int64_t plane = begin; plane < end; ++plane) {
               const int64_t c = plane % channels, j = place[static_cast<size_t>(c)];
               const float* from = j < 0 ? nullptr : raw + (plane / channels * kept + j) * pixels;
               if (raw_full && from) copy(from, pixels, 1.0f, raw_full + plane * pixels);
               if (raw_full && !from) std::fill(raw_full + plane * pixels, raw_full + (plane + 1) * pixels, 0.0f);
               if (args.mask && args.mask[c] == 0.0f) from = nullptr;
               plane_forward(from, args.residual ? args.residual + plane * pixels : nullptr, pixels, args.a[c],
                             args.b[c], args.low, args.high, y + plane * pixels);
             }
           });
}

void epilogue_backward(const float* grad_y, const float* raw, const Batch& batch, const Epilogue& args, float* grad_raw,
                       float* grad_residual, float* sum, float* sum_raw) {
  const int64_t channels = batch.channels, pixels = batch.pixels;
  const auto parts = static_cast<size_t>(std::max<int64_t>(1, batch.threads));
  if (batch.channels_last) {
    const int64_t step = rows_at_once(channels);
    const Floats a = repeated(args.a, channels, 1.0f), b = repeated(args.b, channels, 0.0f);
    const Floats mask = repeated(args.mask, channels, 1.0f);
    std::vector<RowSums> sums(parts, RowSums(step * channels));
    parallel(batch.images * pixels, kGrain / std::max<int64_t>(1, channels), batch.threads,
             [&](int64_t thread, int64_t begin, int64_t end) {
               RowSums& mine = sums[static_cast<size_t>(thread)];
               for (int64_t row = begin; row < end; row += step) {
                 const int64_t at = row * channels, count = std::min(step, end - row) * channels;
                 row_backward(grad_y + at, raw + at, args.residual ? args.residual + at : nullptr, mask.data(), count,
                              a.data(), b.data(), args.low, args.high, grad_raw + at,
                              grad_residual ? grad_residual + at : nullptr, mine.first(), mine.second());
                 mine.row_done();
               }
             });
    collect(sums, channels, sum, sum_raw);
    return;
  }
  const auto width = static_cast<size_t>(channels);
  std::vector<double> totals(parts * width), totals_raw(parts * width);
  parallel(batch.images * channels, kGrain / std::max<int64_t>(1, pixels), batch.threads,
           [&](int64_t thread, int64_t begin, int64_t end) {
             for (int64_t plane = begin; plane < end; ++plane) {
               const int64_t c = plane % channels, at = plane * pixels;
               const bool active = !args.mask || args.mask[c] != 0.0f;
               const size_t slot = static_cast<size_t>(thread) * width + static_cast<size_t>(c);
               plane_backward(grad_y + at, raw + at, args.residual ? args.residual + at : nullptr, pixels,
                              active ? args.a[c] : 0.0f, active ? args.b[c] : 0.0f, active, args.low, args.high,
                              grad_raw + at, grad_residual ? grad_residual + at : nullptr, &totals[slot],
                              &totals_raw[slot]);
             }
           });
  for (size_t c = 0; c < width; ++c) {
    double total = 0.0, total_raw = 0.0;
    for (size_t part = 0; part < parts; ++part) {
      total += totals[part * width + c];
      total_raw += totals_raw[part * width + c];
    }
    sum[c] = static_cast<float>(total);
    sum_raw[c] = static_cast<float>(total_raw);
  }
}

void channel_sums(const float* x, const Batch& batch, float* sums, float* squares) {
  const int64_t channels = batch.channels, pixels = batch.pixels;
  if (batch.channels_last) {
    const int64_t step = rows_at_once(channels);
    std::vector<RowSums> parts(static_cast<size_t>(std::max<int64_t>(1, batch.threads)), RowSums(step * channels));
    parallel(batch.images * pixels, kGrain / std::max<int64_t>(1, channels), batch.threads,
             [&](int64_t thread, int64_t begin, int64_t end) {
               RowSums& mine = parts[static_cast<size_t>(thread)];
               for (int64_t row = begin; row < end; row += step) {
                 add_squares(x + row * channels, std::min(step, end - row) * channels, mine.first(), mine.second());
                 mine.row_done();
               }
             });
    collect(parts, channels, sums, squares);
    return;
  }
  const int64_t worth = kGrain / std::max<int64_t>(1, batch.images * pixels);
  parallel(channels, worth, batch.threads, [=](int64_t, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double total = 0.0, total_squares = 0.0;
      for (int64_t image = 0; image < batch.images; ++image)
        sum_squares(x + (image * channels + c) * pixels, pixels, &total, &total_squares);
      sums[c] = static_cast<float>(total);
      squares[c] = static_cast<float>(total_squares);
    }
  });
}

void add_affine(const float* x, const Batch& batch, const float* a, const float* b, float* grad) {
  const int64_t channels = batch.channels, pixels = batch.pixels;
  if (batch.channels_last) {
    const int64_t step = rows_at_once(channels);
    const Floats offset = repeated(a, channels, 0.0f), factor = repeated(b, channels, 0.0f);
    parallel(batch.images * pixels, kGrain / std::max<int64_t>(1, channels), batch.threads,
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t row = begin; row < end; row += step)
                 row_add_affine(x + row * channels, std::min(step, end - row) * channels, offset.data(), factor.data(),
                                grad + row * channels);
             });
    return;
  }
  parallel(batch.images * channels, kGrain / std::max<int64_t>(1, pixels), batch.threads,
           [=](int64_t, int64_t begin, int64_t end) {
             for (int64_t plane = begin; plane < end; ++plane)
               plane_add_affine(x + plane * pixels, pixels, a[plane % channels], b[plane % channels],
                                grad + plane * pixels);
           });
}

void pick_part(const float* matrix, const Part& args, const float* row_factor, const float* column_factor,
               float* part) {
  const int64_t count = args.column_count, per_group = args.row_count / std::max<int64_t>(1, args.groups);
  // Rows are read from left to right, which the memory likes, and put into the order asked for afterwards.
  bool ordered = true;
  for (int64_t g = 0; args.columns && g < args.groups; ++g)
    ordered = ordered && std::is_sorted(args.columns + g * count, args.columns + (g + 1) * count);
  std::vector<Picker> pickers;
  std::vector<int32_t> places(ordered ? 0 : static_cast<size_t>(args.groups * count));
  for (int64_t g = 0; args.columns && g < args.groups; ++g) {
    std::vector<int64_t> sorted(args.columns + g * count, args.columns + (g + 1) * count);
    if (!ordered) {
      std::sort(sorted.begin(), sorted.end());
      for (int64_t j = 0; j < count; ++j)
        places[static_cast<size_t>(g * count + j)] = static_cast<int32_t>(
            std::lower_bound(sorted.begin(), sorted.end(), args.columns[g * count + j]) - sorted.begin());
    }
    pickers.emplace_back(sorted.data(), count, args.width);
  }
  parallel(args.row_count, kGrain / std::max<int64_t>(1, count), args.threads,
           [&](int64_t, int64_t begin, int64_t end) {
             Floats picked(ordered ? 0 : static_cast<size_t>(count));
             for (int64_t r = begin; r < end; ++r) {
               const float* from = matrix + (args.rows ? args.rows[r] : r) * args.width;
               float* to = part + r * count;
               const int64_t first = r / per_group * count;  // of the group's columns
               if (!args.columns) {
                 copy(from, count, 1.0f, to);
               } else {
                 pickers[static_cast<size_t>(r / per_group)].pick(from, ordered ? to : picked.data());
                 const int32_t* place = places.data() + (ordered ? 0 : first);
                 for (int64_t j = 0; !ordered && j < count; ++j) to[j] = picked[static_cast<size_t>(place[j])];
               }
               if (row_factor) scaled(to, count, row_factor[r], to);
               if (column_factor) multiply(to, column_factor + first, count, to);
             }
           });
}

void spread_part(const float* part, int64_t height, const Part& args, float* matrix) {
  const int64_t count = args.column_count, per_group = args.row_count / std::max<int64_t>(1, args.groups);
  const int64_t* last = args.rows + (args.rows ? args.row_count : 0);
  parallel(height, kGrain / std::max<int64_t>(1, args.width), args.threads, [&](int64_t, int64_t begin, int64_t end) {
    int64_t r = args.rows ? std::lower_bound(args.rows, last, begin) - args.rows : begin;
    for (int64_t row = begin; row < end; ++row) {
      float* to = matrix + row * args.width;
      const bool listed = r < args.row_count && (!args.rows || args.rows[r] == row);
      if (!listed || count < args.width) std::fill(to, to + args.width, 0.0f);
      if (!listed) continue;
      const float* from = part + r * count;
      const int64_t* columns = args.columns ? args.columns + r / per_group * count : nullptr;
      if (!columns) copy(from, count, 1.0f, to);
      for (int64_t j = 0; columns && j < count; ++j) to[columns[j]] = from[j];
      ++r;
    }
  });
}

void pack_columns(const float* x, int64_t images, const Columns& args, float* packed) {
  const std::vector<Tap> kernel = taps(args);
  const int64_t area = args.out_height * args.out_width, total = images * area, count = args.count;
  const auto worth = [&](int64_t row) { return kGrain / std::max<int64_t>(1, row); };
  if (args.channels_last) {
    std::vector<int64_t> channel(static_cast<size_t>(count));
    for (size_t i = 0; i < channel.size(); ++i) channel[i] = args.columns[i] % args.channels;
    std::vector<Picker> pickers;
    for (const Tap& tap : kernel) pickers.emplace_back(channel.data() + tap.begin, tap.end - tap.begin, args.channels);
    parallel(images * args.out_height, worth(args.out_width * count), args.threads,
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t line = begin; line < end; ++line) {
                 const int64_t image = line / args.out_height, oh = line % args.out_height;
                 for (int64_t ow = 0; ow < args.out_width; ++ow) {
                   float* to = packed + (line * args.out_width + ow) * count;
                   for (size_t t = 0; t < kernel.size(); ++t) {
                     const Tap& tap = kernel[t];
                     const int64_t ih = oh * args.stride_h + tap.row * args.dilation_h - args.pad_h;
                     const int64_t iw = ow * args.stride_w + tap.column * args.dilation_w - args.pad_w;
                     if (ih < 0 || ih >= args.height || iw < 0 || iw >= args.width) {
                       std::fill(to + tap.begin, to + tap.end, 0.0f);
                       continue;
                     }
                     const float* from = x + ((image * args.height + ih) * args.width + iw) * args.channels;
                     pickers[t].pick(from, to + tap.begin);
                   }
                 }
               }
             });
    return;
  }
  parallel(count, worth(total), args.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t position = args.columns[j] / args.channels, c = args.columns[j] % args.channels;
      const int64_t down = position / args.kernel_width * args.dilation_h - args.pad_h;
      const int64_t right = position % args.kernel_width * args.dilation_w - args.pad_w;
      const Range rows = inside(args.out_height, args.stride_h, down, args.height);
      const Range across = inside(args.out_width, args.stride_w, right, args.width);
      for (int64_t image = 0; image < images; ++image) {
        const float* plane = x + (image * args.channels + c) * args.height * args.width;
        float* to = packed + j * total + image * area;
        std::fill(to, to + rows.begin * args.out_width, 0.0f);
        std::fill(to + rows.end * args.out_width, to + area, 0.0f);
        for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
          const float* from = plane + (oh * args.stride_h + down) * args.width + right;
          float* line = to + oh * args.out_width;
          std::fill(line, line + across.begin, 0.0f);
          std::fill(line + across.end, line + args.out_width, 0.0f);
          if (args.stride_w == 1)
            std::copy(from + across.begin, from + across.end, line + across.begin);
          else
            for (int64_t ow = across.begin; ow < across.end; ++ow) line[ow] = from[ow * args.stride_w];
        }
      }
    }
  });
}

void unpack_columns(const float* packed, int64_t images, const Columns& args, float* x) {
  const std::vector<Tap> kernel = taps(args);
  const int64_t area = args.out_height * args.out_width, total = images * area, count = args.count;
  const int64_t image_size = args.channels * args.height * args.width;
  parallel(images, kGrain / std::max<int64_t>(1, count * area), args.threads, [&](int64_t, int64_t begin, int64_t end) {
    std::fill(x + begin * image_size, x + end * image_size, 0.0f);
    for (int64_t image = begin; image < end; ++image) {
      for (const Tap& tap : kernel) {
        const int64_t down = tap.row * args.dilation_h - args.pad_h;
        const int64_t right = tap.column * args.dilation_w - args.pad_w;
        const Range rows = inside(args.out_height, args.stride_h, down, args.height);
        const Range across = inside(args.out_width, args.stride_w, right, args.width);
        for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
          const int64_t ih = oh * args.stride_h + down;
          if (args.channels_last) {
            for (int64_t ow = across.begin; ow < across.end; ++ow) {
              const float* from = packed + (image * area + oh * args.out_width + ow) * count;
              float* to = x + ((image * args.height + ih) * args.width + ow * args.stride_w + right) * args.channels;
              for (int64_t j = tap.begin; j < tap.end; ++j) to[args.columns[j] % args.channels] += from[j];
            }
            continue;
          }
          for (int64_t j = tap.begin; j < tap.end; ++j) {
            const float* from = packed + j * total + image * area + oh * args.out_width;
            float* to = x + (image * args.channels + args.columns[j] % args.channels) * args.height * args.width +
                        ih * args.width + right;
            if (args.stride_w == 1)
              add(from + across.begin, across.end - across.begin, to + across.begin);
            else
              for (int64_t ow = across.begin; ow < across.end; ++ow) to[ow * args.stride_w] += from[ow];
          }
        }
      }
    }
  });
}

}  // namespace hwprune
