// Memory-bandwidth probes: the limit that kernels are measured against. One thread, the caller's.
#pragma once

#include <cstdint>

namespace lomo {

// Reads two streams of whole 64-bit words and writes the first, in place, as the update does. It keeps its values, so
// that the probe can run on the buffers that the kernels run on: other pages of the same machine were 1.2 times faster.
void read_2_write_1(void* p, const void* g, int64_t bytes);

// Reads one stream of whole 64-bit words; the result only keeps the loads from being left out.
uint64_t read_1(const void* p, int64_t bytes);

}  // namespace lomo
