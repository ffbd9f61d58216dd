#include "probes.h"

namespace lomo {
namespace {

// Zero, which the compiler does not know: p is written, and stays what it was.
const volatile uint64_t kNothing = 0;

// Which is fastest depends on the processor. A whole line of 64 bytes at a time, loads before stores, was 1.08 times as
// fast as one vector at a time on Zen 2; on Zen 4 it was 0.93 times as fast. So the bench tries them. Software prefetch
// 2 KiB ahead was 1.15 times slower on a Xeon with AVX-512.
#define LOMO_READ_2_WRITE_1(NAME, TARGET, BYTES, UNROLLED)                             \
  TARGET void read_2_write_1_##NAME(uint64_t* p, const uint64_t* g, int64_t n) {       \
    typedef uint64_t __attribute__((vector_size(BYTES), aligned(8), may_alias)) Words; \
    constexpr int kWords = BYTES / 8;                                                  \
    const uint64_t mask = kNothing;                                                    \
    int64_t i = 0;                                                                     \
    for (; i + kWords * UNROLLED <= n; i += kWords * UNROLLED) {                       \
      auto* to = reinterpret_cast<Words*>(p + i);                                      \
      const auto* from = reinterpret_cast<const Words*>(g + i);                        \
      Words x[UNROLLED];                                                               \
      for (int k = 0; k < UNROLLED; ++k) x[k] = to[k] ^ (from[k] & mask);              \
      for (int k = 0; k < UNROLLED; ++k) to[k] = x[k];                                 \
    }                                                                                  \
    for (; i < n; ++i) p[i] ^= g[i] & mask;                                            \
  }
#define LOMO_READ_1(NAME, TARGET)                               \
  TARGET uint64_t read_1_##NAME(const uint64_t* p, int64_t n) { \
    uint64_t sum = 0;                                           \
    for (int64_t i = 0; i < n; ++i) sum += p[i];                \
    return sum;                                                 \
  }

LOMO_READ_1(baseline, )
LOMO_READ_2_WRITE_1(baseline, , 16, 1)
LOMO_READ_2_WRITE_1(baseline_line, , 16, 4)
#if defined(__x86_64__)
LOMO_READ_1(avx2, __attribute__((target("avx2"))))
LOMO_READ_2_WRITE_1(avx2, __attribute__((target("avx2"))), 32, 1)
LOMO_READ_2_WRITE_1(avx2_line, __attribute__((target("avx2"))), 32, 2)
LOMO_READ_2_WRITE_1(avx512_lines, __attribute__((target("avx512f"))), 64, 2)
#endif

}  // namespace

const std::vector<Read2Write1>& read_2_write_1() {
  static const auto ways = []() -> std::vector<Read2Write1> {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
      return {read_2_write_1_avx2, read_2_write_1_avx2_line, read_2_write_1_avx512_lines};
    }
    if (__builtin_cpu_supports("avx2")) return {read_2_write_1_avx2, read_2_write_1_avx2_line};
#endif
    return {read_2_write_1_baseline, read_2_write_1_baseline_line};
  }();
  return ways;
}

uint64_t read_1(const void* p, int64_t bytes) {
  const auto* from = static_cast<const uint64_t*>(p);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return read_1_avx2(from, bytes / 8);
#endif
  return read_1_baseline(from, bytes / 8);
}

}  // namespace lomo
