// Sums of squares of lists of gradients on a GPU; how they are formed is in common.cuh.
#include "common.cuh"

namespace lomo {
namespace cuda {
namespace {

template <int kCapacity>
struct Arguments : Table<Entry, kCapacity> {
  Number inv_scale;
};
static_assert(sizeof(Arguments<kTableEntries>) <= 32764, "what a launch can take");

// Blocks that a multiprocessor must have room for: as many as leave enough registers that nothing spills. Each has 8 or
// 16 KiB under way.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200
constexpr int kResident = 4;
#elif __CUDA_ARCH__ >= 1000
constexpr int kResident = 5;
#else
constexpr int kResident = 6;
#endif

template <class G, int kCapacity>
__global__ void __launch_bounds__(kThreads, kResident)
    sq_norm_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ float shared_scale;
  const int index = entry_of_block(arguments);
  const Entry& entry = arguments.entries[index];
  int64_t first = first_element(entry);
  float inv_scale = 1.0f;
  double sum = 0.0;
  for (uint32_t tile = 0; tile < entry.tiles_per_block; ++tile, first += kTile) {
    const Range range = range_of_tile(first, entry.numel);
    Group<G> g[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) load(g[k], entry.grad, first, place_in_tile(k), range);
    if (tile == 0) {  // while the first loads are under way
      if (threadIdx.x == 0) shared_scale = static_cast<float>(read(arguments.inv_scale));
      __syncthreads();
      inv_scale = shared_scale;
    }
    sum += sum_squares([&](int i) { return G::widen(g[i / kVector].get(i % kVector)) * inv_scale; });
  }
  add_to_slot(entry, index, arguments.workspace, sum);
}

template <class G>
void run(std::vector<Entry>& entries, const Number& inv_scale, const WorkspaceSource& workspace, void* stream) {
  with_capacity(entries, [&](auto capacity) {
    Arguments<capacity()> arguments{};
    arguments.inv_scale = inv_scale;
    launch_all(arguments, entries, workspace,
               [&](uint32_t blocks) { launch(sq_norm_kernel<G, capacity()>, blocks, arguments, stream); });
  });
}

}  // namespace

void sq_norm(const std::vector<Gradient>& gradients, const Number& inv_scale, const WorkspaceSource& workspace,
             void* stream) {
  for (int dtype = 0; dtype < kDTypes; ++dtype) {
    std::vector<Entry> entries;
    for (const Gradient& gradient : gradients) {
      if (gradient.dtype != dtype || !gradient.numel) continue;
      entries.emplace_back();
      deal(entries.back(), gradient, 0);
    }
    if (entries.empty()) continue;
    with_format(static_cast<DType>(dtype),
                [&](auto grad) { run<decltype(grad)>(entries, inv_scale, workspace, stream); });
  }
}

}  // namespace cuda
}  // namespace lomo
