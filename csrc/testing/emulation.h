// Runs the CUDA kernels' sources on the host: what they use of CUDA, in plain C++. Every thread of a block is a fiber,
// and barriers and shuffles are where fibers wait for each other; blocks run one after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time

struct uint3 {
  uint32_t x, y, z;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint3 blockIdx, threadIdx;

namespace emulation {

// The order in which blocks run: 0 is ascending, 1 descending (threads too), others are seeds of a shuffle.
inline uint64_t block_order = 0;

// How many launches there were.
inline uint64_t launches = 0;

// Whether some access was not aligned as it must be on a GPU.
inline bool misaligned = false;
inline void require_aligned(const void* at, size_t bytes) {
  misaligned = misaligned || reinterpret_cast<uintptr_t>(at) % bytes != 0;
}

// Runs kernel() once in each of `threads` threads of each of `blocks` blocks, and returns when all have ended.
// Throws std::logic_error if a thread waits at a barrier and another of its block or warp has ended or waits elsewhere,
// or if an access was not aligned.
void launch(uint32_t blocks, uint32_t threads, const std::function<void()>& kernel);

// Where this thread goes on only when all threads of its block, or of its warp, have come to the same call.
void block_barrier();
void warp_barrier();

// 64 bits that each thread of the running block holds out to the others in its next shuffle: two places that take
// turns, so that one barrier per shuffle is enough.
struct HeldOut {
  uint64_t places[2];
  uint32_t shuffles;
};
HeldOut& held_out(uint32_t thread);

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __threadfence() {}

// What thread `lane` of this thread's warp holds out. All of them call it.
template <class T>
T __shfl_sync(uint32_t /*mask*/, T value, uint32_t lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulation::HeldOut& own = emulation::held_out(threadIdx.x);
  const uint32_t place = own.shuffles++ % 2;
  __builtin_memcpy(&own.places[place], &value, sizeof value);
  emulation::warp_barrier();
  __builtin_memcpy(&value, &emulation::held_out(threadIdx.x / 32 * 32 + lane).places[place], sizeof value);
  return value;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t lanes) {
  return __shfl_sync(mask, value, threadIdx.x % 32 ^ lanes);
}

inline bool __any_sync(uint32_t mask, uint32_t value) {
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) value |= __shfl_xor_sync(mask, value, lanes);
  return value;
}

inline uint32_t atomicInc(uint32_t* counter, uint32_t last) {
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline double __ldcg(const double* from) { return *from; }
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stwb(T* to, T value) {
  *to = value;
}
