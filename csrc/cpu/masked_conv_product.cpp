#include "cpu/masked_conv_product.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/masked_conv_rows.hpp"
#include "cpu/parallel.hpp"

namespace hwprune {
namespace {

constexpr int kTileRows = 6;               // pixels, or outputs in the weight's gradient, that are summed at a time
constexpr int64_t kBlockPixels = 96;       // their results wait in a cache for the epilogue
constexpr int64_t kPanelFloats = 3 << 16;  // of weights, which are to stay in the second-level cache

// The part of a tile's sum that one kernel position gives: k of begin .. end, read from these rows of channels.
struct Step {
  int64_t begin, end;
  const float* rows[kTileRows];
};

struct Kernels {
  using Product = void (*)(const Step*, int64_t, const int32_t*, const float*, int64_t, float*, int64_t);
  using Outer = void (*)(const float* const*, const float* const*, int64_t, int64_t, const int32_t*, float*, int64_t);
  using Transpose = void (*)(const float* const*, int64_t, float*, int64_t);
  int64_t lanes, most_vectors;
  Product product[2][4];      // for four rows and for kTileRows; by vectors, less one
  Outer outer_product[2][4];  // likewise
  Transpose transpose;
};

#define HWPRUNE_TARGET
#define HWPRUNE_LANES 4
namespace lanes4 {
#include "cpu/masked_conv_tile.hpp"
}
#undef HWPRUNE_TARGET
#undef HWPRUNE_LANES
#if defined(__x86_64__)
#define HWPRUNE_TARGET __attribute__((target("avx2,fma")))
#define HWPRUNE_LANES 8
namespace lanes8 {
#include "cpu/masked_conv_tile.hpp"
}
#undef HWPRUNE_TARGET
#undef HWPRUNE_LANES
#define HWPRUNE_TARGET __attribute__((target("avx512f,fma")))
#define HWPRUNE_LANES 16
namespace lanes16 {
#include "cpu/masked_conv_tile.hpp"
}
#undef HWPRUNE_TARGET
#undef HWPRUNE_LANES
#endif

// For `count` channels side by side: more lanes than there are channels would stand idle.
const Kernels& kernels_for(int64_t lanes, int64_t count) {
  if (count <= 8) lanes = std::min<int64_t>(lanes, 8);
#if defined(__x86_64__)
  if (lanes >= 16 && __builtin_cpu_supports("avx512f")) return lanes16::kernels;
  if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return lanes8::kernels;
#endif
  return lanes4::kernels;
}

using Indices = std::vector<int64_t>;

// Floats that are all written before they are read.
using Scratch = std::unique_ptr<float[]>;
Scratch scratch(int64_t count) { return Scratch(new float[static_cast<size_t>(count)]); }

Indices active(const float* mask, int64_t channels) {
  Indices found;
  for (int64_t c = 0; c < channels; ++c)
    if (!mask || mask[c] != 0.0f) found.push_back(c);
  return found;
}

int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Rows of channels, one per pixel of all images: a tensor in NHWC as it is, or listed channels that were picked.
struct Rows {
  Scratch picked;  // null: they lie elsewhere
  const float* first;
  int64_t stride;
};

// The listed channels of every pixel side by side, `stride` floats a pixel, zeros behind the last.
Rows pick_rows(const float* x, int64_t images, int64_t channels, int64_t pixels, bool channels_last,
               const Indices& index, int64_t stride, const Kernels& kernels, int64_t threads) {
  const int64_t kept = static_cast<int64_t>(index.size());
  Rows rows{scratch(images * pixels * stride), nullptr, stride};
  float* out = rows.picked.get();
  rows.first = out;
  const int64_t grain = kGrain / std::max<int64_t>(1, stride);
  if (channels_last) {
    const Picker picker(index.data(), kept, channels);
    parallel(images * pixels, grain, threads, [&](int64_t, int64_t begin, int64_t end) {
      picker.pick(x + begin * channels, end - begin, out + begin * stride, stride);
      for (int64_t p = begin; p < end && kept < stride; ++p)
        std::fill(out + p * stride + kept, out + (p + 1) * stride, 0.0f);
    });
    return rows;
  }
  const int64_t lanes = kernels.lanes;
  parallel(images * pixels, grain, threads, [&](int64_t, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / pixels, p = begin % pixels, count = std::min(end - begin, pixels - p);
      int64_t j = 0;
      for (; j + lanes <= kept; j += lanes) {
        const float* planes[16];
        for (int64_t l = 0; l < lanes; ++l)
          planes[l] = x + (image * channels + index[static_cast<size_t>(j + l)]) * pixels + p;
        kernels.transpose(planes, count, out + begin * stride + j, stride);
      }
      for (; j < kept; ++j) {
        const float* plane = x + (image * channels + index[static_cast<size_t>(j)]) * pixels + p;
        for (int64_t i = 0; i < count; ++i) out[(begin + i) * stride + j] = plane[i];
      }
      for (int64_t i = 0; i < count && kept < stride; ++i)
        std::fill(out + (begin + i) * stride + kept, out + (begin + i + 1) * stride, 0.0f);
      begin += count;
    }
  });
  return rows;
}

// out [width, out_stride] = the transpose of rows [count, width], which lie `stride` floats apart. What is behind
// `count` up to whole vectors is overwritten.
void turn_rows(const float* rows, int64_t stride, int64_t count, int64_t width, const Kernels& kernels, float* out,
               int64_t out_stride) {
  const float* from[16];
  for (int64_t p = 0; p < count; p += kernels.lanes) {
    for (int64_t l = 0; l < kernels.lanes; ++l) from[l] = rows + std::min(p + l, count - 1) * stride;
    kernels.transpose(from, width, out + p, out_stride);
  }
}

// What the sum runs over: (kernel position, channel) pairs, position by position.
struct Terms {
  struct Tap {
    int64_t row, column, begin, end;
  };
  std::vector<Tap> taps;
  std::vector<int32_t> channels;

