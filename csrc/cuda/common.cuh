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

#define LOMO_DEVICE_MEMBER __device__ __forceinline__
#define LOMO_DEVICE static LOMO_DEVICE_MEMBER

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
  uint32_t lead;          // elements that the first tile lacks, so that the following ones are aligned
  uint32_t straight_end;  // tiles before this one are whole; 0 if accesses of 128 bits would not be aligned
};

template <class E, int kCapacity>
struct Table {
  static constexpr int capacity = kCapacity;
  Workspace workspace;
  int count = 0;
  E entries[kCapacity];
};

inline uint32_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

inline bool is_aligned(const void* tensor, DType dtype, uint32_t lead) {
  return (reinterpret_cast<uintptr_t>(tensor) - lead * size_of(dtype)) % 16 == 0;
}

inline void deal(Entry& entry, const Gradient& grad, uint32_t lead) {
  const int64_t tiles = (grad.numel + lead + kTile - 1) / kTile;
  const int64_t most = grad.slot ? kNormBlocks : kTensorBlocks;
  const int64_t tiles_per_block = (tiles + most - 1) / most;
  entry.grad = grad.data;
  entry.slot = grad.slot;
  entry.numel = grad.numel;
  entry.first_block = 0;
  entry.lead = lead;
  entry.straight_end = is_aligned(grad.data, grad.dtype, lead) ? (grad.numel + lead) / kTile : 0;
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
  } else if (entries.size() <= kSomeEntries) {
    run(std::integral_constant<int, kSomeEntries>{});
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
  const int64_t most = entries[0].slot ? kNormLaunchBlocks : kLaunchBlocks;  // all entries have a slot, or none
  for (size_t i = 0; i < entries.size();) {
    uint32_t blocks = 0;
    table.count = 0;
    while (i < entries.size() && table.count < Table::capacity && blocks + entries[i].blocks <= most) {
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

// The first tile of this block.
LOMO_DEVICE uint32_t first_tile(const Entry& entry) { return (blockIdx.x - entry.first_block) * entry.tiles_per_block; }

// The first element of a tile; negative if the tile lacks some.
LOMO_DEVICE int64_t first_element(const Entry& entry, uint32_t tile) { return tile * kTile - entry.lead; }

// Whether a tile is whole and aligned: one decision for all threads and accesses.
LOMO_DEVICE bool is_straight(const Entry& entry, uint32_t tile) {
  return tile < entry.straight_end && (tile || !entry.lead);
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// Neighbours that a thread loads in one access. The widest dtype takes 16 bytes, so a warp's accesses have no gaps.
template <class T, class U = T>
constexpr int kVector = sizeof(typename T::Storage) + sizeof(typename U::Storage) > 4 ? 4 : 8;

// own_position(): position in a tile of this thread's element 0. distance(i): from there to its element i, a multiple
// of kCount. A warp has two runs of 256 neighbours. A thread takes 8 of each run: 8 neighbours, or 4 and 4.
template <int kCount>
LOMO_DEVICE uint32_t own_position() {
  return kCount == 8 ? threadIdx.x * 8 : threadIdx.x / 32 * 256 + threadIdx.x % 32 * 4;
}
template <int kCount>
LOMO_DEVICE uint32_t distance(uint32_t i) {
  return i / 8 * uint32_t{kTile / 2} + (kCount == 8 ? i % 8 : i % 8 / 4 * 128 + i % 4);
}

// A thread's 16 elements of a tile, kCount of which are neighbours, as they lie in memory.
template <class T, int kCount>
struct Share {
  using Storage = typename T::Storage;
  static constexpr bool kWide = sizeof(Storage) == 4;
  static constexpr int kPerWord = 4 / sizeof(Storage);
  static constexpr int kPerAccess = kCount / kPerWord;  // words
  uint32_t words[kShare / kPerWord];

  LOMO_DEVICE_MEMBER uint32_t bits(int i) const {
    return kWide ? words[i] : i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
  }
  LOMO_DEVICE_MEMBER float get(int i) const { return T::widen(bits(i)); }
};

// A pointer for a wide access. It must be aligned: otherwise a GPU stops with an error, and so does the emulation.
template <class V, class T>
LOMO_DEVICE V* wide(T* at) {
#if !defined(__CUDACC__)
  emulation::require_aligned(at, sizeof(V));
#endif
  return reinterpret_cast<V*>(at);
}

// `once`: not needed after it is read, so caches may drop it first. An update's gradient is not loaded so: the
// parameters that it writes would stay in the cache until the next kernel runs. With such loads updates of 2^28
// elements reached 0.91 of torch's add_ on an H200, without them 0.97. The kernels that only read keep them: without
// them the compiler gives factored_sq_norm_ 57 instructions per element in place of 21.
enum class Use { once, again };

// Loads this thread's share of a tile that is whole and aligned. No load waits for another one. With a branch between
// them (for each group, say) the second would wait for the first.
//
// `next_run`: from an element of a warp's first run to that of the second one, if the tile is no stretch of memory.
template <Use use, class T, int kCount>
LOMO_DEVICE void load_straight(Share<T, kCount>& share, const typename T::Storage* own, int64_t next_run = kTile / 2) {
#pragma unroll
  for (int i = 0; i < kShare; i += kCount) {
    const auto* from = own + i / 8 * next_run + distance<kCount>(i % 8);
    uint32_t* words = share.words + i / share.kPerWord;
    if constexpr (Share<T, kCount>::kPerAccess == 4) {
      const auto* at = wide<const uint4>(from);
      const uint4 four = use == Use::once ? __ldcs(at) : *at;
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      const auto* at = wide<const uint2>(from);
      const uint2 two = use == Use::once ? __ldcs(at) : *at;
      words[0] = two.x, words[1] = two.y;
    }
  }
}

template <class T, int kCount>
LOMO_DEVICE void store_straight(const Share<T, kCount>& share, typename T::Storage* own) {
#pragma unroll
  for (int i = 0; i < kShare; i += kCount) {
    auto* to = own + distance<kCount>(i);
    const uint32_t* words = share.words + i / share.kPerWord;
    // The default policy; a plain assignment was compiled to four 32-bit stores.
    if constexpr (Share<T, kCount>::kPerAccess == 4) {
      __stwb(wide<uint4>(to), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      __stwb(wide<uint2>(to), make_uint2(words[0], words[1]));
    }
  }
}

// Element x of a tensor, or zero if it has none.
template <class T>
LOMO_DEVICE uint32_t element(const void* tensor, int64_t x, int64_t numel) {
  return x >= 0 && x < numel ? uint32_t{static_cast<const typename T::Storage*>(tensor)[x]} : 0u;
}

// Loads the share of any tile, element by element. `own`: index of this thread's element 0.
template <class T, int kCount>
LOMO_DEVICE void load_elements(Share<T, kCount>& share, const void* tensor, int64_t own, int64_t numel) {
#pragma unroll
  for (int i = 0; i < kShare; i += 2) {
    const int64_t x = own + distance<kCount>(i);
    const uint32_t even = element<T>(tensor, x, numel), odd = element<T>(tensor, x + 1, numel);
    if (share.kWide) {
      share.words[i] = even, share.words[i + 1] = odd;
    } else {
      share.words[i / 2] = even | odd << 16;
    }
  }
}

// ---- Scalars, read by one thread of a block -------------------------------------------------------------------------

LOMO_DEVICE double read(const Number& number) {
  if (!number.device) return number.value;
  return number.is_float32 ? *static_cast<const float*>(number.device) : *static_cast<const double*>(number.device);
}

LOMO_DEVICE double read(const ScalarVector& scalars, uint32_t i) {
  return scalars.device ? scalars.device[i] : scalars.values[i];
}

// What clips gradients. All threads of a block must call this; loads that were issued before it stay under way.
LOMO_DEVICE Scalars read_clipping(const ScalarVector& scalars) {
  __shared__ float numbers[kScalars];
  if (threadIdx.x < kStep) numbers[threadIdx.x] = static_cast<float>(read(scalars, threadIdx.x));
  __syncthreads();
  Scalars clipping;
  clipping.inv_scale = numbers[kInvScale];
  clipping.clip_value = numbers[kClipValue];
  clipping.clip_coef = numbers[kClipCoef];
  return clipping;
}

// ---- Sums of squares ------------------------------------------------------------------------------------------------

// Smallest float32 sum that is used. Each of the 16 squares may lose 2^-150 by underflow: under 2^-46 of a sum above
// this bound.
constexpr float kTiny = 0x1p-100f;
constexpr float kLargest = 3.4028234663852886e38f;

constexpr uint32_t kWarp = 32;

LOMO_DEVICE double warp_sum(double x) {
#pragma unroll
  for (uint32_t lane = 1; lane < kWarp; lane *= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// x(begin)^2 + ... + x(begin + 3)^2, as a tree. Float is float or double.
template <class Float, class Numbers>
LOMO_DEVICE Float sum_of_4(const Numbers& x, int begin) {
  const auto square = [&](int i) { return static_cast<Float>(x(i)) * static_cast<Float>(x(i)); };
  return (square(begin) + square(begin + 1)) + (square(begin + 2) + square(begin + 3));
}

// The sum of 16 squares: of 4 numbers and the next 4, in both of the warp's runs. With groups of 8 all are this
// thread's. With groups of 4 half of them are a neighbour's. The order of the additions is the same.
template <class Float, int kCount, class Numbers>
LOMO_DEVICE Float sum_of_16(const Numbers& x) {
  const Float left = sum_of_4<Float>(x, 0) + sum_of_4<Float>(x, 8);
  const Float right = sum_of_4<Float>(x, 4) + sum_of_4<Float>(x, 12);
  if (kCount == 8) return left + right;
  const bool odd = threadIdx.x % 2;  // an even thread takes the first groups of both threads, an odd one the second
  return (odd ? right : left) + __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
}

// The sum of 16 squares of a tile. A warp's 32 threads together sum its 512 squares. All of them must call this.
//
// In float32, as a tree: a square is rounded once, then goes through 4 additions, all terms positive: the error is
// under 5 * 2^-24 = 3e-7 of the sum. Larger sums are added in float64. If a square may have overflowed or underflowed,
// the same numbers are summed in float64, in which squares are exact.
template <int kCount, class Numbers>
LOMO_DEVICE double sum_squares(const Numbers& x) {
  const float sum = sum_of_16<float, kCount>(x);
  bool is_right = sum >= kTiny && sum <= kLargest;
  if (!__any_sync(0xffffffffu, !is_right)) return sum;
  bool is_zero = true;  // zeros are common, and float64 is slow on many GPUs
#pragma unroll
  for (int i = 0; i < kShare; ++i) is_zero = is_zero && x(i) == 0.0f;
  if (kCount == 4) is_zero = __shfl_xor_sync(0xffffffffu, is_zero, 1) && is_zero;
  is_right = is_right || is_zero;
  if (!__any_sync(0xffffffffu, !is_right)) return sum;
  const double exact = sum_of_16<double, kCount>(x);
  return is_right ? sum : exact;
}

// Adds the threads' sums to the tensor's slot. If one block has the whole tensor, it adds at once. Otherwise blocks
// write partial sums, and the block that finishes last adds them in order. No float is added atomically, so the bits
// never change.
template <int kCount>
LOMO_DEVICE void add_to_slot(const Entry& entry, int index, const Workspace& workspace, double sum) {
  __shared__ double warps[kThreads / kWarp];
  __shared__ bool is_last;
  const uint32_t thread = threadIdx.x, warp = thread / kWarp;
  // With groups of 4 the even threads have the sums of the first groups, see sum_of_16. This puts the sums in order.
  if (kCount == 4) sum = __shfl_sync(0xffffffffu, sum, thread % 16 * 2 + thread / 16 % 2);
  sum = warp_sum(sum);
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
