// Loops over threads, and one binary for every chip.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// The loader picks the widest clone of a function that the processor runs. Sanitizers do not survive the indirect
// functions that this needs.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HWPRUNE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HWPRUNE_CLONES
#endif

namespace hwprune {

// Calls body(thread, begin, end) on parts of 0 .. count, at most `threads` of them and each of `grain` items or more.
// Threads are started anew: against parts that are worth one, their start of some ten microseconds is little, and no
// pool has to survive a fork.
template <typename Body>
void parallel(int64_t count, int64_t grain, int64_t threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, count / std::max<int64_t>(1, grain)));
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t part = 1; part < parts; ++part)
    others.emplace_back(body, part, count * part / parts, count * (part + 1) / parts);
  body(int64_t{0}, int64_t{0}, count / parts);
  for (std::thread& other : others) other.join();
}

}  // namespace hwprune