  int64_t count() const { return static_cast<int64_t>(channels.size()); }
};

Terms every_tap(const Convolution& args, const Indices& channels) {
  Terms terms;
  const int64_t kept = static_cast<int64_t>(channels.size());
  for (int64_t row = 0; row < args.kernel_height; ++row) {
    for (int64_t column = 0; column < args.kernel_width; ++column) {
      terms.taps.push_back({row, column, terms.count(), terms.count() + kept});
      terms.channels.insert(terms.channels.end(), channels.begin(), channels.end());
    }
  }
  return terms;
}

Terms listed_columns(const Convolution& args) {
  Terms terms;
  for (int64_t k = 0; k < args.column_count; ++k) {
    const int64_t position = args.columns[k] / args.channels;
    const int64_t row = position / args.kernel_width, column = position % args.kernel_width;
    if (terms.taps.empty() || terms.taps.back().row != row || terms.taps.back().column != column)
      terms.taps.push_back({row, column, k, k});
    terms.taps.back().end = k + 1;
    terms.channels.push_back(static_cast<int32_t>(args.columns[k] % args.channels));
  }
  return terms;
}

// A dimension of the pixels that are written, and of those that they read: kernel position `tap` reads
// place * stride + tap * step + offset.
struct Axis {
  int64_t size, source, stride, step, offset;

  int64_t reads(int64_t place, int64_t tap) const {  // -1: nothing
    const int64_t found = place * stride + tap * step + offset;
    return found < 0 || found >= source ? -1 : found;
  }
  int64_t reading(int64_t tap) const {  // places that read something
    int64_t count = 0;
    for (int64_t place = 0; place < size; ++place) count += reads(place, tap) >= 0;
    return count;
  }
};

struct Window {
  Axis rows, columns;

  int64_t pixels() const { return rows.size * columns.size; }
  int64_t source_pixels() const { return rows.source * columns.source; }
};

Window forward_window(const Convolution& a) {
  return {{a.out_height, a.height, a.stride_h, a.dilation_h, -a.pad_h},
          {a.out_width, a.width, a.stride_w, a.dilation_w, -a.pad_w}};
}

// Of a gradient, where strides are 1: written and read are exchanged.
Window gradient_window(const Convolution& a) {
  return {{a.height, a.out_height, 1, -a.dilation_h, a.pad_h}, {a.width, a.out_width, 1, -a.dilation_w, a.pad_w}};
}

// Weights in the order in which the product reads them: per panel [terms, vectors, lanes].
struct Panels {
  struct Panel {
    int64_t first, vectors;  // of vectors
  };
  std::vector<Panel> panels;
  Scratch weights;
  int64_t terms, lanes, stride;  // floats a pixel of what comes out, whole vectors

  const float* of(const Panel& panel) const { return weights.get() + panel.first * lanes * terms; }
};

Panels panels_for(int64_t outputs, int64_t terms, const Kernels& kernels) {
  const int64_t lanes = kernels.lanes, vectors = (outputs + lanes - 1) / lanes;
  Panels empty{{}, scratch(vectors * lanes * terms), terms, lanes, vectors * lanes};
  const int64_t fitting = kPanelFloats / std::max<int64_t>(1, terms * lanes);
  const int64_t most = std::max<int64_t>(1, std::min(kernels.most_vectors, fitting));
  const int64_t panels = (vectors + most - 1) / most;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = vectors * p / panels;
    empty.panels.push_back({first, vectors * (p + 1) / panels - first});
  }
  return empty;
}

// Calls fill(row of each lane, place of the first term's lanes, distance to the next term's) for every vector.
template <typename Fill>
void fill_panels(Panels& panels, const float* weight, const Indices& outputs, int64_t output_stride, int64_t threads,
                 const Fill& fill) {
  const int64_t lanes = panels.lanes, count = static_cast<int64_t>(outputs.size());
  parallel(static_cast<int64_t>(panels.panels.size()), kGrain / std::max<int64_t>(1, 4 * lanes * panels.terms), threads,
           [&](int64_t, int64_t begin, int64_t end) {
             for (int64_t p = begin; p < end; ++p) {
               const Panels::Panel& panel = panels.panels[static_cast<size_t>(p)];
               for (int64_t v = 0; v < panel.vectors; ++v) {
                 const float* rows[16];
                 for (int64_t l = 0; l < lanes; ++l)
                   rows[l] = weight + outputs[static_cast<size_t>(std::min(count - 1, (panel.first + v) * lanes + l))] *
                                          output_stride;
                 fill(rows, panels.weights.get() + (panel.first * panels.terms + v) * lanes, panel.vectors * lanes);
               }
             }
           });
}

