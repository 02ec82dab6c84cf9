// Implicit GEMM. One block first writes a plan: the active channels of both sides, and a table of the columns (kernel
// row, kernel column, active channel) that the products walk. A second kernel gathers the active weights in that order,
// the input mask multiplied in. The products then never look at a mask; how many channels are active is read on the
// device, and blocks beyond them leave at once.
//
// Tiles of pixels are loaded in 16-byte granules where every granule of the table is a run of channels aligned in
// memory (nothing masked, whole granules masked, or columns pruned in such blocks), else element by element.
//
// Where few columns are listed, the input's gradient is that of a pointwise convolution whose channels are the listed
// columns; a last kernel sums its products, kept as float, where those columns stand in the input.
#include "cuda/activation.cuh"
#include "cuda/launch.cuh"
#include "cuda/masked_conv.cuh"
#include "cuda/tile.cuh"

namespace hwprune {
namespace {

constexpr int kTileRows = 128;  // of output pixels
constexpr int kDirectChannels = 32, kDirectThreads = 256;
constexpr int kPlanThreads = 1024;
constexpr int kWaveBlocks = 512;  // what backward-weight splits its pixels for: a few blocks for each multiprocessor

// ---- Plan

// The active ones among a side's channels; in device memory.
struct Channels {
  Column* table;  // [count, filled up to whole granules with padding]: offset is the channel
  int* position;  // [all channels]: place in table, or -1
  int* count;
  int* runs;  // whether every granule is a run
};

struct PlanArguments {
  Channels outer;  // the side whose channels are the columns of the result
  Channels inner;  // the side that is summed over
  Column* table;   // of the inner side: [taps, inner channels] or [columns]
  int* starts;     // [phases + 1] into table
  int* table_runs;
  int* rank;  // [taps]: place of a tap among those sorted by phase
  const float *outer_mask, *inner_mask;
  int outer_channels, inner_channels;
  int weight_row;         // numbers of the weight for one output channel
  const int64_t* listed;  // transposed: the columns of the weight that the outer channels stand for, or null
  bool outer_aligned, inner_aligned;
  const int64_t* columns;
  int column_count;
  int granule;
  int kernel_height, kernel_width, dilation_height, dilation_width;
  // Forward: a tap reads at + tap * dilation. Transposed: phase p reads at (p + padding - tap * dilation) / stride, for
  // the taps that this divides.
  bool transposed;
  int stride_height, stride_width, padding_height, padding_width;
  int width;  // of the images that the table reads
};

__device__ int round_up(int count, int granule) { return ceil_div(count, granule) * granule; }

__device__ void compact(const Channels& out, const float* mask, int channels, int granule, bool aligned) {
  __shared__ int warp_counts[kPlanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int count = 0;
  for (int start = 0; start < channels; start += kPlanThreads) {
    const int channel = start + static_cast<int>(threadIdx.x);
    const bool active = channel < channels && (mask == nullptr || mask[channel] != 0);
    const unsigned ballot = __ballot_sync(0xffffffffu, active);
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();
    int place = count + __popc(ballot & ((1u << lane) - 1));
    for (int other = 0; other < kPlanThreads / 32; ++other) {
      if (other < warp) place += warp_counts[other];
      count += warp_counts[other];
    }
    if (channel < channels) out.position[channel] = active ? place : -1;
    if (active) out.table[place] = {channel, 0, 0, channel};
    __syncthreads();
  }
  const int padded = round_up(count, granule);
  for (int place = count + threadIdx.x; place < padded; place += kPlanThreads) out.table[place] = padding_column();
  if (threadIdx.x == 0) {
    *out.count = count;
    *out.runs = aligned && padded == count;
  }
  __syncthreads();
  for (int place = threadIdx.x * granule; place < count; place += kPlanThreads * granule) {
    const int first = out.table[place].offset;
    if (padded == count && (first % granule != 0 || out.table[place + granule - 1].offset != first + granule - 1))
      *out.runs = 0;
  }
  __syncthreads();
}

struct Tap {
  int phase, dh, dw;
};

__device__ Tap tap_at(const PlanArguments& plan, int tap) {
  const int h = tap / plan.kernel_width * plan.dilation_height, w = tap % plan.kernel_width * plan.dilation_width;
  if (!plan.transposed) return {0, h, w};
  const int up = h - plan.padding_height, left = w - plan.padding_width;
  const int phase_h = (up % plan.stride_height + plan.stride_height) % plan.stride_height;
  const int phase_w = (left % plan.stride_width + plan.stride_width) % plan.stride_width;
  return {phase_h * plan.stride_width + phase_w, (phase_h - up) / plan.stride_height,
          (phase_w - left) / plan.stride_width};
}

__device__ Column column_at(const PlanArguments& plan, int tap, int channel) {
  const Tap at = tap_at(plan, tap);
  return {(at.dh * plan.width + at.dw) * plan.inner_channels + channel, at.dh, at.dw,
          tap * plan.inner_channels + channel};
}

__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(PlanArguments plan) {
  const int taps = plan.kernel_height * plan.kernel_width, granule = plan.granule;
  compact(plan.outer, plan.outer_mask, plan.outer_channels, granule, plan.outer_aligned);
  if (plan.column_count >= 0 && !plan.transposed) {
    const int count = plan.column_count, padded = round_up(count, granule);
    if (threadIdx.x == 0) {
      plan.starts[0] = 0;
      plan.starts[1] = padded;
      *plan.table_runs = plan.inner_aligned && padded == count;
    }
    __syncthreads();
    for (int place = threadIdx.x; place < padded; place += kPlanThreads) {
      const int column = place < count ? static_cast<int>(plan.columns[place]) : 0;
      plan.table[place] = place < count ? column_at(plan, column / plan.inner_channels, column % plan.inner_channels)
                                        : padding_column();
      if (place % granule == 0 && padded == count &&
          (column % granule != 0 || plan.columns[place + granule - 1] != column + granule - 1))
        *plan.table_runs = 0;
    }
    return;
  }
  compact(plan.inner, plan.inner_mask, plan.inner_channels, granule, plan.inner_aligned);
  const int active = *plan.inner.count, padded = round_up(active, granule);
  const int phases = plan.transposed ? plan.stride_height * plan.stride_width : 1;
  if (threadIdx.x == 0) *plan.table_runs = *plan.inner.runs;
  for (int phase = threadIdx.x; phase <= phases; phase += kPlanThreads) {
    int before = 0;
    for (int tap = 0; tap < taps; ++tap) before += tap_at(plan, tap).phase < phase;
    plan.starts[phase] = before * padded;
  }
  for (int tap = threadIdx.x; tap < taps; tap += kPlanThreads) {
    const int phase = tap_at(plan, tap).phase;
    int before = 0;
    for (int other = 0; other < taps; ++other) {
      const int its = tap_at(plan, other).phase;
      before += its < phase || (its == phase && other < tap);
    }
    plan.rank[tap] = before;
  }
  __syncthreads();
  for (int entry = threadIdx.x; entry < taps * padded; entry += kPlanThreads) {
    const int tap = entry / padded, place = entry % padded;
    plan.table[plan.rank[tap] * padded + place] =
        place < active ? column_at(plan, tap, plan.inner.table[place].offset) : padding_column();
  }
}

// Whether increasing `columns` hold this one; if so, `place` says where.
__device__ bool find_column(const int64_t* columns, int count, int column, int& place) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (columns[middle] < column)
      low = middle + 1;
    else
      high = middle;
  }
  place = low;
  return low < count && columns[low] == column;
}

// packed [outer, stride]: the active weights, each row in the order of the table and zero in its padding.
template <typename T>
__global__ void pack_kernel(PlanArguments plan, const T* weight, T* packed, int stride) {
  const int phases = plan.transposed ? plan.stride_height * plan.stride_width : 1;
  const int count = plan.starts[phases];
  for (int row = blockIdx.y; row < *plan.outer.count; row += gridDim.y) {
    const int64_t outer = plan.outer.table[row].offset;
    for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < count; k += gridDim.x * blockDim.x) {
      const int index = plan.table[k].index;
      float value = 0;
      if (index >= 0) {
        const int tap = index / plan.inner_channels, inner = index % plan.inner_channels;
        if (!plan.transposed) {
          value = to_float(weight[outer * plan.weight_row + index]);
          if (plan.inner_mask != nullptr) value *= plan.inner_mask[inner];
        } else {
          const int column =
              plan.listed == nullptr ? tap * plan.outer_channels + static_cast<int>(outer) : plan.listed[outer];
          int place;
          if (plan.column_count < 0 || find_column(plan.columns, plan.column_count, column, place))
            value = to_float(weight[static_cast<int64_t>(inner) * plan.weight_row + column]);
        }
      }
      packed[static_cast<int64_t>(row) * stride + k] = from_float<T>(value);
    }
  }
}

