// Memory-bandwidth probes: the limit that kernels are measured against. One thread, the caller's.
#pragma once

#include <cstdint>
#include <vector>

namespace lomo {

// Reads two streams of n whole 64-bit words and writes the first, in place, as the update does. It keeps its values, so
// that the probe can run on the buffers that the kernels run on: other pages of the same machine were 1.2 times faster.
using Read2Write1 = void (*)(uint64_t* p, const uint64_t* g, int64_t n);

// Ways to do so on this processor, of which the fastest is the limit.
const std::vector<Read2Write1>& read_2_write_1();

// Reads one stream of whole 64-bit words; the result only keeps the loads from being left out.
uint64_t read_1(const void* p, int64_t bytes);

}  // namespace lomo
