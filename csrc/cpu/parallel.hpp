// Loops over threads, and one binary for every chip.
#pragma once

#include <algorithm>
#include <cstdint>

// The loader picks the widest clone of a function that the processor runs. Sanitizers do not survive the indirect
// functions that this needs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HWPRUNE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HWPRUNE_CLONES
#endif

namespace hwprune {

// Calls body(context, part) for every part in 0 .. parts, on torch's own threads where the process has them.
void run_parts(int64_t parts, void (*body)(const void*, int64_t), const void* context);

// Calls body(part, begin, end) on parts of 0 .. count, at most `threads` of them and each of `grain` items or more.
template <typename Body>
void parallel(int64_t count, int64_t grain, int64_t threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(1, grain)));
  const auto run = [&](int64_t part) { body(part, count * part / parts, count * (part + 1) / parts); };
  if (parts == 1) return run(0);
  run_parts(parts, [](const void* context, int64_t part) { (*static_cast<decltype(&run)>(context))(part); }, &run);
}

}  // namespace hwprune