// ---- Epilogue

// What becomes of a tile of results v [pixels, channels]: y = act(gate * (scale * v + shift) + residual), raw = v.
// Channels whose gate is 0 have v = 0 and are gated; with hard_gate a gate other than 0 counts as 1.
template <typename T>
struct Epilogue {
  float* exact;  // [pixels, channels] or null: where v is wanted as it was summed, and nothing else
  T* y;          // [pixels, channels]
  T* raw;        // or null
  const T* residual;
  const float *gate, *scale, *shift;  // [channels] or null
  bool hard_gate;
  Activation act;
  int channels;
  bool vectorised;  // rows of all four are whole, aligned granules
  // Per tile of pixels and channel, where not null: the sum of v times factor (or 1), and of v squared.
  float *sums, *squares;  // [tiles, channels]
  const T* factor;        // [pixels, channels]

  __device__ float finish(float v, int channel, float residual_value) const {
    const float gated = gate == nullptr ? 1 : gate[channel];
    float z = 0;
    if (gated != 0) {
      z = v;
      if (scale != nullptr) z *= scale[channel];
      if (shift != nullptr) z += shift[channel];
      if (!hard_gate) z *= gated;
    }
    return activate(act, z + residual_value);
  }
};

// Results in shared memory. Padding keeps the accumulators' writes apart in the banks.
template <int kColumns>
using Staged = float[kColumns + 8];

// Writes channels first to last of a tile's pixels; column j of `staged` is the channel whose place is j + first_place.
template <typename T, int kColumns, int kThreads>
__device__ void write_tile(const Staged<kColumns>* staged, const int64_t* pixels, const Epilogue<T>& to, int first,
                           int last, const int* position, int first_place) {
  constexpr int kCount = kGranule<T>;
  using Vector = Pack<T, kCount>;
  const int first_unit = first / kCount, units = ceil_div(last, kCount) - first_unit;
  for (int item = threadIdx.x; item < kTileRows * units; item += kThreads) {
    const int row = item / units, start = (first_unit + item % units) * kCount;
    if (pixels[row] < 0) continue;
    const int64_t base = pixels[row] * to.channels + start;
    const bool whole = to.vectorised && start >= first && start + kCount <= last;
    Vector residual = {}, y, raw;
    if (to.residual != nullptr && whole) residual = *reinterpret_cast<const Vector*>(to.residual + base);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int channel = start + i;
      if (channel < first || channel >= last) continue;
      const int place = position == nullptr ? channel : position[channel];
      const float v = place < 0 ? 0 : staged[row][place - first_place];
      if (to.residual != nullptr && !whole) residual.values[i] = to.residual[base + i];
      y.values[i] = from_float<T>(to.finish(v, channel, to.residual == nullptr ? 0 : to_float(residual.values[i])));
      raw.values[i] = from_float<T>(v);
      if (!whole) {
        to.y[base + i] = y.values[i];
        if (to.raw != nullptr) to.raw[base + i] = raw.values[i];
      }
    }
    if (whole) {
      *reinterpret_cast<Vector*>(to.y + base) = y;
      if (to.raw != nullptr) *reinterpret_cast<Vector*>(to.raw + base) = raw;
    }
  }
}

// Writes channels first to last of a tile's pixels as they were summed; none is masked. Neighbouring lanes write
// neighbouring channels, for a pixel's seldom are whole granules.
template <int kColumns, int kThreads>
__device__ void write_exact(const Staged<kColumns>* staged, const int64_t* pixels, float* exact, int channels,
                            int first, int last) {
  const int width = last - first;
  for (int item = threadIdx.x; item < kTileRows * width; item += kThreads) {
    const int row = item / width, column = item % width;
    if (pixels[row] >= 0) exact[pixels[row] * channels + first + column] = staged[row][column];
  }
}

// Column j holds channel table[first_place + j].
template <typename T, int kColumns>
__device__ void sum_tile(const Staged<kColumns>* staged, const int64_t* pixels, const Epilogue<T>& to, int64_t tile,
                         const Column* table, int first_place, int count) {
  const int place = first_place + threadIdx.x;
  if (to.sums == nullptr || threadIdx.x >= kColumns || place >= count) return;
  const int channel = table == nullptr ? place : table[place].offset;
  constexpr int kParts = 4;  // short sums round less, and their additions need not wait for each other
  float sum[kParts] = {}, square[kParts] = {};
#pragma unroll kParts
  for (int row = 0; row < kTileRows; ++row) {
    const float v = staged[row][threadIdx.x];
    if (pixels[row] < 0) continue;
    sum[row % kParts] += to.factor == nullptr ? v : v * to_float(to.factor[pixels[row] * to.channels + channel]);
    square[row % kParts] += v * v;
  }
  to.sums[tile * to.channels + channel] = sum[0] + sum[1] + (sum[2] + sum[3]);
  if (to.squares != nullptr) to.squares[tile * to.channels + channel] = square[0] + square[1] + (square[2] + square[3]);
}

// Sums over tiles, 0 where the gate is.
__global__ void reduce_kernel(const float* partial_sums, const float* partial_squares, int64_t tiles, int channels,
                              const float* gate, float* sums, float* squares) {
  const float sum = column_total(partial_sums, tiles, channels);
  const float square = partial_squares == nullptr ? 0 : column_total(partial_squares, tiles, channels);
  const int channel = blockIdx.x * 32 + threadIdx.x;
  if (threadIdx.y != 0 || channel >= channels) return;
  const bool active = gate == nullptr || gate[channel] != 0;
  sums[channel] = active ? sum : 0;
  if (squares != nullptr) squares[channel] = active ? square : 0;
}

// ---- Products

