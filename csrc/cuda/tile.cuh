// Tiles of implicit matrices in shared memory, and their products.
//
// An implicit matrix has pixels as rows and (kernel row, kernel column, channel) triples as columns; its elements are
// those of an NHWC tensor. Tiles come in two orientations:
//   k along rows     [m or n][k], 64 bytes of k: the operands of forward and backward-input
//   k along columns  [k][m or n], k being pixels: the operands of backward-weight
// Both are stored in granules of 16 bytes, whose place within a row is permuted so that neither the copies nor the
// reads of fragments meet in a bank.
#pragma once

#include "cuda/mma.cuh"

namespace hwprune {

constexpr int kGranuleBytes = 16;
constexpr int kStages = 4;            // of the pipeline of copies
constexpr int kStepBytes = 64;        // of k per operand row and step
constexpr int kOutside = -(1 << 29);  // a coordinate that no offset brings inside

struct Row {
  int64_t base;  // of the element at column offset 0
  int h, w;
};

struct alignas(16) Column {
  int offset;  // from a row's base
  int dh, dw;
  int index;  // tap * channels + channel, or -1 in padding
};

__device__ inline Column padding_column() { return {0, kOutside, kOutside, -1}; }

template <typename T>
constexpr int kGranule = kGranuleBytes / static_cast<int>(sizeof(T));  // in elements
template <typename T>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));  // elements of k in one step

// A tile of kColumns elements per row.
template <typename T, int kColumns>
struct Tile {
  static constexpr int kGranules = kColumns / kGranule<T>;

  __device__ static int granule(int row, int index) {
    const int twist = kGranules == 4 ? row / 2 % 4 : sizeof(T) == 2 ? row % 8 : row % 4 * 2;
    return (row * kGranules + (index ^ twist)) * kGranuleBytes;
  }
  __device__ static int element(int row, int column) {
    return granule(row, column / kGranule<T>) + column % kGranule<T> * static_cast<int>(sizeof(T));
  }
};

// The column that this thread loads, of a tile with kColumns: where columns come in aligned runs of a granule the first
// of its granule, else just one.
template <typename T, int kColumns>
__device__ int own_column(bool runs) {
  return runs ? threadIdx.x % (kColumns / kGranule<T>)*kGranule<T> : threadIdx.x % kColumns;
}

// Loads a tile of an implicit matrix over `source`, whose images are [height, width, ...]. With runs, in the background
// and 16 bytes at a time; else element by element, neighbouring lanes reading neighbouring columns of one pixel.
template <typename T, int kRows, int kColumns, int kThreads>
__device__ void load_tile(unsigned char* tile, const T* source, int height, int width, const Row* rows, Column column,
                          bool runs) {
  if (runs) {
    constexpr int kGranules = Tile<T, kColumns>::kGranules, kRowStep = kThreads / kGranules;
    static_assert(kRows % kRowStep == 0, "every thread loads the same number of granules");
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const int row = threadIdx.x / kGranules + i * kRowStep;
      const Row at = rows[row];
      const bool inside = static_cast<unsigned>(at.h + column.dh) < static_cast<unsigned>(height) &&
                          static_cast<unsigned>(at.w + column.dw) < static_cast<unsigned>(width);
      copy_async_16(tile + Tile<T, kColumns>::granule(row, threadIdx.x % kGranules),
                    inside ? source + at.base + column.offset : source, inside);
    }
    return;
  }
  constexpr int kRowStep = kThreads / kColumns;
  static_assert(kRows % kRowStep == 0, "every thread loads the same number of elements");
#pragma unroll(sizeof(T) == 2 ? 8 : 4)  // more floats would spill
  for (int i = 0; i < kRows / kRowStep; ++i) {
    const int row = threadIdx.x / kColumns + i * kRowStep;
    const Row at = rows[row];
    T value = {};
    if (static_cast<unsigned>(at.h + column.dh) < static_cast<unsigned>(height) &&
        static_cast<unsigned>(at.w + column.dw) < static_cast<unsigned>(width))
      value = source[at.base + column.offset];
    *reinterpret_cast<T*>(tile + Tile<T, kColumns>::element(row, threadIdx.x % kColumns)) = value;
  }
}

// What multiplies: tensor cores on 16-bit numbers or on float rounded to tf32, or plain float arithmetic.
template <typename Element>
struct TensorCores {
  using T = Element;
};
struct PlainFloat {
  using T = float;
};

// The accumulators of a warp that owns 16 kM rows and 8 kN columns: element e of block (i, j) stands at row
// 16 i + lane / 4 + e / 2 * 8, column 8 j + lane % 4 * 2 + e % 2, as mma leaves it.
template <int kM, int kN>
using Accumulators = float[kM][kN][4];