// weights [k, lane] = in_mask[c] * weight[outs[lane], position, c], of the position and the channel c of term k. What a
// lane takes lies in one row of memory, which is turned a piece at a time, listed or not.
Panels pack(const float* weight, const Terms& terms, const Indices& outs, const Convolution& args,
            const Kernels& kernels) {
  struct Place {
    int64_t at, k;
    float factor;
  };
  const int64_t taps = args.kernel_height * args.kernel_width;
  std::vector<Place> places;
  for (const Terms::Tap& tap : terms.taps) {
    const int64_t position = tap.row * args.kernel_width + tap.column;
    for (int64_t k = tap.begin; k < tap.end; ++k) {
      const int64_t c = terms.channels[static_cast<size_t>(k)];
      places.push_back({args.weight_last ? position * args.channels + c : c * taps + position, k,
                        args.in_mask ? args.in_mask[c] : 1.0f});
    }
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.at < b.at; });
  Panels packed = panels_for(static_cast<int64_t>(outs.size()), terms.count(), kernels);
  constexpr int64_t kPiece = 256;  // with all lanes it stays in the first-level cache
  fill_panels(packed, weight, outs, args.channels * taps, args.threads,
              [&](const float* const* rows, float* to, int64_t step) {
                float turned[kPiece * 16];
                for (size_t i = 0; i < places.size();) {
                  const int64_t first = places[i].at;
                  size_t end = i;
                  while (end < places.size() && places[end].at < first + kPiece) ++end;
                  const float* from[16];
                  for (int64_t l = 0; l < kernels.lanes; ++l) from[l] = rows[l] + first;
                  kernels.transpose(from, places[end - 1].at - first + 1, turned, kernels.lanes);
                  for (; i < end; ++i) {
                    const float* lanes = turned + (places[i].at - first) * kernels.lanes;
                    float* place = to + places[i].k * step;
                    for (int64_t l = 0; l < kernels.lanes; ++l) place[l] = places[i].factor * lanes[l];
                  }
                }
              });
  return packed;
}

// weights [k, lane] = weight[o, position, ins[lane]], of the position and the output o of term k.
Panels pack_transposed(const float* weight, const Terms& terms, const Indices& ins, const Convolution& args,
                       const Kernels& kernels) {
  const int64_t taps = args.kernel_height * args.kernel_width;
  Panels packed = panels_for(static_cast<int64_t>(ins.size()), terms.count(), kernels);
  fill_panels(packed, weight, ins, args.weight_last ? 1 : taps, args.threads,
              [&](const float* const* rows, float* to, int64_t step) {
                // Output by output, as all kernel positions of one lie together.
                const auto outs = terms.taps.empty() ? 0 : terms.taps[0].end - terms.taps[0].begin;
                for (int64_t j = 0; j < outs; ++j) {
                  for (const Terms::Tap& tap : terms.taps) {
                    const int64_t k = tap.begin + j, position = tap.row * args.kernel_width + tap.column;
                    const int64_t at = terms.channels[static_cast<size_t>(k)] * args.channels * taps +
                                       position * (args.weight_last ? args.channels : 1);
                    for (int64_t l = 0; l < kernels.lanes; ++l) to[k * step + l] = rows[l][at];
                  }
                }
              });
  return packed;
}

// Where the rows lie that pixels read.
class Reader {
 public:
  // Of one pixel: its image, and what its row and its column read by every kernel position, in floats; -1: nothing.
  struct Place {
    const float* image;
    const int64_t *down, *right;
    bool inner;  // whether every kernel position reads something, and so `origin` and the shifts hold
    const float* origin() const { return image + down[0] + right[0]; }  // what the first kernel position reads
    const float* at(int64_t row, int64_t column) const {                // null: nothing
      return down[row] < 0 || right[column] < 0 ? nullptr : image + down[row] + right[column];
    }
  };

  Reader(const Rows& rows, const Window& window, int64_t kernel_height, int64_t kernel_width, int64_t images)
      : rows_(rows),
        window_(window),
        down_(window.rows, kernel_height, window.columns.source * rows.stride),
        right_(window.columns, kernel_width, rows.stride),
        total_(images * window.pixels()),
        nothing_(static_cast<size_t>(rows.stride)) {}

  int64_t total() const { return total_; }
  const float* nothing() const { return nothing_.data(); }  // a row of zeros
  // How far from `origin` a kernel position reads.
  int64_t shift(int64_t row, int64_t column) const {
    return (window_.rows.step * row * window_.columns.source + window_.columns.step * column) * rows_.stride;
  }

  Place place(int64_t pixel) const {
    const int64_t line = pixel / window_.columns.size, column = pixel % window_.columns.size;
    const int64_t image = line / window_.rows.size, row = line % window_.rows.size;
    return {rows_.first + image * window_.source_pixels() * rows_.stride, down_.of(row), right_.of(column),
            down_.inner(row) && right_.inner(column)};
  }

