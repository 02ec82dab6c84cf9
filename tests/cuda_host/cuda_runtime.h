// CUDA C++ on the CPU, in the same names: enough to run this project's kernels under test where there is no device.
//
// Blocks run one after the other. The threads of a block are fibers that run in turn, ahead or in reverse, until each
// waits for others: at a barrier, or in an instruction that a warp carries out together. Shared memory starts as NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static  // blocks take turns
#define __launch_bounds__(...)
#define CUDART_VERSION 0

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
using cudaStream_t = struct HostStream*;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace host {

void run_blocks(dim3 grid, dim3 block, int shared, const std::function<void()>& thread);
unsigned char* dynamic_shared();
// The dynamic shared memory that a kernel was granted: here none unasked, as if its static memory took it all.
size_t& granted_shared(void (*kernel)());
void sync_block();

constexpr int kExchanged = 32;  // bytes that a lane can show to its warp
using Slot = unsigned char[kExchanged];
// Shows 32 lanes what each brought, once all have come.
const Slot* exchange(const void* mine, int bytes);

template <typename T>
struct Shown {
  const Slot* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
  }
};
template <typename T>
Shown<T> show(const T& mine) {
  static_assert(sizeof(T) <= kExchanged);
  return {exchange(&mine, sizeof mine)};
}
inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

// Background copies, made as late as they may be: when their group is waited for.
void copy_later(void* target, const void* source, bool inside);
void commit_copies();
void wait_copies(int pending);

}  // namespace host

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes > 227 * 1024) return cudaErrorInvalidValue;
  host::granted_shared(reinterpret_cast<void (*)()>(kernel)) = bytes;
  return cudaSuccess;
}

inline void __syncthreads() { host::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { host::show(0); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const auto all = host::show(predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(all[lane]) << lane;
  return ballot;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const auto all = host::show(value);
  return all[host::lane() ^ mask];
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  const auto all = host::show(value);
  return all[source % 32];
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  if (config->dynamicSmemBytes > host::granted_shared(reinterpret_cast<void (*)()>(kernel)))
    return cudaErrorInvalidValue;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || threads < 1 || threads > 1024)
    return cudaErrorInvalidValue;
  host::run_blocks(grid, block, static_cast<int>(config->dynamicSmemBytes), [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