// acc += A B^T over one step, for tiles with k along rows; the warp's part starts at row m of A and row n of B.
template <typename T, int kM, int kN>
__device__ void multiply_rows(TensorCores<T>, const unsigned char* a, const unsigned char* b, int m, int n,
                              Accumulators<kM, kN>& acc) {
  using Layout = Tile<T, kStep<T>>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {  // in granules; one mma takes two
    uint32_t left[kM][4], right[kN / 2][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) load_matrices(left[i], a + Layout::granule(m + 16 * i + lane % 16, k + lane / 16));
#pragma unroll
    for (int j = 0; j < kN / 2; ++j)
      load_matrices(right[j], b + Layout::granule(n + 16 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        for (auto& fragment : left) fragment[e] = round_to_tf32(fragment[e]);
        for (auto& fragment : right) fragment[e] = round_to_tf32(fragment[e]);
      }
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) mma<T>(acc[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
  }
}

template <int kM, int kN>
__device__ void multiply_rows(PlainFloat, const unsigned char* a, const unsigned char* b, int m, int n,
                              Accumulators<kM, kN>& acc) {
  using Layout = Tile<float, kStep<float>>;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {  // in granules; unrolled, it would not fit into the registers
    float4 left[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i)
      left[i] = *reinterpret_cast<const float4*>(a + Layout::granule(m + 8 * i + lane / 4, k));
#pragma unroll
    for (int column = 0; column < 2 * kN; ++column) {
      const int row = n + column / 2 * 8 + lane % 4 * 2 + column % 2;
      const float4 right = *reinterpret_cast<const float4*>(b + Layout::granule(row, k));
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        float& sum = acc[i / 2][column / 2][i % 2 * 2 + column % 2];
        sum = fmaf(left[i].x, right.x, sum);
        sum = fmaf(left[i].y, right.y, sum);
        sum = fmaf(left[i].z, right.z, sum);
        sum = fmaf(left[i].w, right.w, sum);
      }
    }
  }
}

// acc += A^T B over one step, for tiles [k][kA] and [k][kB]; the warp's part starts at columns m and n.
template <int kA, int kB, typename T, int kM, int kN>
__device__ void multiply_columns(TensorCores<T>, const unsigned char* a, const unsigned char* b, int m, int n,
                                 Accumulators<kM, kN>& acc) {
  const int lane = threadIdx.x % 32;
#pragma unroll(sizeof(T) == 2 ? 2 : 1)  // addresses of single floats fill the registers
  for (int half = 0; half < 2; ++half) {
    const int k = half * (kStep<T> / 2);  // said so, its low bits are known to be 0
    uint32_t left[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(left[i],
                                 a + Tile<T, kA>::element(k + lane % 8 + lane / 16 * 8, m + 16 * i + lane / 8 % 2 * 8));
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          left[i][e] = round_to_tf32(*reinterpret_cast<const uint32_t*>(
              a + Tile<T, kA>::element(k + lane % 4 + e / 2 * 4, m + 16 * i + lane / 4 + e % 2 * 8)));
      }
    }
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t right[4];
      if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(right, b + Tile<T, kB>::element(k + lane % 16, n + 8 * j + lane / 16 * 8));
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          right[e] = round_to_tf32(*reinterpret_cast<const uint32_t*>(
              b + Tile<T, kB>::element(k + lane % 4 + e % 2 * 4, n + 8 * j + lane / 4 + e / 2 * 8)));
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma<T>(acc[i][j], left[i], right[0], right[1]);
        mma<T>(acc[i][j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

template <int kA, int kB, int kM, int kN>
__device__ void multiply_columns(PlainFloat, const unsigned char* a, const unsigned char* b, int m, int n,
                                 Accumulators<kM, kN>& acc) {
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int k = 0; k < kStep<float>; ++k) {
    float left[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i)
      left[i] = *reinterpret_cast<const float*>(a + Tile<float, kA>::element(k, m + 8 * i + lane / 4));
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 right = *reinterpret_cast<const float2*>(b + Tile<float, kB>::element(k, n + 8 * j + lane % 4 * 2));
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        acc[i / 2][j][i % 2 * 2] = fmaf(left[i], right.x, acc[i / 2][j][i % 2 * 2]);
        acc[i / 2][j][i % 2 * 2 + 1] = fmaf(left[i], right.y, acc[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }
}

// The pipeline: while step i is multiplied, the copies of the next kStages - 1 steps are under way.
// operands.prepare(i) may write what operands.load(i) reads, a barrier apart; load(i, slot) fills a slot of shared
// memory, and multiply(slot) uses it up.
template <typename Operands>
__device__ void run_pipeline(Operands& operands, int steps) {
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    operands.prepare(i);
    __syncthreads();
    if (i < steps) operands.load(i, i);
    copy_async_commit();
  }
  operands.prepare(kStages - 1);
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // step i has arrived for all, and the slot of step i - 1 is free
    const int next = i + kStages - 1;
    if (next < steps) operands.load(next, next % kStages);
    copy_async_commit();
    operands.prepare(next + 1);
    operands.multiply(i % kStages);
  }
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace hwprune