 private:
  class Reads {
   public:
    Reads(const Axis& axis, int64_t taps, int64_t stride) : taps_(taps) {
      for (int64_t place = 0; place < axis.size; ++place) {
        inner_.push_back(true);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t at = axis.reads(place, tap);
          found_.push_back(at < 0 ? -1 : at * stride);
          if (at < 0) inner_.back() = false;
        }
      }
    }
    const int64_t* of(int64_t place) const { return found_.data() + place * taps_; }
    bool inner(int64_t place) const { return inner_[static_cast<size_t>(place)]; }

   private:
    int64_t taps_;
    Indices found_;
    std::vector<char> inner_;
  };

  const Rows& rows_;
  const Window& window_;
  Reads down_, right_;
  int64_t total_;
  Floats nothing_;
};

// Pixels at a time: their results are to stay in a cache until the epilogue. More of them where every channel's share
// is a piece of a plane, and where the weights of all panels are read from far away each time.
int64_t block_of(const Panels& panels, const Convolution& args) {
  const int64_t weights = panels.terms * panels.stride, results = std::max<int64_t>(1, panels.stride * kBlockPixels);
  if (weights > 2 * kPanelFloats / 3) return 4 * kBlockPixels;
  return args.channels_last ? kBlockPixels : kBlockPixels * std::clamp<int64_t>((1 << 16) / results, 1, 4);
}

// A part of what is taken kTileRows or four at a time, whichever leaves fewer places empty.
struct Piece {
  int64_t first, places;
  bool wide() const { return places > 4; }
};

std::vector<Piece> pieces_of(int64_t count) {
  std::vector<Piece> pieces;
  for (int64_t first = 0; first < count;) {
    const int64_t over = (count - first) % kTileRows;
    pieces.push_back({first, over >= 1 && over <= 4 ? 4 : kTileRows});
    first += pieces.back().places;
  }
  return pieces;
}

// How pixels are taken together. Tiles of neighbours multiply the zeros around an image with all of them; the same
// pixel of several images meets them together, and leaves them out.
struct Tiling {
  int64_t images, pixels;  // at a time; of one image, or of all end to end
  int64_t image_parts, pixel_parts;
  bool across;

  Tiling(const Window& window, const Terms& terms, int64_t images_given, int64_t block, int64_t threads) {
    const int64_t pixels_given = window.pixels();
    int64_t read = 0;  // by all kernel positions of all pixels of an image
    for (const Terms::Tap& tap : terms.taps) read += window.rows.reading(tap.row) * window.columns.reading(tap.column);
    const int64_t parts = (images_given + 15) / 16, together = (images_given + parts - 1) / std::max<int64_t>(1, parts);
    const std::vector<Piece> pieces = pieces_of(together);
    const double filled = pieces.empty() ? 1.0 : double(together) / double(pieces.back().first + pieces.back().places);
    const auto all = static_cast<double>(pixels_given * static_cast<int64_t>(terms.taps.size()));
    across = static_cast<double>(read) < 0.98 * filled * all;
    images = across ? together : 1;
    image_parts = across ? parts : 1;
    const int64_t total = across ? pixels_given : pixels_given * images_given;
    pixel_parts = std::max<int64_t>(1, (total * images + block - 1) / block);
    while (image_parts * pixel_parts % std::max<int64_t>(1, threads) != 0 && pixel_parts < total) ++pixel_parts;
    pixels = (total + pixel_parts - 1) / pixel_parts;
    if (!across) pixels = rounded_up(pixels, kTileRows);
  }
};

