// What kernels need of the chip (sm_80 and later) and C++ has no words for: 16-bit numbers, asynchronous copies, and
// matrix products by one warp. tests/cuda_host holds a second implementation of this header, for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hwprune {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline Half from_float(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ inline BFloat from_float(float x) {
  BFloat y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background, or zeros where not `inside` (nothing is read then).
__device__ inline void copy_async_16(void* target, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones); lane i names the 16 bytes of row i % 8 of matrix i / 8.
// Of each matrix a lane gets the 32 bits at row lane / 4, place lane % 4.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix (of 16-bit elements) transposed.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// acc [16, 8] += a [16, k] b [k, 8] by one warp; k = 16 for 16-bit numbers, 8 for tf32 (float).
template <typename T>
__device__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define HWPRUNE_MMA(T, name)                                                                         \
  template <>                                                                                        \
  __device__ inline void mma<T>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned." name " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
HWPRUNE_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
HWPRUNE_MMA(BFloat, "m16n8k16.row.col.f32.bf16.bf16.f32")
HWPRUNE_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef HWPRUNE_MMA

}  // namespace hwprune
