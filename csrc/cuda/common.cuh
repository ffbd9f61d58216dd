// What both operators' kernels share: how blocks find their elements, memory accesses, sums, launches.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "../testing/emulation.h"
#endif

#define LOMO_DEVICE static __device__ __forceinline__

namespace lomo {
namespace cuda {
namespace {

// ---- Tables of tensors, as kernel arguments -------------------------------------------------------------------------

// What a kernel must know of any tensor. A launch's blocks are numbered through, tensor after tensor.
struct Entry {
  const void* grad;
  double* slot;
  int64_t numel;
  uint32_t first_block, blocks, tiles_per_block;
  uint32_t lead;  // elements that the first group lacks, so that the following ones are aligned
};

template <class E, int kCapacity>
struct Table {
  static constexpr int capacity = kCapacity;
  Workspace workspace;
  int count = 0;
  E entries[kCapacity];
};

inline void deal(Entry& entry, const Gradient& grad, uint32_t lead) {
  const int64_t tiles = (grad.numel + lead + kTile - 1) / kTile;
  const int64_t tiles_per_block = (tiles + kTensorBlocks - 1) / kTensorBlocks;
  entry.grad = grad.data;
  entry.slot = grad.slot;
  entry.numel = grad.numel;
  entry.lead = lead;
  entry.tiles_per_block = static_cast<uint32_t>(tiles_per_block);
  entry.blocks = static_cast<uint32_t>((tiles + tiles_per_block - 1) / tiles_per_block);
}

// Whether some slot stands for two gradients. Their sums are then added launch by launch, else they would race.
template <class E>
bool shares_slots(const std::vector<E>& entries) {
  std::vector<const double*> slots;
  for (const E& entry : entries) {
    if (entry.slot) slots.push_back(entry.slot);
  }
  std::sort(slots.begin(), slots.end());
  return std::adjacent_find(slots.begin(), slots.end()) != slots.end();
}

// Calls run(capacity) with how many tensors one launch shall take, as a constant.
template <class E, class Run>
void with_capacity(const std::vector<E>& entries, const Run& run) {
  if (entries.size() == 1 || shares_slots(entries)) {
    run(std::integral_constant<int, 1>{});
  } else {
    run(std::integral_constant<int, kTableEntries>{});
  }
}

// Calls run(element type).
template <class Run>
void with_format(DType dtype, const Run& run) {
  dtype == kFloat32 ? run(Float32{}) : dtype == kBFloat16 ? run(BFloat16{}) : run(Float16{});
}

// Fills `table` again and again from entries [begin, ...), launching each, until all are done.
template <class Table, class E, class Launch>
void launch_all(Table& table, std::vector<E>& entries, const WorkspaceSource& workspace, const Launch& launch) {
  for (size_t i = 0; i < entries.size();) {
    uint32_t blocks = 0;
    table.count = 0;
    while (i < entries.size() && table.count < Table::capacity && blocks + entries[i].blocks <= kLaunchBlocks) {
      E& entry = table.entries[table.count++] = entries[i++];
      entry.first_block = blocks;
      blocks += entry.blocks;
      if (entry.slot && entry.blocks > 1 && !table.workspace.partials) table.workspace = workspace();
    }
    launch(blocks);
  }
}

template <class Arguments>
void launch(void (*kernel)(Arguments), uint32_t blocks, const Arguments& arguments, void* stream) {
#if defined(__CUDACC__)
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("lomo_kernels: CUDA refused a launch: ") + cudaGetErrorString(error));
  }
#else
  (void)stream;
  emulation::launch(blocks, kThreads, [&] { kernel(arguments); });
#endif
}

// The tensor that this block belongs to.
template <class E, int kCapacity>
LOMO_DEVICE int entry_of_block(const Table<E, kCapacity>& table) {
  if (kCapacity == 1) return 0;
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The first element of this block; negative where the first group lacks some.
LOMO_DEVICE int64_t first_element(const Entry& entry) {
  return static_cast<int64_t>(blockIdx.x - entry.first_block) * entry.tiles_per_block * kTile - entry.lead;
}

// ---- Groups of neighbours -------------------------------------------------------------------------------------------

// kVector elements as they lie in memory.
template <class T>
struct Group {
  static constexpr int kSize = sizeof(typename T::Storage);
  static constexpr int kWords = kVector * kSize / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ uint32_t get(int i) const {
    return kSize == 4 ? words[i] : i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
  }
  __device__ __forceinline__ void set_pair(int i, uint32_t even, uint32_t odd) {
    if (kSize == 4) {
      words[i] = even, words[i + 1] = odd;
    } else {
      words[i / 2] = even | odd << 16;
    }
  }
};

// Where the tensor has elements in a tile, counted from the tile's first: [begin, end).
struct Range {
  int begin, end;

  __device__ __forceinline__ bool has(int x) const { return x >= begin && x < end; }
  __device__ __forceinline__ bool has_group(int x) const { return x >= begin && x + kVector <= end; }
};

LOMO_DEVICE Range range_of_tile(int64_t first, int64_t numel) {
  return {first < 0 ? static_cast<int>(-first) : 0,
          numel - first < kTile ? static_cast<int>(numel - first) : int{kTile}};
}

// Element x of a tile, for group k of this thread.
LOMO_DEVICE int place_in_tile(int k) { return (k * kThreads + static_cast<int>(threadIdx.x)) * kVector; }

// Elements [x, x + kVector) of the tile that starts at element `first` of a tensor; zeros where it has none. Whole and
// aligned groups, all but the ends of most tensors, take 128-bit accesses; what follows is the same for all.
template <class T>
LOMO_DEVICE void load(Group<T>& group, const void* tensor, int64_t first, int x, Range range) {
  using Storage = typename T::Storage;
  const Storage* from = static_cast<const Storage*>(tensor) + first + x;
  if (range.has_group(x) && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int w = 0; w < Group<T>::kWords; w += 4) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[w / 4];
      group.words[w] = four.x, group.words[w + 1] = four.y, group.words[w + 2] = four.z, group.words[w + 3] = four.w;
    }
  } else {
    const auto element = [&](int i) { return range.has(x + i) ? uint32_t{from[i]} : 0u; };
#pragma unroll
    for (int i = 0; i < kVector; i += 2) group.set_pair(i, element(i), element(i + 1));
  }
}