// The pixels of the result, phase by phase: pixel (i, j) of phase (p, q) stands at (i * phases_h + p, j * phases_w + q)
// and reads the source around (i * stride_h + origin_h, j * stride_w + origin_w).
struct Pixels {
  int batch, height, width;  // of the result
  int phases_h, phases_w;
  int stride_h, stride_w, origin_h, origin_w;
  int source_height, source_width, source_channels;

  __host__ __device__ int rows(int phase) const {
    return batch * ceil_div(height - phase / phases_w, phases_h) * ceil_div(width - phase % phases_w, phases_w);
  }
  __device__ Row locate(int phase, int row, int64_t& pixel) const {
    if (row >= rows(phase)) {
      pixel = -1;
      return {0, kOutside, kOutside};
    }
    const int p = phase / phases_w, q = phase % phases_w;
    const int columns = ceil_div(width - q, phases_w), lines = ceil_div(height - p, phases_h);
    const int j = row % columns, line = row / columns, i = line % lines, image = line / lines;
    pixel = (static_cast<int64_t>(image) * height + i * phases_h + p) * width + j * phases_w + q;
    const int h = i * stride_h + origin_h, w = j * stride_w + origin_w;
    const int64_t base = (static_cast<int64_t>(image) * source_height + h) * source_width + w;
    return {base * source_channels, h, w};
  }
};

// The table of a convolution with nothing masked, worked out where it is used.
struct DenseTable {
  int channels, kernel_width, dilation_height, dilation_width, width;

  __device__ Column at(int k) const {
    const int tap = k / channels, dh = tap / kernel_width * dilation_height, dw = tap % kernel_width * dilation_width;
    return {(dh * width + dw) * channels + k % channels, dh, dw, k};
  }
};

template <typename T>
struct ProductArguments {
  Pixels pixels;
  const T* source;
  const T* weight;  // [outer, weight_stride], k along rows
  int64_t weight_stride;
  int channels, channel_tiles;
  int tiles;            // of pixels, per phase
  const Column* outer;  // null: every channel, in order
  const int *outer_position, *outer_count;
  const Column* table;  // null: `dense`, of dense_count columns
  const int *table_starts, *table_runs;
  DenseTable dense;
  int dense_count;
  Epilogue<T> epilogue;
};

template <typename T, int kColumns>
constexpr int kSlotBytes = (kTileRows + kColumns) * kStepBytes;
template <int kColumns>
constexpr int kThreadsFor = kColumns == 128 ? 256 : 128;
template <int kColumns>
constexpr int kProductShared =
    (kStages * (kTileRows + kColumns) * kStepBytes > kTileRows * static_cast<int>(sizeof(Staged<kColumns>))
         ? kStages * (kTileRows + kColumns) * kStepBytes
         : kTileRows * static_cast<int>(sizeof(Staged<kColumns>))) +
    kTileRows * static_cast<int>(sizeof(Row) + sizeof(int64_t));

// [kTileRows pixels, kColumns channels] = pixels x weight^T, over one phase's part of the table.
template <typename Engine, int kColumns>
struct ProductOperands {
  using T = typename Engine::T;
  static constexpr int kThreads = kThreadsFor<kColumns>;
  static constexpr int kM = kColumns == 32 ? 2 : 4, kN = 4;  // a warp owns 16 kM x 8 kN
  static constexpr int kWarpsM = kTileRows / (16 * kM);

  const ProductArguments<T>& args;
  unsigned char* slots;
  const Row* rows;
  int begin, end;  // of the table
  bool runs;
  int first_place, count;  // of the channels
  Column next;
  Accumulators<kM, kN> acc = {};

  __device__ ProductOperands(const ProductArguments<T>& args, unsigned char* slots, const Row* rows, int phase,
                             int first_place, int count)
      : args(args), slots(slots), rows(rows), first_place(first_place), count(count) {
    begin = args.table == nullptr ? 0 : args.table_starts[phase];
    end = args.table == nullptr ? args.dense_count : args.table_starts[phase + 1];
    runs = args.table == nullptr || *args.table_runs != 0;
    next = fetch(0);
  }
  __device__ int steps() const { return ceil_div(end - begin, kStep<T>); }
  __device__ Column fetch(int step) const {
    const int k = begin + step * kStep<T> + own_column<T, kStep<T>>(runs);
    if (k >= end) return padding_column();
    return args.table == nullptr ? args.dense.at(k) : args.table[k];
  }
  __device__ void prepare(int) {}
  __device__ void load(int step, int slot) {
    unsigned char* tile = slots + slot * kSlotBytes<T, kColumns>;
    const Column column = next;
    next = fetch(step + 1);
    load_tile<T, kTileRows, kStep<T>, kThreads>(tile, args.source, args.pixels.source_height, args.pixels.source_width,
                                                rows, column, runs);
    tile += kTileRows * kStepBytes;
    const int granule = threadIdx.x % 4, k = begin + step * kStep<T> + granule * kGranule<T>;
#pragma unroll
    for (int i = 0; i < kColumns * 4 / kThreads; ++i) {
      const int row = threadIdx.x / 4 + i * (kThreads / 4);
      const bool inside = first_place + row < count && k < end;
      copy_async_16(tile + Tile<T, kStep<T>>::granule(row, granule),
                    inside ? args.weight + (first_place + row) * args.weight_stride + k : args.weight, inside);
    }
  }
  __device__ int warp_row() const { return threadIdx.x / 32 % kWarpsM * 16 * kM; }
  __device__ int warp_column() const { return threadIdx.x / 32 / kWarpsM * 8 * kN; }
  __device__ void multiply(int slot) {
    const unsigned char* tile = slots + slot * kSlotBytes<T, kColumns>;
    multiply_rows(Engine(), tile, tile + kTileRows * kStepBytes, warp_row(), warp_column(), acc);
  }
};

template <typename Engine, int kColumns>
__global__ void __launch_bounds__(kThreadsFor<kColumns>, kColumns == 128 ? 2 : 3)
    product_kernel(ProductArguments<typename Engine::T> args) {
  using T = typename Engine::T;
  using Operands = ProductOperands<Engine, kColumns>;
  const int count = args.outer_count == nullptr ? args.channels : *args.outer_count;
  const int tile_column = blockIdx.x % args.channel_tiles, tile = blockIdx.x / args.channel_tiles, phase = blockIdx.y;
  const int first_place = tile_column * kColumns, next_place = first_place + kColumns;
  if (first_place > 0 && first_place >= count) return;

  unsigned char* slots = dynamic_shared();
  int64_t* pixels = reinterpret_cast<int64_t*>(slots + kProductShared<kColumns>) - kTileRows;
  Row* rows = reinterpret_cast<Row*>(pixels) - kTileRows;
  for (int row = threadIdx.x; row < kTileRows; row += Operands::kThreads)
    rows[row] = args.pixels.locate(phase, tile * kTileRows + row, pixels[row]);

  Operands operands(args, slots, rows, phase, first_place, count);
  run_pipeline(operands, operands.steps());

  auto* staged = reinterpret_cast<Staged<kColumns>*>(slots);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Operands::kM; ++i)
