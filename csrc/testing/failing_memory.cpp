// Memory that runs out: at one chosen allocation, a CPU tensor gets none. tests/faults calls this through ctypes.
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace {

// What the allocation raises: torch's error on a CPU (RuntimeError), the one on a GPU (torch.OutOfMemoryError), C++'s.
enum Kind : int { kRuntimeError, kOutOfMemoryError, kBadAlloc };

class FailingAllocator final : public c10::Allocator {
 public:
  explicit FailingAllocator(c10::Allocator* under) : under_(under) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (count++ == fails_at) {
      if (kind == kBadAlloc) throw std::bad_alloc();
      TORCH_CHECK_WITH(OutOfMemoryError, kind != kOutOfMemoryError, "failing_memory: out of memory (", bytes,
                       " bytes)");
      TORCH_CHECK(false, "failing_memory: can't allocate memory (", bytes, " bytes)");
    }
    return under_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return under_->raw_deleter(); }
  void copy_data(void* dest, const void* src, size_t bytes) const override { under_->copy_data(dest, src, bytes); }

  std::atomic<int64_t> count{0}, fails_at{-1};
  std::atomic<int> kind{kRuntimeError};

 private:
  c10::Allocator* under_;
};

FailingAllocator& allocator() {
  static FailingAllocator* installed = [] {
    auto* made = new FailingAllocator(c10::GetCPUAllocator());
    c10::SetCPUAllocator(made, /*priority=*/255);
    return made;
  }();
  return *installed;
}

}  // namespace

// Counts from zero again, and fails once, at the allocation with number `fails_at`; never if it is negative.
extern "C" __attribute__((visibility("default"))) void failing_memory_arm(int64_t fails_at, int kind) {
  allocator().fails_at = fails_at;
  allocator().kind = kind;
  allocator().count = 0;
}

// Allocations since `failing_memory_arm`.
extern "C" __attribute__((visibility("default"))) int64_t failing_memory_count() { return allocator().count; }
