// HWPRUNE_BOTH marks what the C++ and the CUDA compiler both compile.
#pragma once

#ifdef __CUDACC__
#define HWPRUNE_BOTH __host__ __device__
#else
#define HWPRUNE_BOTH
#endif