#pragma unroll
    for (int j = 0; j < Operands::kN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = operands.warp_row() + 16 * i + lane / 4 + 8 * half;
        const int column = operands.warp_column() + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(&staged[row][column]) =
            make_float2(operands.acc[i][j][2 * half], operands.acc[i][j][2 * half + 1]);
      }
  __syncthreads();

  // Of the masked channels a tile writes those that follow its active ones, so that every channel is written once.
  const int first = first_place == 0 ? 0 : args.outer == nullptr ? first_place : args.outer[first_place].offset;
  const int last = next_place >= count     ? args.channels
                   : args.outer == nullptr ? next_place
                                           : args.outer[next_place].offset;
  if (args.epilogue.exact != nullptr) {
    write_exact<kColumns, Operands::kThreads>(staged, pixels, args.epilogue.exact, args.channels, first, last);
    return;
  }
  write_tile<T, kColumns, Operands::kThreads>(staged, pixels, args.epilogue, first, last, args.outer_position,
                                              first_place);
  sum_tile<T, kColumns>(staged, pixels, args.epilogue, static_cast<int64_t>(phase) * args.tiles + tile, args.outer,
                        first_place, count);
}

template <int kSide>
constexpr int kWeightShared = kStages * 2 * kSide * kStepBytes;

template <typename T>
struct WeightArguments {
  Pixels pixels;  // of the forward convolution
  const T *grad, *source;
  int grad_channels;
  Channels outer;
  const Column* table;
  const int *table_starts, *table_runs;
  int column_tiles;
  int chunk;       // pixels per split, a multiple of a step
  float* partial;  // [splits, padded outer channels, table_stride]
  int64_t split_stride, table_stride;
};

// [kSide output channels, kSide columns] = grad^T x pixels, over one chunk of the pixels.
template <typename Engine, int kSide>
struct WeightOperands {
  using T = typename Engine::T;
  static constexpr int kThreads = kThreadsFor<kSide>;
  static constexpr int kM = kSide == 128 ? 4 : 2, kN = 4;
  static constexpr int kWarpsM = kSide / (16 * kM);
  static constexpr int kSlotBytesHere = 2 * kSide * kStepBytes;

  const WeightArguments<T>& args;
  unsigned char* slots;
  Row (*rows)[2][kStep<T>];  // [step % 2][grad, source][pixel]
  int begin, end;            // of the pixels
  Column grad_column, source_column;
  bool grad_runs, source_runs;
  Accumulators<kM, kN> acc = {};

  __device__ WeightOperands(const WeightArguments<T>& args, unsigned char* slots, Row (*rows)[2][kStep<T>], int first,
                            int first_column, int count, int columns)
      : args(args), slots(slots), rows(rows) {
    begin = blockIdx.y * args.chunk;
    end = min(begin + args.chunk, args.pixels.rows(0));
    grad_runs = *args.outer.runs != 0;
    source_runs = *args.table_runs != 0;
    const int place = first + own_column<T, kSide>(grad_runs), k = first_column + own_column<T, kSide>(source_runs);
    grad_column = place < count ? args.outer.table[place] : padding_column();
    source_column = k < columns ? args.table[k] : padding_column();
  }
  __device__ int steps() const { return ceil_div(end - begin, kStep<T>); }
  __device__ void prepare(int step) {
    if (threadIdx.x >= kStep<T>) return;
    const int pixel = begin + step * kStep<T> + threadIdx.x;
    int64_t at = -1;
    Row source = {0, kOutside, kOutside};
    if (pixel < end) source = args.pixels.locate(0, pixel, at);
    rows[step % 2][0][threadIdx.x] = {at * args.grad_channels, at < 0 ? kOutside : 0, 0};
    rows[step % 2][1][threadIdx.x] = source;
  }
  __device__ void load(int step, int slot) {
    unsigned char* tile = slots + slot * kSlotBytesHere;
    load_tile<T, kStep<T>, kSide, kThreads>(tile, args.grad, 1, 1, rows[step % 2][0], grad_column, grad_runs);
    load_tile<T, kStep<T>, kSide, kThreads>(tile + kSide * kStepBytes, args.source, args.pixels.source_height,
                                            args.pixels.source_width, rows[step % 2][1], source_column, source_runs);
  }
  __device__ int warp_row() const { return threadIdx.x / 32 % kWarpsM * 16 * kM; }
  __device__ int warp_column() const { return threadIdx.x / 32 / kWarpsM * 8 * kN; }
  __device__ void multiply(int slot) {
    const unsigned char* tile = slots + slot * kSlotBytesHere;
    multiply_columns<kSide, kSide>(Engine(), tile, tile + kSide * kStepBytes, warp_row(), warp_column(), acc);
  }
};

template <typename Engine, int kSide>
__global__ void __launch_bounds__(kThreadsFor<kSide>, kSide == 128 ? 2 : 3)
    weight_kernel(WeightArguments<typename Engine::T> args) {
  using T = typename Engine::T;
  using Operands = WeightOperands<Engine, kSide>;
  const int count = *args.outer.count, columns = args.table_starts[1];
  const int first = blockIdx.x / args.column_tiles * kSide, first_column = blockIdx.x % args.column_tiles * kSide;
  if (first >= count || first_column >= columns) return;

  __shared__ Row rows[2][2][kStep<T>];
  Operands operands(args, dynamic_shared(), rows, first, first_column, count, columns);
  run_pipeline(operands, operands.steps());

  float* out = args.partial + blockIdx.y * args.split_stride;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Operands::kM; ++i)
#pragma unroll
    for (int j = 0; j < Operands::kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first + operands.warp_row() + 16 * i + lane / 4 + e / 2 * 8;
        const int column = first_column + operands.warp_column() + 8 * j + lane % 4 * 2 + e % 2;
        if (row < count && column < columns) out[row * args.table_stride + column] = operands.acc[i][j][e];
      }
}

// ---- Groups, without tensor cores

template <typename T>
struct DirectArguments {
  Convolution conv;
  const T *source, *weight;
  Epilogue<T> epilogue;
  int channel_tiles;
};

// Calls body(tap, h, w) for the source pixels of one result pixel: inputs of an output, or outputs of an input.
template <bool kTransposed, typename Body>
__device__ void for_taps(const Convolution& c, int y, int x, Body body) {
  const int height = kTransposed ? c.out_height : c.height, width = kTransposed ? c.out_width : c.width;
  for (int i = 0; i < c.kernel_height; ++i) {
    int h = kTransposed ? y + c.padding_height - i * c.dilation_height
                        : y * c.stride_height - c.padding_height + i * c.dilation_height;
    if (h < 0 || (kTransposed && h % c.stride_height != 0)) continue;
    if (kTransposed) h /= c.stride_height;
    if (h >= height) continue;
    for (int j = 0; j < c.kernel_width; ++j) {
      int w = kTransposed ? x + c.padding_width - j * c.dilation_width
                          : x * c.stride_width - c.padding_width + j * c.dilation_width;
      if (w < 0 || (kTransposed && w % c.stride_width != 0)) continue;
      if (kTransposed) w /= c.stride_width;
      if (w < width) body(i * c.kernel_width + j, h, w);
    }
  }
}

