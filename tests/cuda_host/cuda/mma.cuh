// csrc/cuda/mma.cuh for the CPU: the same instructions in plain loops, after the PTX manual's tables of fragments.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace hwprune {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

template <typename T>
T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline BFloat from_float(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float(float x) {
  const auto sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // In units of the last place, rounded to even; a carry into the next exponent is the right result.
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + (magnitude < 0x1p-14f ? 0 : (exponent + 14) << 10)))};
}

inline unsigned char* dynamic_shared() { return host::dynamic_shared(); }

inline void copy_async_16(void* target, const void* source, bool inside) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0)
    std::abort();  // a misaligned address, which the chip faults on
  host::copy_later(target, source, inside);
}
inline void copy_async_commit() { host::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  host::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto rows = host::show(row);
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&out[matrix],
                static_cast<const unsigned char*>(rows[matrix * 8 + host::lane() / 4]) + host::lane() % 4 * 4, 4);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const auto rows = host::show(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&pair[i],
                  static_cast<const unsigned char*>(rows[matrix * 8 + host::lane() % 4 * 2 + i]) + host::lane() / 4 * 2,
                  2);
    std::memcpy(&out[matrix], pair, 4);
  }
}

// To nearest, ties away from zero, in 10 bits of mantissa.
inline uint32_t round_to_tf32(uint32_t bits) { return (bits + 0x1000) & ~0x1fffu; }

struct Fragments {
  uint32_t a[4], b[2];
};

// Element i of 32 bits that hold 1 float or 2 16-bit numbers. Tensor cores do not see a float's low 13 bits.
template <typename T>
float element(uint32_t bits, int i) {
  return to_float(T{static_cast<uint16_t>(bits >> (16 * i))});
}
template <>
inline float element<float>(uint32_t bits, int) {
  return float_of(bits & ~0x1fffu);
}

template <typename T>
void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kPerWord = 4 / sizeof(T);
  Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto all = host::show(mine);
  const int group = host::lane() / 4, in_group = host::lane() % 4;
  for (int k = 0; k < 8 * kPerWord; ++k) {
    const int half = k / (4 * kPerWord), owner = k / kPerWord % 4, place = k % kPerWord;
    for (int e = 0; e < 4; ++e) {
      // a[0] row group, low k; a[1] row group + 8; a[2], a[3] the same with high k. b[half]: column group.
      const uint32_t left = all[group * 4 + owner].a[half * 2 + e / 2];
      const uint32_t right = all[(in_group * 2 + e % 2) * 4 + owner].b[half];
      acc[e] += element<T>(left, place) * element<T>(right, place);
    }
  }
}

}  // namespace hwprune