template <class T>
LOMO_DEVICE void store(const Group<T>& group, void* tensor, int64_t first, int x, Range range) {
  using Storage = typename T::Storage;
  Storage* to = static_cast<Storage*>(tensor) + first + x;
  if (range.has_group(x) && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int w = 0; w < Group<T>::kWords; w += 4) {
      // The default policy; a plain assignment was compiled to four 32-bit stores.
      __stwb(reinterpret_cast<uint4*>(to) + w / 4,
             make_uint4(group.words[w], group.words[w + 1], group.words[w + 2], group.words[w + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (range.has(x + i)) to[i] = static_cast<Storage>(group.get(i));
    }
  }
}

// ---- Scalars, read by one thread of a block -------------------------------------------------------------------------

LOMO_DEVICE double read(const Number& number) {
  if (!number.device) return number.value;
  return number.is_float32 ? *static_cast<const float*>(number.device) : *static_cast<const double*>(number.device);
}

LOMO_DEVICE int64_t read(const Integer& integer) { return integer.device ? *integer.device : integer.value; }

// ---- Sums of squares ------------------------------------------------------------------------------------------------

// Below this the squares' own underflow (at most 2^-150 each, 512 of them) could be seen in the sum; above, it is under
// 2^-41 of it.
constexpr float kTiny = 0x1p-100f;
constexpr float kLargest = 3.4028234663852886e38f;

constexpr uint32_t kWarp = 32;

LOMO_DEVICE double warp_sum(double x) {
#pragma unroll
  for (uint32_t lane = kWarp / 2; lane >= 1; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// x(begin)^2 + ... + x(begin + kTerms - 1)^2, as a tree.
template <int kTerms, class Numbers>
LOMO_DEVICE float tree_sum(const Numbers& x, int begin) {
  if constexpr (kTerms == 1) {
    return x(begin) * x(begin);
  } else {
    return tree_sum<kTerms / 2>(x, begin) + tree_sum<kTerms / 2>(x, begin + kTerms / 2);
  }
}

// The sum of the squares of 512 numbers, 16 in each thread of a warp; every thread gets it. Every thread must call it.
//
// In float32, as a tree: a square is rounded once, then goes through 4 additions in its thread and 5 across the warp,
// all terms positive: the error is under 10 * 2^-24 = 6e-7 of the sum. Above that sums are float64. Where a square may
// have overflowed or underflowed, the same numbers are summed in float64, where squares are exact.
template <class Numbers>
LOMO_DEVICE double sum_squares(const Numbers& x) {
  constexpr int kTerms = kVector * kGroups;
  float sum = tree_sum<kTerms>(x, 0);
#pragma unroll
  for (uint32_t lane = kWarp / 2; lane >= 1; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (sum >= kTiny && sum <= kLargest) return sum;
  double exact = 0.0;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    if (x(i) != 0.0f) exact += static_cast<double>(x(i)) * x(i);  // zeros are common, float64 is slow on many GPUs
  }
  return warp_sum(exact);
}

// Adds the warps' sums to the tensor's slot: at once where one block has all of it, else by way of partial sums, which
// the block that finishes last adds up, in their order. No float is added atomically, so the bits never change.
LOMO_DEVICE void add_to_slot(const Entry& entry, int index, const Workspace& workspace, double sum) {
  __shared__ double warps[kThreads / kWarp];
  __shared__ bool is_last;
  const uint32_t thread = threadIdx.x, warp = thread / kWarp;
  if (thread % kWarp == 0) warps[warp] = sum;
  __syncthreads();
  if (thread == 0) {
    double total = 0.0;
    for (double w : warps) total += w;
    if (entry.blocks == 1) {
      *entry.slot += total;
    } else {
      workspace.partials[blockIdx.x] = total;
      __threadfence();  // the partial sum is seen before the ticket
      is_last = atomicInc(&workspace.tickets[index], entry.blocks - 1) == entry.blocks - 1;
    }
  }
  if (entry.blocks == 1) return;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double total = 0.0;
  for (uint32_t b = thread; b < entry.blocks; b += kThreads)
    total += __ldcg(&workspace.partials[entry.first_block + b]);
  total = warp_sum(total);
  if (thread % kWarp == 0) warps[warp] = total;
  __syncthreads();
  if (thread == 0) {
    total = 0.0;
    for (double w : warps) total += w;
    *entry.slot += total;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lomo
