// A checked longjmp takes the change from one fiber's stack to another's for an error.
#undef _FORTIFY_SOURCE

#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStack = 256 << 10;  // the kernels' arguments, up to 32 KiB, are copied to it; sanitizers add to it
constexpr char kUntouched = 0x5a;     // at the far end of a stack
constexpr uint32_t kWarp = 32;

enum class Place { ready, block_barrier, warp_barrier, ended };

struct Fiber {
  Fiber() { stack[0] = kUntouched; }

  jmp_buf context;  // where it goes on
  std::unique_ptr<char[]> stack{new char[kStack]};
  Place place = Place::ended;
  HeldOut held_out{};
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
ucontext_t starter;
const std::function<void()>* running = nullptr;

// Switches by setjmp and longjmp: swapcontext takes a system call each time.
void wait_at(Place place) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.place = place;
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

void go_on(uint32_t thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler) == 0) _longjmp(fibers[thread].context, 1);
}

// A fiber lives from launch to launch.
void body() {
  if (_setjmp(fibers[threadIdx.x].context) == 0) setcontext(&starter);
  for (;;) {
    (*running)();
    wait_at(Place::ended);
  }
}

void make_fibers(uint32_t threads) {
  fibers = std::vector<Fiber>(threads);
  for (uint32_t t = 0; t < threads; ++t) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibers[t].stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, body, 0);
    threadIdx.x = t;
    swapcontext(&starter, &context);
  }
}

// Lets the threads [begin, end) go on if all of them wait at `place`.
bool release(uint32_t begin, uint32_t end, Place place) {
  for (uint32_t t = begin; t < end; ++t) {
    if (fibers[t].place != place) return false;
  }
  for (uint32_t t = begin; t < end; ++t) fibers[t].place = Place::ready;
  return true;
}

[[noreturn]] void fail(const char* what) {
  fibers.clear();  // some stand in the middle of the kernel
  throw std::logic_error(what);
}

void run_block(uint32_t threads) {
  for (uint32_t t = 0; t < threads; ++t) {
    fibers[t].place = Place::ready;
    fibers[t].held_out.shuffles = 0;
  }
  for (bool more = true; more;) {
    more = false;
    for (uint32_t i = 0; i < threads; ++i) {
      const uint32_t t = block_order == 1 ? threads - 1 - i : i;
      if (fibers[t].place != Place::ready) continue;
      go_on(t);
      more = true;
    }
    for (uint32_t w = 0; w < threads; w += kWarp) more |= release(w, w + kWarp, Place::warp_barrier);
    more |= release(0, threads, Place::block_barrier);
  }
  for (uint32_t t = 0; t < threads; ++t) {
    if (fibers[t].stack[0] != kUntouched) fail("emulation: a thread's stack has overflowed");
    if (fibers[t].place != Place::ended) fail("emulation: a barrier that some threads never reach");
  }
}

}  // namespace

void launch(uint32_t blocks, uint32_t threads, const std::function<void()>& kernel) {
  if (fibers.size() < threads) make_fibers(threads);
  running = &kernel;
  std::vector<uint32_t> order(blocks);
  for (uint32_t b = 0; b < blocks; ++b) order[b] = b;
  if (block_order == 1) std::reverse(order.begin(), order.end());
  if (block_order > 1) std::shuffle(order.begin(), order.end(), std::mt19937_64(block_order));
  for (uint32_t b : order) {
    blockIdx.x = b;
    run_block(threads);
  }
  ++launches;
  if (misaligned) {
    misaligned = false;
    throw std::logic_error("emulation: a wide access that is not aligned");
  }
}

void block_barrier() { wait_at(Place::block_barrier); }
void warp_barrier() { wait_at(Place::warp_barrier); }
HeldOut& held_out(uint32_t thread) { return fibers[thread].held_out; }

}  // namespace emulation