// Calls finish(thread, first, count, results [count, panels.stride]) for neighbouring pixels, of about `block` that are
// computed at a time. offsets: where the channel of every term lies in a row.
template <typename Finish>
void multiply_blocks(const Reader& reader, const Window& window, const Terms& terms,
                     const std::vector<int32_t>& offsets, const Panels& panels, const Kernels& kernels, int64_t images,
                     int64_t block, int64_t threads, const Finish& finish) {
  const int64_t total = reader.total(), taps = static_cast<int64_t>(terms.taps.size());
  if (total == 0) return;
  const Tiling tiling(window, terms, images, block, threads);
  const int64_t all_images = tiling.across ? images : 1, all_pixels = total / all_images;
  std::vector<int32_t> from_origin = offsets;  // of all kernel positions
  bool near = true;                            // they can be counted in 32 bits
  for (const Terms::Tap& tap : terms.taps) {
    const int64_t shift = reader.shift(tap.row, tap.column);
    near = near && std::abs(shift) < std::numeric_limits<int32_t>::max() / 2;
    for (int64_t k = tap.begin; near && k < tap.end; ++k)
      from_origin[static_cast<size_t>(k)] += static_cast<int32_t>(shift);
  }
  struct Tile {
    int64_t steps;
    const int32_t* offsets;
    int64_t row, count;  // where its first result goes, and how many it has
    bool wide;
  };
  // One step where every kernel position of every pixel reads something, else one per position that reads.
  const auto find = [&](int64_t first, int64_t distance, int64_t count, Step* steps, Tile& tile) {
    Reader::Place places[kTileRows];
    bool inner = near;
    for (int64_t i = 0; i < kTileRows; ++i) {
      places[i] = reader.place(first + std::min(i, count - 1) * distance);
      inner = inner && places[i].inner;
    }
    if (inner) {
      steps[0].begin = 0;
      steps[0].end = terms.count();
      for (int i = 0; i < kTileRows; ++i) steps[0].rows[i] = places[i].origin();
      tile.steps = 1;
      tile.offsets = from_origin.data();
      return;
    }
    tile.steps = 0;
    tile.offsets = offsets.data();
    for (const Terms::Tap& tap : terms.taps) {
      Step& step = steps[tile.steps];
      step.begin = tap.begin;
      step.end = tap.end;
      bool any = false;
      for (int i = 0; i < kTileRows; ++i) {
        const float* row = places[i].at(tap.row, tap.column);
        step.rows[i] = row ? row : reader.nothing();
        any = any || row;
      }
      if (any) ++tile.steps;
    }
  };
  parallel(tiling.image_parts * tiling.pixel_parts, 1, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const Scratch results = scratch(tiling.images * tiling.pixels * panels.stride);
    std::vector<Step> steps;
    std::vector<Tile> tiles;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t image = part / tiling.pixel_parts * tiling.images;
      const int64_t here = std::min(tiling.images, all_images - image);
      const int64_t first = part % tiling.pixel_parts * tiling.pixels;
      const int64_t count = std::min(tiling.pixels, all_pixels - first);
      if (count <= 0) continue;
      const std::vector<Piece> pieces = pieces_of(tiling.across ? here : count);
      const int64_t times = tiling.across ? count : 1;
      tiles.resize(pieces.size() * static_cast<size_t>(times));
      steps.resize(tiles.size() * static_cast<size_t>(std::max<int64_t>(1, taps)));
      for (size_t t = 0; t < tiles.size(); ++t) {
        const Piece& piece = pieces[t % pieces.size()];
        const int64_t pixel = static_cast<int64_t>(t / pieces.size());
        Tile& tile = tiles[t];
        tile.wide = piece.wide();
        tile.count = std::min(piece.places, (tiling.across ? here : count) - piece.first);
        tile.row = tiling.across ? piece.first * count + pixel : piece.first;
        const int64_t start = tiling.across ? (image + piece.first) * all_pixels + first + pixel : first + piece.first;
        tile.steps = 0;
        if (taps > 0)
          find(start, tiling.across ? all_pixels : 1, tile.count, steps.data() + static_cast<int64_t>(t) * taps, tile);
      }
      for (const Panels::Panel& panel : panels.panels) {
        for (size_t t = 0; t < tiles.size(); ++t) {
          const Tile& tile = tiles[t];
          kernels.product[tile.wide][panel.vectors - 1](
              steps.data() + static_cast<int64_t>(t) * taps, tile.steps, tile.offsets, panels.of(panel), tile.count,
              results.get() + tile.row * panels.stride + panel.first * panels.lanes,
              (tiling.across ? count : 1) * panels.stride);
        }
      }
      for (int64_t i = 0; i < here; ++i)
        finish(thread, (image + i) * all_pixels + first, count, results.get() + i * count * panels.stride);
    }
  });
}

// The epilogue of a block of pixels, and the sums over it.
class Epilogues {
 public:
  Epilogues(const Convolution& args, const Epilogue& epilogue, const Indices& outs, const Kernels& kernels, float* y,
            float* raw, bool with_sums)
      : args_(args),
        epilogue_(epilogue),
        kernels_(kernels),
        kept_(static_cast<int64_t>(outs.size())),
        some_(kept_ < args.out_channels),
        picker_(outs.data(), some_ ? kept_ : 0, args.out_channels),
        place_(places(outs.data(), kept_, args.out_channels)),
        y_(y),
        raw_(raw) {
    a_ = repeated(epilogue.a, args.out_channels, 1.0f);
    b_ = repeated(epilogue.b, args.out_channels, 0.0f);
    mask_ = repeated(epilogue.mask, args.out_channels, 1.0f);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    plain_ = !epilogue.residual && epilogue.low == -kInfinity && epilogue.high == kInfinity;
    for (const int64_t o : outs) plain_ = plain_ && a_[static_cast<size_t>(o)] == 1 && b_[static_cast<size_t>(o)] == 0;
    const int64_t summed = args.channels_last ? static_cast<int64_t>(a_.size()) : kept_;
    if (with_sums) sums_.assign(static_cast<size_t>(std::max<int64_t>(1, args.threads)), RowSums(summed));
  }

