// The inner loops of a convolution between listed channels, for registers of HWPRUNE_LANES floats and the instructions
// of HWPRUNE_TARGET. masked_conv_product.cpp includes this once per kind of processor, each in a namespace of its own.

constexpr int kLanes = HWPRUNE_LANES;
// Sums that stay in registers: kTileRows times as many vectors, with room for the operands.
constexpr int kMostVectors = kLanes == 16 ? 4 : 2;
using Vector = float __attribute__((vector_size(4 * HWPRUNE_LANES), aligned(4), may_alias));
using Places = int __attribute__((vector_size(4 * HWPRUNE_LANES)));

template <int Vectors>
HWPRUNE_TARGET inline void load(const float* from, Vector (&to)[Vectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) to[v] = *reinterpret_cast<const Vector*>(from + v * kLanes);
}

template <int Vectors>
HWPRUNE_TARGET inline void multiply_add(float factor, const Vector (&values)[Vectors], Vector (&sums)[Vectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) sums[v] += factor * values[v];
}

// out[i, :] = sum over steps and their k of rows[i][offsets[k]] * panel[k, :], for the first `count` of Rows rows, 4 or
// kTileRows.
template <int Rows, int Vectors>
HWPRUNE_TARGET void product(const Step* steps, int64_t step_count, const int32_t* offsets, const float* panel,
                            int64_t count, float* out, int64_t out_stride) {
  Vector sums[Rows][Vectors] = {};
  for (const Step* step = steps; step != steps + step_count; ++step) {
    const float* const* rows = step->rows;
    const float *row0 = rows[0], *row1 = rows[1], *row2 = rows[2], *row3 = rows[3];
    const float *row4 = Rows > 4 ? rows[4] : nullptr, *row5 = Rows > 4 ? rows[5] : nullptr;
    for (int64_t k = step->begin; k < step->end; ++k) {
      const int64_t at = offsets[k];
      Vector weights[Vectors];
      load(panel + k * Vectors * kLanes, weights);
      multiply_add(row0[at], weights, sums[0]);
      multiply_add(row1[at], weights, sums[1]);
      multiply_add(row2[at], weights, sums[2]);
      multiply_add(row3[at], weights, sums[3]);
      if (Rows == 4) continue;
      multiply_add(row4[at], weights, sums[Rows - 2]);
      multiply_add(row5[at], weights, sums[Rows - 1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    if (i >= count) break;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) *reinterpret_cast<Vector*>(out + i * out_stride + v * kLanes) = sums[i][v];
  }
}

// out[i, :] += sum over pixels p of grads[p][offsets[i]] * rows[p][first + :], for Rows outputs, 4 or kTileRows.
template <int Rows, int Vectors>
HWPRUNE_TARGET void outer_product(const float* const* rows, const float* const* grads, int64_t pixels, int64_t first,
                                  const int32_t* offsets, float* out, int64_t out_stride) {
  Vector sums[Rows][Vectors] = {};
  const int64_t at0 = offsets[0], at1 = offsets[1], at2 = offsets[2], at3 = offsets[3];
  const int64_t at4 = Rows > 4 ? offsets[4] : 0, at5 = Rows > 4 ? offsets[5] : 0;
  for (int64_t p = 0; p < pixels; ++p) {
    const float* g = grads[p];
    Vector x[Vectors];
    load(rows[p] + first, x);
    multiply_add(g[at0], x, sums[0]);
    multiply_add(g[at1], x, sums[1]);
    multiply_add(g[at2], x, sums[2]);
    multiply_add(g[at3], x, sums[3]);
    if (Rows == 4) continue;
    multiply_add(g[at4], x, sums[Rows - 2]);
    multiply_add(g[at5], x, sums[Rows - 1]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) *reinterpret_cast<Vector*>(out + i * out_stride + v * kLanes) += sums[i][v];
}

// to[i, r] = rows[r][i] for i < length and r < kLanes. As many rounds as kLanes has bits interleave row i with row
// i + kLanes / 2.
HWPRUNE_TARGET void transpose(const float* const* rows, int64_t length, float* to, int64_t to_stride) {
  int64_t begin = 0;
#if !defined(__clang__)  // which has no shuffle of this form
  for (; begin + kLanes <= length; begin += kLanes) {
    Vector block[kLanes], mixed[kLanes];
    Places low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i / 2 + i % 2 * kLanes;
      high[i] = low[i] + kLanes / 2;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) block[r] = *reinterpret_cast<const Vector*>(rows[r] + begin);
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < kLanes / 2; ++r) {
        mixed[2 * r] = __builtin_shuffle(block[r], block[r + kLanes / 2], low);
        mixed[2 * r + 1] = __builtin_shuffle(block[r], block[r + kLanes / 2], high);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = mixed[r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) *reinterpret_cast<Vector*>(to + (begin + r) * to_stride) = block[r];
  }
#endif
  for (; begin < length; ++begin)
    for (int r = 0; r < kLanes; ++r) to[begin * to_stride + r] = rows[r][begin];
}

constexpr int kThird = kMostVectors == 4 ? 3 : 1;  // where there are no more than two
constexpr Kernels kernels{
    kLanes,
    kMostVectors,
    {{product<4, 1>, product<4, 2>, product<4, kThird>, product<4, kMostVectors>},
     {product<6, 1>, product<6, 2>, product<6, kThird>, product<6, kMostVectors>}},
    {{outer_product<4, 1>, outer_product<4, 2>, outer_product<4, kThird>, outer_product<4, kMostVectors>},
     {outer_product<6, 1>, outer_product<6, 2>, outer_product<6, kThird>, outer_product<6, kMostVectors>}},
    transpose,
};
