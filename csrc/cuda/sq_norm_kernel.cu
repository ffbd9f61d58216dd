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

template <class G>
LOMO_DEVICE void load_tile(Share<G, kVector<G>>& g, const Entry& entry, uint32_t tile) {
  const int64_t own = first_element(entry, tile) + own_position<kVector<G>>();
  if (is_straight(entry, tile)) {
    load_straight<Use::once>(g, static_cast<const typename G::Storage*>(entry.grad) + own);
  } else {
    load_elements(g, entry.grad, own, entry.numel);
  }
}

// Room for 4 blocks on a multiprocessor: with the next tile's loads under way while one is summed, 32 to 128 KiB.
template <class G, int kCapacity>
__global__ void __launch_bounds__(kThreads, 4) sq_norm_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ float shared_scale;
  const int index = entry_of_block(arguments);
  const Entry& entry = arguments.entries[index];
  uint32_t tile = first_tile(entry);
  Share<G, kVector<G>> g, next;
  load_tile(g, entry, tile);
  if (threadIdx.x == 0) shared_scale = static_cast<float>(read(arguments.inv_scale));
  __syncthreads();
  const float inv_scale = shared_scale;
  double sum = 0.0;
  for (uint32_t tiles = entry.tiles_per_block; tiles; --tiles) {
    if (tiles > 1) load_tile(next, entry, ++tile);
    sum += sum_squares<kVector<G>>([&](int i) { return g.get(i) * inv_scale; });
    g = next;
  }
  add_to_slot<kVector<G>>(entry, index, arguments.workspace, sum);
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