  // In NCHW, the planes of outputs that are not listed, but for those that hold a residual.
  void fill_masked() const {
    if (args_.channels_last || !some_) return;
    const int64_t pixels = args_.out_height * args_.out_width, channels = args_.out_channels;
    const float value = std::min(std::max(0.0f, epilogue_.low), epilogue_.high);
    parallel(args_.images * channels, kGrain / std::max<int64_t>(1, pixels), args_.threads,
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t plane = begin; plane < end; ++plane) {
                 if (place_[static_cast<size_t>(plane % channels)] >= 0) continue;
                 if (raw_) std::fill_n(raw_ + plane * pixels, pixels, 0.0f);
                 if (y_ && !epilogue_.residual) std::fill_n(y_ + plane * pixels, pixels, value);
               }
             });
  }

  void operator()(int64_t thread, int64_t first, int64_t count, const float* results, int64_t stride) {
    if (args_.channels_last) return rows(thread, first, count, results, stride);
    for (int64_t p = 0; p < count && !sums_.empty(); ++p) {
      RowSums& mine = sums_[static_cast<size_t>(thread)];
      add_squares(results + p * stride, kept_, mine.first(), mine.second());
      mine.row_done();
    }
    planes(first, count, results, stride);
  }

  void collect_sums(float* sums, float* squares) {
    if (args_.channels_last) return collect(sums_, args_.out_channels, sums, squares);
    Floats first(static_cast<size_t>(kept_)), second(first);
    collect(sums_, kept_, first.data(), second.data());
    for (int64_t c = 0; c < args_.out_channels; ++c) {
      const int64_t j = place_[static_cast<size_t>(c)];
      sums[c] = j < 0 ? 0.0f : first[static_cast<size_t>(j)];
      squares[c] = j < 0 ? 0.0f : second[static_cast<size_t>(j)];
    }
  }

 private:
  // What comes out is put where it belongs first, and read again while it is near.
  void rows(int64_t thread, int64_t first, int64_t count, const float* results, int64_t stride) {
    const int64_t channels = args_.out_channels, step = rows_at_once(channels);
    float* out = (raw_ ? raw_ : y_) + first * channels;
    if (some_)
      picker_.spread(results, stride, count, out);
    else if (stride == channels)
      std::copy_n(results, count * channels, out);
    else
      for (int64_t p = 0; p < count; ++p) std::copy_n(results + p * stride, channels, out + p * channels);
    for (int64_t p = 0; p < count; p += step) {
      const int64_t at = (first + p) * channels, length = std::min(step, count - p) * channels;
      const float* full = out + p * channels;
      if (!sums_.empty()) {
        RowSums& mine = sums_[static_cast<size_t>(thread)];
        add_squares(full, length, mine.first(), mine.second());
        mine.row_done();
      }
      if (!y_ || (plain_ && !raw_)) continue;
      row_forward(full, epilogue_.residual ? epilogue_.residual + at : nullptr, epilogue_.mask ? mask_.data() : nullptr,
                  length, a_.data(), b_.data(), epilogue_.low, epilogue_.high, y_ + at);
    }
  }

  void planes(int64_t first, int64_t count, const float* results, int64_t stride) const {
    const int64_t pixels = args_.out_height * args_.out_width, channels = args_.out_channels;
    const int64_t row = rounded_up(count, kernels_.lanes);
    const Scratch turned = scratch(kept_ * row);
    turn_rows(results, stride, count, kept_, kernels_, turned.get(), row);
    for (int64_t done = 0; done < count;) {
      const int64_t image = (first + done) / pixels, within = (first + done) % pixels;
      const int64_t here = std::min(count - done, pixels - within);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t j = place_[static_cast<size_t>(c)], at = (image * channels + c) * pixels + within;
        const float* from = j < 0 ? nullptr : turned.get() + j * row + done;
        if (!from && !epilogue_.residual) continue;  // fill_masked has been there
        if (raw_ && from) std::copy(from, from + here, raw_ + at);
        if (!y_) continue;
        if (epilogue_.mask && epilogue_.mask[c] == 0.0f) from = nullptr;
        plane_forward(from, epilogue_.residual ? epilogue_.residual + at : nullptr, here, a_[static_cast<size_t>(c)],
                      b_[static_cast<size_t>(c)], epilogue_.low, epilogue_.high, y_ + at);
      }
      done += here;
    }
  }

  const Convolution& args_;
  const Epilogue& epilogue_;
  const Kernels& kernels_;
  int64_t kept_;
  bool some_, plain_;
  Picker picker_;
  Indices place_;
  float *y_, *raw_;
  Floats a_, b_, mask_;
  std::vector<RowSums> sums_;  // one per thread
};

// The gradient of x in NCHW from that of its active channels, a row per pixel: times in_mask, zero in the others; and
// the sums of it, before that, times x, into `dots` where there are some.
void planes_of(const float* by_pixel, const float* x, const Convolution& args, const Indices& ins,
               const Kernels& kernels, float* grad_x, std::vector<RowSums>& dots) {
  const int64_t pixels = args.height * args.width, kept = static_cast<int64_t>(ins.size());
  const int64_t piece = rounded_up(kBlockPixels, kernels.lanes), pieces = (pixels + piece - 1) / piece;
  const Indices place = places(ins.data(), kept, args.channels);
  parallel(args.images * pieces, kGrain / std::max<int64_t>(1, args.channels * piece), args.threads,
           [&](int64_t thread, int64_t begin, int64_t end) {
             const Scratch turned = scratch(kept * piece);  // [kept, piece]
             for (int64_t at = begin; at < end; ++at) {
               const int64_t image = at / pieces, first = at % pieces * piece, count = std::min(piece, pixels - first);
               turn_rows(by_pixel + (image * pixels + first) * kept, kept, count, kept, kernels, turned.get(), piece);
               for (int64_t c = 0; c < args.channels; ++c) {
                 const int64_t j = place[static_cast<size_t>(c)], to = (image * args.channels + c) * pixels + first;
                 if (j < 0) {
                   std::fill_n(grad_x + to, count, 0.0f);
                   continue;
                 }
                 const float* from = turned.get() + j * piece;
                 copy(from, count, args.in_mask ? args.in_mask[c] : 1.0f, grad_x + to);
                 if (!dots.empty()) dots[static_cast<size_t>(thread)].first()[c] += dot(from, x + to, count);
               }
               if (!dots.empty()) dots[static_cast<size_t>(thread)].row_done();
             }
           });
}

}  // namespace

