#include "steps.h"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>

namespace lomo {
namespace {

volatile int64_t steps;

void count(int) { steps = steps + 1; }

// The processor traps after each instruction while the trap flag (0x100) is set; in a signal's handler it is not.
__attribute__((noinline)) void trap() { asm volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc"); }
__attribute__((noinline)) void run_on() { asm volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc"); }

// Restores what was there, also when the call throws.
struct Counting {
  struct sigaction before;
  Counting() {
    struct sigaction action = {};
    action.sa_handler = count;
    sigaction(SIGTRAP, &action, &before);
    steps = 0;
    trap();
  }
  ~Counting() {
    run_on();
    sigaction(SIGTRAP, &before, nullptr);
  }
};

}  // namespace

int64_t count_instructions(const std::function<void()>& call) {
  {
    const Counting counting;
    call();
  }
  return steps;
}

}  // namespace lomo
#else
namespace lomo {
int64_t count_instructions(const std::function<void()>&) {
  throw std::runtime_error("instructions are counted on Linux on x86-64 only");
}
}  // namespace lomo
#endif
