#include "emulation.h"

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

  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Place place = Place::ended;
  HeldOut held_out{};
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* running = nullptr;

void body() {
  (*running)();
  fibers[threadIdx.x].place = Place::ended;
}

void wait_at(Place place) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.place = place;
  swapcontext(&fiber.context, &scheduler);
}

// Lets the threads [begin, end) go on if all of them wait at `place`.
bool release(uint32_t begin, uint32_t end, Place place) {
  for (uint32_t t = begin; t < end; ++t) {
    if (fibers[t].place != place) return false;
  }
  for (uint32_t t = begin; t < end; ++t) fibers[t].place = Place::ready;
  return true;
}

void run_block(uint32_t threads) {
  for (uint32_t t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, body, 0);
    fiber.place = Place::ready;
    fiber.held_out.shuffles = 0;
  }
  for (bool more = true; more;) {
    more = false;
    for (uint32_t i = 0; i < threads; ++i) {
      const uint32_t t = block_order == 1 ? threads - 1 - i : i;
      if (fibers[t].place != Place::ready) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      more = true;
    }
    for (uint32_t w = 0; w < threads; w += kWarp) more |= release(w, w + kWarp, Place::warp_barrier);
    more |= release(0, threads, Place::block_barrier);
  }
  for (uint32_t t = 0; t < threads; ++t) {
    if (fibers[t].stack[0] != kUntouched) throw std::logic_error("emulation: a thread's stack has overflowed");
    if (fibers[t].place != Place::ended) throw std::logic_error("emulation: a barrier that some threads never reach");
  }
}

}  // namespace

void launch(uint32_t blocks, uint32_t threads, const std::function<void()>& kernel) {
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
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
