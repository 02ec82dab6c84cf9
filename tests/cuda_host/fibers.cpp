#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host {

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;

struct Copy {
  void* target;
  const void* source;
  bool inside;
};

struct Warp {
  Slot slots[2][kWarp];  // two, so that the next exchange cannot overwrite what is still being read
  int arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;  // enters the fiber's own stack; from then on, jumps are twenty times faster
  jmp_buf place;
  bool started;
  std::unique_ptr<unsigned char, void (*)(unsigned char*)> stack{
      static_cast<unsigned char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
      [](unsigned char* memory) { munmap(memory, kStackBytes); }};
  uint3 thread;
  bool done;
  std::vector<std::vector<Copy>> groups;  // committed ones, then the one that is growing
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared_memory;
jmp_buf scheduler;
Fiber* current;
const std::function<void()>* body;
int alive, arrived, generation;

void yield() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  (*body)();
  current->done = true;
  --alive;
  yield();
}

void resume() {
  threadIdx = current->thread;
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->start);
}

void run_block(int threads) {
  alive = threads;
  arrived = 0;
  for (Warp& warp : warps) warp = {};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = fiber.started = false;
    fiber.groups.assign(1, {});
    const unsigned x = blockDim.x, y = blockDim.y;
    fiber.thread = {i % x, i / x % y, i / x / y};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  for (bool ahead = true; alive > 0; ahead = !ahead)
    for (int i = 0; i < threads; ++i) {
      current = &fibers[ahead ? i : threads - 1 - i];
      if (current->done) continue;
      resume();
    }
}

}  // namespace

void run_blocks(dim3 grid, dim3 block, int shared, const std::function<void()>& thread) {
  const int threads = block.x * block.y * block.z;
  while (static_cast<int>(fibers.size()) < threads) fibers.emplace_back();
  warps.resize((threads + kWarp - 1) / kWarp);
  body = &thread;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        shared_memory.assign(shared + 128, 0xff);  // NaN in every format
        run_block(threads);
      }
}

unsigned char* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(shared_memory.data());
  return shared_memory.data() + (128 - address % 128) % 128;
}

size_t& granted_shared(void (*kernel)()) {
  static std::map<void (*)(), size_t> granted;
  return granted[kernel];
}

void sync_block() {
  const int mine = generation;
  if (++arrived == alive) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) yield();
}

const Slot* exchange(const void* mine, int bytes) {
  Warp& warp = warps[(current - fibers.data()) / kWarp];
  const int generation = warp.generation;
  Slot* slots = warp.slots[generation % 2];
  std::memcpy(slots[lane()], mine, bytes);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) yield();
  return slots;
}

void copy_later(void* target, const void* source, bool inside) {
  current->groups.back().push_back({target, source, inside});
}

void commit_copies() { current->groups.emplace_back(); }

void wait_copies(int pending) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.inside)
        std::memcpy(copy.target, copy.source, 16);
      else
        std::memset(copy.target, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace host