// Lanes are channels, warps are pixels.
template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kDirectThreads, 2) direct_kernel(DirectArguments<T> args) {
  __shared__ Staged<kDirectChannels> staged[kTileRows];
  __shared__ int64_t pixels[kTileRows];
  const Convolution& c = args.conv;
  const int height = kTransposed ? c.height : c.out_height, width = kTransposed ? c.width : c.out_width;
  const int source_height = kTransposed ? c.out_height : c.height, source_width = kTransposed ? c.out_width : c.width;
  const int channels = kTransposed ? c.in_channels : c.out_channels;
  const int source_channels = kTransposed ? c.out_channels : c.in_channels;
  const int in_group = c.in_channels / c.groups, out_group = c.out_channels / c.groups;
  const int own_group = kTransposed ? in_group : out_group, source_group = kTransposed ? out_group : in_group;
  const int taps = c.kernel_height * c.kernel_width;
  const float* source_mask = kTransposed ? c.out_mask : c.in_mask;

  const int first = blockIdx.x % args.channel_tiles * kDirectChannels, tile = blockIdx.x / args.channel_tiles;
  const int channel = first + threadIdx.x % 32;
  const bool active = channel < channels && (args.epilogue.gate == nullptr || args.epilogue.gate[channel] != 0);
  const int source_first = channel / own_group * source_group;
  for (int row = threadIdx.x / 32; row < kTileRows; row += kDirectThreads / 32) {
    const int64_t pixel = static_cast<int64_t>(tile) * kTileRows + row;
    const bool inside = pixel < static_cast<int64_t>(c.batch) * height * width;
    if (threadIdx.x % 32 == 0) pixels[row] = inside ? pixel : -1;
    float sum = 0;
    if (inside && active) {
      const int64_t image = pixel / width / height;
      for_taps<kTransposed>(c, pixel / width % height, pixel % width, [&](int tap, int h, int w) {
        const T* at = args.source + ((image * source_height + h) * source_width + w) * source_channels + source_first;
        for (int i = 0; i < source_group; ++i) {
          const float mask = source_mask == nullptr ? 1 : source_mask[source_first + i];
          if (mask == 0) continue;
          const int64_t index =
              kTransposed ? (static_cast<int64_t>(source_first + i) * taps + tap) * in_group + channel % in_group
                          : (static_cast<int64_t>(channel) * taps + tap) * in_group + i;
          sum += to_float(at[i]) * (kTransposed ? 1 : mask) * to_float(args.weight[index]);
        }
      });
    }
    staged[row][threadIdx.x % 32] = sum;
  }
  __syncthreads();
  write_tile<T, kDirectChannels, kDirectThreads>(staged, pixels, args.epilogue, first,
                                                 min(first + kDirectChannels, channels), nullptr, first);
  sum_tile<T, kDirectChannels>(staged, pixels, args.epilogue, tile, nullptr, first, channels);
}

// partial [splits, out_channels, taps * in_channels / groups]; lanes are output channels, warps share the pixels.
template <typename T>
__global__ void __launch_bounds__(kDirectThreads)
    direct_weight_kernel(Convolution c, const T* grad, const T* source, float* partial, int chunk) {
  __shared__ float sums[kDirectThreads / 32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.x * 32 + lane;
  const int in_group = c.in_channels / c.groups, columns = gridDim.y, column = blockIdx.y;
  const int tap = column / in_group;
  const int dh = tap / c.kernel_width * c.dilation_height - c.padding_height;
  const int dw = tap % c.kernel_width * c.dilation_width - c.padding_width;
  const int in_channel = channel / (c.out_channels / c.groups) * in_group + column % in_group;
  float sum = 0;
  if (channel < c.out_channels && (c.out_mask == nullptr || c.out_mask[channel] != 0) &&
      (c.in_mask == nullptr || c.in_mask[in_channel] != 0)) {
    const int begin = blockIdx.z * chunk, end = min(begin + chunk, c.batch * c.out_height * c.out_width);
    for (int pixel = begin + warp; pixel < end; pixel += kDirectThreads / 32) {
      const int line = pixel / c.out_width;
      const int h = line % c.out_height * c.stride_height + dh, w = pixel % c.out_width * c.stride_width + dw;
      if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
      const int64_t at = (static_cast<int64_t>(line / c.out_height) * c.height + h) * c.width + w;
      sum += to_float(grad[static_cast<int64_t>(pixel) * c.out_channels + channel]) *
             to_float(source[at * c.in_channels + in_channel]);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || channel >= c.out_channels) return;
  for (int other = 1; other < kDirectThreads / 32; ++other) sum += sums[other][lane];
  partial[(static_cast<int64_t>(blockIdx.z) * c.out_channels + channel) * columns + column] = sum;
}

// grad_weight from the splits' partial sums in a fixed order, times the input mask; zero where masked. Null positions:
// partial holds every channel and column.
template <typename T>
__global__ void gather_weight_kernel(Convolution c, const float* partial, int splits, int64_t split_stride,
                                     int64_t table_stride, const int* out_position, const int* in_position,
                                     const int* in_count, int granule, T* grad_weight) {
  const int in_group = c.in_channels / c.groups, columns = c.kernel_height * c.kernel_width * in_group;
  const int64_t count = static_cast<int64_t>(c.out_channels) * columns;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < count;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int out = item / columns, column = item % columns;
    const int in = out / (c.out_channels / c.groups) * in_group + column % in_group;
    int row = out, k = column;
    bool active = (c.out_mask == nullptr || c.out_mask[out] != 0) && (c.in_mask == nullptr || c.in_mask[in] != 0);
    if (active && out_position != nullptr) {
      row = out_position[out];
      if (c.column_count >= 0)
        active = find_column(c.columns, c.column_count, column, k);
      else
        k = column / in_group * round_up(*in_count, granule) + in_position[in];
    }
    float sum = 0;
    if (active) {
      for (int split = 0; split < splits; ++split) sum += partial[split * split_stride + row * table_stride + k];
      if (c.in_mask != nullptr) sum *= c.in_mask[in];
    }
    grad_weight[item] = from_float<T>(sum);
  }
}

// ---- The input's gradient of listed columns

// places [columns of the weight]: where each stands in the list, or -1.
__global__ void place_kernel(const int64_t* columns, int count, int* places, int total) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  int place;
  if (column < total) places[column] = find_column(columns, count, column, place) ? place : -1;
}

// grad_x from products [batch, out_height, out_width, column_count]: each pixel's at the taps where outputs met it, one
// after the other. Threads (x, y) take the channels x, x + blockDim.x, ... of pixel blockIdx.x * blockDim.y + y.
template <typename T>
__global__ void __launch_bounds__(kDirectThreads, 4)
    column_sum_kernel(Convolution c, const float* products, const int* places, T* grad_x) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (pixel >= static_cast<int64_t>(c.batch) * c.height * c.width) return;
  const int line = static_cast<int>(pixel / c.width), x = pixel % c.width, y = line % c.height;
  const int64_t image = line / c.height;
  for (int channel = threadIdx.x; channel < c.in_channels; channel += blockDim.x) {
    float sum = 0;
    for_taps<true>(c, y, x, [&](int tap, int h, int w) {
      const int place = places[tap * c.in_channels + channel];
      if (place >= 0) sum += products[((image * c.out_height + h) * c.out_width + w) * c.column_count + place];
    });
    grad_x[pixel * c.in_channels + channel] = from_float<T>(sum);
  }
}

// ---- Launchers