void convolve(const float* x, const float* weight, const Convolution& args, const Epilogue& epilogue, float* y,
              float* raw, float* sums, float* squares) {
  const Indices outs = active(args.out_mask, args.out_channels);
  const Kernels& kernels = kernels_for(args.lanes, static_cast<int64_t>(outs.size()));
  const Terms terms =
      args.column_count >= 0 ? listed_columns(args) : every_tap(args, active(args.in_mask, args.channels));
  const Panels panels = pack(weight, terms, outs, args, kernels);
  std::vector<int32_t> offsets = terms.channels;
  Rows rows{nullptr, x, args.channels};
  if (!args.channels_last) {
    Indices used(terms.channels.begin(), terms.channels.end());
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    const int64_t kept = static_cast<int64_t>(used.size());
    rows = pick_rows(x, args.images, args.channels, args.height * args.width, false, used, kept, kernels, args.threads);
    const Indices place = places(used.data(), kept, args.channels);
    for (int32_t& offset : offsets) offset = static_cast<int32_t>(place[static_cast<size_t>(offset)]);
  }
  Epilogues finish(args, epilogue, outs, kernels, y, raw, sums != nullptr);
  const Window window = forward_window(args);
  const Reader reader(rows, window, args.kernel_height, args.kernel_width, args.images);
  multiply_blocks(reader, window, terms, offsets, panels, kernels, args.images, block_of(panels, args), args.threads,
                  [&](int64_t thread, int64_t first, int64_t count, const float* results) {
                    finish(thread, first, count, results, panels.stride);
                  });
  finish.fill_masked();
  if (sums) finish.collect_sums(sums, squares);
}

void input_gradient(const float* grad, const float* x, const float* weight, const Convolution& args, float* grad_x,
                    float* grad_mask) {
  const Indices outs = active(args.out_mask, args.out_channels), ins = active(args.in_mask, args.channels);
  const Kernels& kernels = kernels_for(args.lanes, static_cast<int64_t>(ins.size()));
  const auto kept = static_cast<int64_t>(ins.size());
  const Terms terms = every_tap(args, outs);
  const Panels panels = pack_transposed(weight, terms, ins, args, kernels);
  std::vector<int32_t> offsets = terms.channels;
  Rows rows{nullptr, grad, args.out_channels};
  if (!args.channels_last) {
    const int64_t stride = static_cast<int64_t>(outs.size());
    rows = pick_rows(grad, args.images, args.out_channels, args.out_height * args.out_width, false, outs, stride,
                     kernels, args.threads);
    for (size_t k = 0; k < offsets.size(); ++k) offsets[k] = static_cast<int32_t>(static_cast<int64_t>(k) % stride);
  }
  const Window window = gradient_window(args);
  const int64_t pixels = window.pixels();
  const Reader reader(rows, window, args.kernel_height, args.kernel_width, args.images);
  const auto threads = static_cast<size_t>(std::max<int64_t>(1, args.threads));
  std::vector<RowSums> dots(args.in_mask ? threads : 0, RowSums(args.channels));
  if (args.channels_last) {
    const Picker picker(ins.data(), kept, args.channels);
    const int64_t step = rows_at_once(args.channels);
    const Floats factor = repeated(args.in_mask, args.channels, 1.0f);
    for (RowSums& mine : dots) mine = RowSums(step * args.channels);
    multiply_blocks(reader, window, terms, offsets, panels, kernels, args.images, block_of(panels, args), args.threads,
                    [&](int64_t thread, int64_t first, int64_t count, const float* results) {
                      for (int64_t p = 0; p < count; p += step) {
                        const int64_t rows_here = std::min(step, count - p), length = rows_here * args.channels;
                        const int64_t at = (first + p) * args.channels;
                        picker.spread(results + p * panels.stride, panels.stride, rows_here, grad_x + at);
                        if (!args.in_mask) continue;
                        RowSums& mine = dots[static_cast<size_t>(thread)];
                        add_products(grad_x + at, x + at, length, mine.first());
                        mine.row_done();
                        multiply(grad_x + at, factor.data(), length, grad_x + at);
                      }
                    });
  } else {
    const Scratch by_pixel = scratch(args.images * pixels * kept);  // planes wait for all of them
    multiply_blocks(reader, window, terms, offsets, panels, kernels, args.images, block_of(panels, args), args.threads,
                    [&](int64_t, int64_t first, int64_t count, const float* results) {
                      for (int64_t p = 0; p < count; ++p)
                        std::copy_n(results + p * panels.stride, kept, by_pixel.get() + (first + p) * kept);
                    });
    planes_of(by_pixel.get(), x, args, ins, kernels, grad_x, dots);
  }
  if (!args.in_mask) return;
  collect(dots, args.channels, grad_mask, nullptr);
  for (int64_t c = 0; c < args.channels; ++c)
    if (args.in_mask[c] == 0.0f) grad_mask[c] = 0.0f;  // whatever x holds there
}

