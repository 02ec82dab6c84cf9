// Launches with the errors that they return, and what decides how they load.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define HWPRUNE_TRY(call) \
  if (const cudaError_t error = (call); error != cudaSuccess) return error

namespace hwprune {

// Whether 16 bytes at once may be loaded from there: the chip faults on any other address.
__host__ __device__ inline bool aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared > 0)  // a kernel may have 48 KB unasked, its static memory among them: to ask costs less than to count
    HWPRUNE_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace hwprune
