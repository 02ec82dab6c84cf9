#include "cpu/parallel.hpp"

#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace hwprune {
namespace {

// The OpenMP runtime that torch brings, by the interface that compilers call: libgomp's and Intel's both have it. This
// extension is built without torch and so without its runtime, and a second one would keep threads of its own, which
// wait for a core while torch's still spin on it.
struct Team {
  void (*run)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;
  int (*size)() = nullptr;

  Team() {
#if defined(__linux__) && !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not see how that runtime synchronises
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return;
    find(torch, "omp_get_thread_num", rank);
    find(torch, "omp_get_num_threads", size);
    if (rank && size) find(torch, "GOMP_parallel", run);
#endif
  }

 private:
  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));  // in the library and in what it depends on
  }
};

struct Work {
  const Team& team;
  int64_t parts;
  void (*body)(const void*, int64_t);
  const void* context;
};

}  // namespace

void run_parts(int64_t parts, void (*body)(const void*, int64_t), const void* context) {
  static const Team team;
  if (team.run != nullptr) {
    Work work{team, parts, body, context};
    // As many threads as torch uses (0): a team of another size would make the runtime end and start threads. Whoever
    // has no part is done at once; inside a parallel region there is one thread, which does them all.
    team.run(
        [](void* given) {
          const Work& work = *static_cast<const Work*>(given);
          for (int64_t part = work.team.rank(); part < work.parts; part += work.team.size())
            work.body(work.context, part);
        },
        &work, 0, 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(body, context, part);
  body(context, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace hwprune