void weight_gradient(const float* grad, const float* x, const Convolution& args, float* grad_weight) {
  const Indices outs = active(args.out_mask, args.out_channels), ins = active(args.in_mask, args.channels);
  const auto kept_ins = static_cast<int64_t>(ins.size()), kept_outs = static_cast<int64_t>(outs.size());
  const Kernels& kernels = kernels_for(args.lanes, kept_ins);
  const int64_t lanes = kernels.lanes, width = rounded_up(kept_ins, lanes);
  const int64_t taps = args.kernel_height * args.kernel_width, row = taps * width;  // of a sum per output
  const Window window = forward_window(args);
  const int64_t total = args.images * window.pixels();
  const bool as_it_is = args.channels_last && kept_ins == args.channels && width == kept_ins;
  const Rows rows = as_it_is ? Rows{nullptr, x, args.channels}
                             : pick_rows(x, args.images, args.channels, window.source_pixels(), args.channels_last, ins,
                                         width, kernels, args.threads);
  Rows grads{nullptr, grad, args.out_channels};
  Indices places_of_outs = outs;
  if (!args.channels_last) {
    grads =
        pick_rows(grad, args.images, args.out_channels, window.pixels(), false, outs, kept_outs, kernels, args.threads);
    std::iota(places_of_outs.begin(), places_of_outs.end(), 0);
  }
  const std::vector<Piece> pieces = pieces_of(kept_outs);
  const int64_t padded_outs = pieces.empty() ? 0 : pieces.back().first + pieces.back().places;
  std::vector<int32_t> offsets(places_of_outs.begin(), places_of_outs.end());
  if (!offsets.empty()) offsets.resize(static_cast<size_t>(padded_outs), offsets.back());
  const Reader reader(rows, window, args.kernel_height, args.kernel_width, args.images);
  const int64_t blocks = (total + kBlockPixels - 1) / kBlockPixels;
  std::vector<Floats> sums(static_cast<size_t>(std::max<int64_t>(1, args.threads)));
  parallel(blocks, 1, args.threads, [&](int64_t thread, int64_t first_block, int64_t last_block) {
    Floats& mine = sums[static_cast<size_t>(thread)];
    mine.resize(static_cast<size_t>(padded_outs * row));
    std::vector<const float*> inner, inner_grads, outer, outer_grads;  // rows of pixels, and of their gradients
    std::vector<std::pair<Reader::Place, const float*>> edge;
    const auto add_up = [&](const std::vector<const float*>& read, const std::vector<const float*>& given,
                            int64_t shift, int64_t tap) {
      const auto count = static_cast<int64_t>(read.size());
      if (count == 0) return;
      for (int64_t c = 0; c < width;) {
        const int64_t vectors = std::min(kernels.most_vectors, (width - c) / lanes);
        for (const Piece& piece : pieces) {
          kernels.outer_product[piece.wide()][vectors - 1](read.data(), given.data(), count, shift + c,
                                                           offsets.data() + piece.first,
                                                           mine.data() + piece.first * row + tap * width + c, row);
        }
        c += vectors * lanes;
      }
    };
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t end = std::min(total, (block + 1) * kBlockPixels);
      inner.clear();
      inner_grads.clear();
      edge.clear();
      for (int64_t pixel = block * kBlockPixels; pixel < end; ++pixel) {
        const Reader::Place place = reader.place(pixel);
        const float* given = grads.first + pixel * grads.stride;
        if (place.inner) {
          inner.push_back(place.origin());
          inner_grads.push_back(given);
        } else {
          edge.emplace_back(place, given);
        }
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t down = tap / args.kernel_width, right = tap % args.kernel_width;
        add_up(inner, inner_grads, reader.shift(down, right), tap);
        outer.clear();
        outer_grads.clear();
        for (const auto& [place, given] : edge) {
          const float* read = place.at(down, right);
          if (!read) continue;
          outer.push_back(read);
          outer_grads.push_back(given);
        }
        add_up(outer, outer_grads, 0, tap);
      }
    }
  });
  const int64_t all = args.channels * taps;
  const int64_t tap_stride = args.weight_last ? args.channels : 1, channel_stride = args.weight_last ? 1 : taps;
  const Indices place = places(outs.data(), kept_outs, args.out_channels);
  parallel(args.out_channels, kGrain / std::max<int64_t>(1, all), args.threads,
           [&](int64_t, int64_t begin, int64_t end) {
             Floats total_row(static_cast<size_t>(row));
             for (int64_t o = begin; o < end; ++o) {
               float* to = grad_weight + o * all;
               const int64_t j = place[static_cast<size_t>(o)];
               if (j < 0 || kept_ins < args.channels) std::fill(to, to + all, 0.0f);
               if (j < 0) continue;
               std::fill(total_row.begin(), total_row.end(), 0.0f);
               for (const Floats& part : sums)
                 if (!part.empty()) add(part.data() + j * row, row, total_row.data());
               for (int64_t tap = 0; tap < taps; ++tap) {
                 const float* from = total_row.data() + tap * width;
                 for (int64_t i = 0; i < kept_ins; ++i) {
                   const int64_t channel = ins[static_cast<size_t>(i)];
                   const float times = args.in_mask ? args.in_mask[channel] : 1.0f;
                   to[tap * tap_stride + channel * channel_stride] = times * from[i];
                 }
               }
             }
           });
}

}  // namespace hwprune