// Hands out aligned pieces of scratch memory; from null, counts how much there must be.
struct Scratch {
  unsigned char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += ceil_div<int64_t>(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return piece;
  }
};

int bytes_per_number(Number number) { return number == Number::kFloat32 ? 4 : 2; }
int granule_of(Number number) { return kGranuleBytes / bytes_per_number(number); }
int taps_of(const Convolution& c) { return c.kernel_height * c.kernel_width; }
int padded(int count, int granule) { return ceil_div(count, granule) * granule; }

Channels take_channels(Scratch& scratch, int channels, int granule) {
  return {scratch.take<Column>(padded(channels, granule)), scratch.take<int>(channels), scratch.take<int>(1),
          scratch.take<int>(1)};
}

struct Plan {
  PlanArguments arguments;
  int table_capacity;
};

// The plan of forward and backward-weight, or of backward-input.
Plan take_plan(Scratch& scratch, const Convolution& c, bool transposed) {
  Plan plan = {};
  PlanArguments& p = plan.arguments;
  p.granule = granule_of(c.number);
  p.transposed = transposed;
  p.outer_channels = transposed ? c.in_channels : c.out_channels;
  p.inner_channels = transposed ? c.out_channels : c.in_channels;
  p.outer_mask = transposed ? c.in_mask : c.out_mask;
  p.inner_mask = transposed ? c.out_mask : c.in_mask;
  p.weight_row = taps_of(c) * c.in_channels;
  p.columns = c.columns;
  p.column_count = c.column_count;
  p.kernel_height = c.kernel_height;
  p.kernel_width = c.kernel_width;
  p.dilation_height = c.dilation_height;
  p.dilation_width = c.dilation_width;
  p.stride_height = c.stride_height;
  p.stride_width = c.stride_width;
  p.padding_height = c.padding_height;
  p.padding_width = c.padding_width;
  p.width = transposed ? c.out_width : c.width;
  p.outer = take_channels(scratch, p.outer_channels, p.granule);
  p.inner = take_channels(scratch, p.inner_channels, p.granule);
  plan.table_capacity = taps_of(c) * padded(p.inner_channels, p.granule);
  p.table = scratch.take<Column>(plan.table_capacity);
  p.starts = scratch.take<int>((transposed ? c.stride_height * c.stride_width : 1) + 1);
  p.table_runs = scratch.take<int>(1);
  p.rank = scratch.take<int>(taps_of(c));
  return plan;
}

// Room for the active weights.
template <typename T>
T* take_packed(Scratch& scratch, const Plan& plan) {
  return scratch.take<T>(static_cast<int64_t>(plan.arguments.outer_channels) * plan.table_capacity);
}

cudaError_t run_plan(Plan& plan, const void* outer, const void* inner, cudaStream_t stream) {
  PlanArguments& p = plan.arguments;
  p.outer_aligned = aligned_16(outer) && p.outer_channels % p.granule == 0;
  p.inner_aligned = aligned_16(inner) && p.inner_channels % p.granule == 0;
  return launch(plan_kernel, 1, kPlanThreads, 0, stream, p);
}

// How many channels to expect active when the blocks are laid out: the host does not wait to hear.
int expected(int channels, const float* mask) { return mask == nullptr ? channels : ceil_div(channels, 2); }

Pixels forward_pixels(const Convolution& c) {
  return {c.batch,        c.out_height,      c.out_width,      1,        1,       c.stride_height,
          c.stride_width, -c.padding_height, -c.padding_width, c.height, c.width, c.in_channels};
}

Pixels backward_pixels(const Convolution& c) {
  return {c.batch, c.height, c.width, c.stride_height, c.stride_width, 1,
          1,       0,        0,       c.out_height,    c.out_width,    c.out_channels};
}

// Rows of partial sums per channel.
int64_t sum_tiles(const Pixels& pixels) {
  return static_cast<int64_t>(pixels.phases_h) * pixels.phases_w * ceil_div(pixels.rows(0), kTileRows);
}

template <typename Engine, int kColumns>
cudaError_t launch_product(ProductArguments<typename Engine::T> args, cudaStream_t stream) {
  args.channel_tiles = ceil_div(args.channels, kColumns);
  args.tiles = ceil_div(args.pixels.rows(0), kTileRows);
  const dim3 grid(args.channel_tiles * args.tiles, args.pixels.phases_h * args.pixels.phases_w);
  return launch(product_kernel<Engine, kColumns>, grid, kThreadsFor<kColumns>, kProductShared<kColumns>, stream, args);
}

template <typename Engine>
cudaError_t choose_product(const ProductArguments<typename Engine::T>& args, int channels, cudaStream_t stream) {
  if (channels <= 32) return launch_product<Engine, 32>(args, stream);
  const bool few_tiles = sum_tiles(args.pixels) * ceil_div(channels, 128) < kWaveBlocks / 4;
  if (channels <= 64 || few_tiles) return launch_product<Engine, 64>(args, stream);
  return launch_product<Engine, 128>(args, stream);
}

template <typename T>
cudaError_t choose_engine(const Convolution& c, const ProductArguments<T>& args, int channels, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    if (!c.tf32) return choose_product<PlainFloat>(args, channels, stream);
  }
  return choose_product<TensorCores<T>>(args, channels, stream);
}

// Makes the plan and the packed weight, and lets `args` read them.
template <typename T>
cudaError_t pack(Plan& plan, const T* source, const T* weight, T* packed, ProductArguments<T>& args,
                 cudaStream_t stream) {
  PlanArguments& p = plan.arguments;
  HWPRUNE_TRY(run_plan(plan, nullptr, source, stream));
  const dim3 grid(ceil_div(plan.table_capacity, 256), p.outer_channels < 1024 ? p.outer_channels : 1024);
  HWPRUNE_TRY(launch(pack_kernel<T>, grid, 256, 0, stream, p, weight, packed, plan.table_capacity));
  args.weight = packed;
  args.weight_stride = plan.table_capacity;
  args.outer = p.outer.table;
  args.outer_position = p.outer.position;
  args.outer_count = p.outer.count;
  args.table = p.table;
  args.table_starts = p.starts;
  args.table_runs = p.table_runs;
  return cudaSuccess;
}

// Forward (or its transpose, backward-input) through tiles.
template <typename T>
cudaError_t product(const Convolution& c, bool transposed, const T* source, const T* weight,
                    const Epilogue<T>& epilogue, Scratch& scratch, cudaStream_t stream) {
  ProductArguments<T> args = {};
  args.pixels = transposed ? backward_pixels(c) : forward_pixels(c);
  args.source = source;
  args.channels = epilogue.channels;
  args.epilogue = epilogue;
  const bool dense = !transposed && c.in_mask == nullptr && c.out_mask == nullptr && c.column_count < 0 &&
                     c.in_channels % kGranule<T> == 0 && aligned_16(source) && aligned_16(weight);
  if (dense) {
    args.weight = weight;
    args.weight_stride = args.dense_count = taps_of(c) * c.in_channels;
    args.dense = {c.in_channels, c.kernel_width, c.dilation_height, c.dilation_width, c.width};
  } else {
    Plan plan = take_plan(scratch, c, transposed);
    T* packed = take_packed<T>(scratch, plan);
    HWPRUNE_TRY(pack(plan, source, weight, packed, args, stream));
  }
  return choose_engine(c, args, expected(args.channels, transposed ? c.in_mask : c.out_mask), stream);
}

