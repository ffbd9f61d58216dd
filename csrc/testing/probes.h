// Memory-bandwidth probes: the limit that kernels are measured against. One thread, the caller's.
#pragma once

#include <cstdint>

namespace lomo {

// p ^= g on whole 64-bit words: reads two streams, writes one, in place, as the update does.
void read_2_write_1(void* p, const void* g, int64_t bytes);

// Reads one stream of whole 64-bit words; the result only keeps the loads from being left out.
uint64_t read_1(const void* p, int64_t bytes);

}  // namespace lomo