// What the gradient of listed columns keeps in scratch memory.
template <typename T>
struct ListedColumns {
  Convolution pointwise;  // whose channels are the columns, over product_images images
  Plan plan;
  T* packed;
  int* places;
  float* products;
};

template <typename T>
ListedColumns<T> take_listed(Scratch& scratch, const Convolution& c) {
  ListedColumns<T> taken = {c};
  Convolution& p = taken.pointwise;
  p.batch = c.product_images < c.batch ? c.product_images : c.batch;
  p.in_channels = c.column_count;
  p.height = c.out_height;
  p.width = c.out_width;
  p.kernel_height = p.kernel_width = p.stride_height = p.stride_width = p.dilation_height = p.dilation_width = 1;
  p.padding_height = p.padding_width = 0;
  p.columns = nullptr;
  p.column_count = -1;
  taken.plan = take_plan(scratch, p, true);
  taken.plan.arguments.weight_row = taps_of(c) * c.in_channels;
  taken.plan.arguments.listed = c.columns;
  taken.packed = take_packed<T>(scratch, taken.plan);
  taken.places = scratch.take<int>(taps_of(c) * c.in_channels);
  taken.products = scratch.take<float>(static_cast<int64_t>(p.batch) * p.height * p.width * p.in_channels);
  return taken;
}

template <typename T>
cudaError_t backward_listed(const Convolution& c, const T* grad, const T* weight, T* grad_x, void* workspace,
                            cudaStream_t stream) {
  Scratch scratch = {static_cast<unsigned char*>(workspace)};
  ListedColumns<T> listed = take_listed<T>(scratch, c);
  ProductArguments<T> args = {};
  args.channels = args.epilogue.channels = c.column_count;
  args.epilogue.exact = listed.products;
  const int columns = taps_of(c) * c.in_channels;
  HWPRUNE_TRY(
      launch(place_kernel, ceil_div(columns, 256), 256, 0, stream, c.columns, c.column_count, listed.places, columns));
  if (c.column_count > 0) HWPRUNE_TRY(pack(listed.plan, grad, weight, listed.packed, args, stream));
  int lanes = 1;
  while (lanes < c.in_channels && lanes < 32) lanes *= 2;
  const dim3 block(lanes, kDirectThreads / lanes);
  Convolution part = c;
  for (int first = 0; first < c.batch; first += part.batch) {
    part.batch = listed.pointwise.batch = min(listed.pointwise.batch, c.batch - first);
    args.pixels = backward_pixels(listed.pointwise);
    args.source = grad + static_cast<int64_t>(first) * c.out_height * c.out_width * c.out_channels;
    if (c.column_count > 0) HWPRUNE_TRY(choose_engine(c, args, args.channels, stream));
    const int64_t pixels = static_cast<int64_t>(c.height) * c.width;
    HWPRUNE_TRY(launch(column_sum_kernel<T>, static_cast<unsigned>(ceil_div<int64_t>(part.batch * pixels, block.y)),
                       block, 0, stream, part, listed.products, listed.places,
                       grad_x + first * pixels * c.in_channels));
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t direct(const Convolution& c, bool transposed, const T* source, const T* weight, const Epilogue<T>& epilogue,
                   cudaStream_t stream) {
  const int channel_tiles = ceil_div(epilogue.channels, kDirectChannels);
  const Pixels pixels = forward_pixels(c);
  const int64_t rows = transposed ? static_cast<int64_t>(c.batch) * c.height * c.width : pixels.rows(0);
  const dim3 grid(channel_tiles * static_cast<unsigned>(ceil_div<int64_t>(rows, kTileRows)));
  const DirectArguments<T> args = {c, source, weight, epilogue, channel_tiles};
  return transposed ? launch(direct_kernel<T, true>, grid, kDirectThreads, 0, stream, args)
                    : launch(direct_kernel<T, false>, grid, kDirectThreads, 0, stream, args);
}

int64_t pixel_tiles(const Convolution& c, bool transposed) {
  if (c.groups == 1) return sum_tiles(transposed ? backward_pixels(c) : forward_pixels(c));
  const int64_t pixels =
      static_cast<int64_t>(c.batch) *
      (transposed ? static_cast<int64_t>(c.height) * c.width : static_cast<int64_t>(c.out_height) * c.out_width);
  return ceil_div<int64_t>(pixels, kTileRows);
}

template <typename T>
cudaError_t run(const Convolution& c, bool transposed, const T* source, const T* weight, Epilogue<T> epilogue,
                float* sums, float* squares, void* workspace, cudaStream_t stream) {
  Scratch scratch = {static_cast<unsigned char*>(workspace)};
  const int64_t tiles = pixel_tiles(c, transposed);
  epilogue.channels = transposed ? c.in_channels : c.out_channels;
  epilogue.gate = transposed ? c.in_mask : c.out_mask;
  epilogue.vectorised = epilogue.channels % kGranule<T> == 0 && aligned_16(epilogue.y) && aligned_16(epilogue.raw) &&
                        aligned_16(epilogue.residual);
  if (sums != nullptr) epilogue.sums = scratch.take<float>(tiles * epilogue.channels);
  if (squares != nullptr) epilogue.squares = scratch.take<float>(tiles * epilogue.channels);
  HWPRUNE_TRY(c.groups == 1 ? product(c, transposed, source, weight, epilogue, scratch, stream)
                            : direct(c, transposed, source, weight, epilogue, stream));
  if (sums == nullptr) return cudaSuccess;
  return launch(reduce_kernel, ceil_div(epilogue.channels, 32), dim3(32, kReduceRows), 0, stream, epilogue.sums,
                epilogue.squares, tiles, epilogue.channels, epilogue.gate, sums, squares);
}

struct Split {
  int splits, chunk;
};

// Cuts the pixels so that `tiles` blocks for each part fill the device, in chunks of at least 16 steps.
Split split_pixels(const Convolution& c, int64_t tiles) {
  const int pixels = forward_pixels(c).rows(0), step = kStepBytes / bytes_per_number(c.number);
  const int wanted = static_cast<int>(ceil_div<int64_t>(kWaveBlocks, tiles));
  const int chunk = padded(ceil_div(pixels, wanted), 16 * step);
  return {ceil_div(pixels, chunk), chunk};
}

int weight_side(const Convolution& c) { return expected(c.out_channels, c.out_mask) >= 96 ? 128 : 64; }

Split weight_split(const Convolution& c) {
  if (c.groups != 1)
    return split_pixels(c, static_cast<int64_t>(ceil_div(c.out_channels, 32)) * taps_of(c) * c.in_channels / c.groups);
  const int side = weight_side(c);
  const int columns = c.column_count < 0 ? taps_of(c) * expected(c.in_channels, c.in_mask) : c.column_count;
  return split_pixels(c, static_cast<int64_t>(ceil_div(expected(c.out_channels, c.out_mask), side)) *
                             ceil_div(columns > 0 ? columns : 1, side));
}

template <typename Engine, int kSide>
cudaError_t launch_weight(WeightArguments<typename Engine::T> args, int rows, int columns, int splits,
                          cudaStream_t stream) {
  args.column_tiles = ceil_div(columns, kSide);
  const dim3 grid(ceil_div(rows, kSide) * args.column_tiles, splits);
  return launch(weight_kernel<Engine, kSide>, grid, kThreadsFor<kSide>, kWeightShared<kSide>, stream, args);
}

template <typename Engine>
cudaError_t choose_weight(const WeightArguments<typename Engine::T>& args, int side, int rows, int columns, int splits,
                          cudaStream_t stream) {
  return side == 128 ? launch_weight<Engine, 128>(args, rows, columns, splits, stream)
                     : launch_weight<Engine, 64>(args, rows, columns, splits, stream);
}

template <typename T>
cudaError_t backward_weight(const Convolution& c, const T* grad, const T* source, T* grad_weight, void* workspace,
                            cudaStream_t stream) {
  Scratch scratch = {static_cast<unsigned char*>(workspace)};
  const auto [splits, chunk] = weight_split(c);
  const int columns = taps_of(c) * c.in_channels / c.groups;
  const int gather_blocks = ceil_div(c.out_channels * columns, 256);
  if (c.groups != 1) {
    const int64_t split_stride = static_cast<int64_t>(c.out_channels) * columns;
    float* partial = scratch.take<float>(splits * split_stride);
    HWPRUNE_TRY(launch(direct_weight_kernel<T>, dim3(ceil_div(c.out_channels, 32), columns, splits), kDirectThreads, 0,
                       stream, c, grad, source, partial, chunk));
    return launch(gather_weight_kernel<T>, gather_blocks, 256, 0, stream, c, partial, splits, split_stride, columns,
                  nullptr, nullptr, nullptr, kGranule<T>, grad_weight);
  }
  Plan plan = take_plan(scratch, c, false);
  const PlanArguments& p = plan.arguments;
  WeightArguments<T> args = {};
  args.pixels = forward_pixels(c);
  args.grad = grad;
  args.source = source;
  args.grad_channels = c.out_channels;
  args.outer = p.outer;
  args.table = p.table;
  args.table_starts = p.starts;
  args.table_runs = p.table_runs;
  args.chunk = chunk;
  args.table_stride = plan.table_capacity;
  args.split_stride = static_cast<int64_t>(c.out_channels) * plan.table_capacity;
  args.partial = scratch.take<float>(splits * args.split_stride);
  HWPRUNE_TRY(run_plan(plan, grad, source, stream));
  const int side = weight_side(c),
            walked = c.column_count < 0 ? plan.table_capacity : padded(c.column_count, kGranule<T>);
  if (walked > 0) {
    if constexpr (sizeof(T) == 4) {
      HWPRUNE_TRY(c.tf32 ? choose_weight<TensorCores<float>>(args, side, c.out_channels, walked, splits, stream)
                         : choose_weight<PlainFloat>(args, side, c.out_channels, walked, splits, stream));
    } else {
      HWPRUNE_TRY(choose_weight<TensorCores<T>>(args, side, c.out_channels, walked, splits, stream));
    }
  }
  return launch(gather_weight_kernel<T>, gather_blocks, 256, 0, stream, c, args.partial, splits, args.split_stride,
                args.table_stride, p.outer.position, p.inner.position, p.inner.count, kGranule<T>, grad_weight);
}

}  // namespace

std::array<SharedMemory, 5> masked_conv_shared() {
  return {{{"product_kernel", 32, kProductShared<32>},
           {"product_kernel", 64, kProductShared<64>},
           {"product_kernel", 128, kProductShared<128>},
           {"weight_kernel", 64, kWeightShared<64>},
           {"weight_kernel", 128, kWeightShared<128>}}};
}

int64_t masked_conv_workspace(const Convolution& c) {
  int64_t most = 0;
  const int splits = weight_split(c).splits;
  for (const bool transposed : {false, true}) {
    const int channels = transposed ? c.in_channels : c.out_channels;
    Scratch product = {nullptr}, weight = {nullptr};
    product.take<float>(pixel_tiles(c, transposed) * channels);
    product.take<float>(pixel_tiles(c, transposed) * channels);
    if (c.groups == 1) {
      product.take<float>(static_cast<int64_t>(channels) * take_plan(product, c, transposed).table_capacity);
      weight.take<float>(static_cast<int64_t>(splits) * channels * take_plan(weight, c, transposed).table_capacity);
    } else {
      weight.take<float>(static_cast<int64_t>(splits) * c.out_channels * taps_of(c) * c.in_channels / c.groups);
    }
    for (const Scratch& scratch : {product, weight}) most = scratch.used > most ? scratch.used : most;
  }
  if (c.product_images > 0) {
    Scratch listed = {nullptr};
    take_listed<float>(listed, c);
    most = listed.used > most ? listed.used : most;
  }
  return most;
}

cudaError_t masked_conv_forward(const Convolution& conv, const void* x, const void* weight, const float* scale,
                                const float* shift, const void* residual, Activation act, void* y, void* raw,
                                void* workspace, cudaStream_t stream) {
  return for_number(conv.number, [&](auto number) {
    using T = decltype(number);
    Epilogue<T> epilogue = {};
    epilogue.y = static_cast<T*>(y);
    epilogue.raw = static_cast<T*>(raw);
    epilogue.residual = static_cast<const T*>(residual);
    epilogue.scale = scale;
    epilogue.shift = shift;
    epilogue.act = act;
    return run(conv, false, static_cast<const T*>(x), static_cast<const T*>(weight), epilogue, nullptr, nullptr,
               workspace, stream);
  });
}

cudaError_t masked_conv_forward_stats(const Convolution& conv, const void* x, const void* weight, void* raw,
                                      float* sums, float* squares, void* workspace, cudaStream_t stream) {
  return for_number(conv.number, [&](auto number) {
    using T = decltype(number);
    Epilogue<T> epilogue = {};
    epilogue.y = static_cast<T*>(raw);
    epilogue.hard_gate = true;
    return run(conv, false, static_cast<const T*>(x), static_cast<const T*>(weight), epilogue, sums, squares, workspace,
               stream);
  });
}

cudaError_t masked_conv_backward_input(const Convolution& conv, const void* grad_raw, const void* x, const void* weight,
                                       void* grad_x, float* grad_in_mask, void* workspace, cudaStream_t stream) {
  return for_number(conv.number, [&](auto number) {
    using T = decltype(number);
    Epilogue<T> epilogue = {};
    epilogue.y = static_cast<T*>(grad_x);
    epilogue.factor = static_cast<const T*>(x);
    if (conv.product_images > 0)
      return backward_listed(conv, static_cast<const T*>(grad_raw), static_cast<const T*>(weight),
                             static_cast<T*>(grad_x), workspace, stream);
    return run(conv, true, static_cast<const T*>(grad_raw), static_cast<const T*>(weight), epilogue, grad_in_mask,
               nullptr, workspace, stream);
  });
}

cudaError_t masked_conv_backward_weight(const Convolution& conv, const void* grad_raw, const void* x, void* grad_weight,
                                        void* workspace, cudaStream_t stream) {
  return for_number(conv.number, [&](auto number) {
    using T = decltype(number);
    return backward_weight(conv, static_cast<const T*>(grad_raw), static_cast<const T*>(x),
                           static_cast<T*>(grad_weight), workspace, stream);
  });
}

}  // namespace hwprune
