// The update of lists of parameters on a GPU. The formula is that of csrc/numerics.h; here is who does which element.
#include "common.cuh"

namespace lomo {
namespace cuda {
namespace {

struct UpdateEntry : Entry {
  void* param;
  int64_t parameter_id;
  Shard shard;
};

template <int kCapacity>
struct Arguments : Table<UpdateEntry, kCapacity> {
  Step step;
};
static_assert(sizeof(Arguments<kTableEntries>) <= 32764, "what a launch can take");

// What a block's threads share: read and computed by one of them.
struct Shared {
  float lr, decay, inv_scale, clip_value, clip_coef;
  bool found_inf;
  // Element x of the block has column `column` + x of the row whose first element has index `row`, or of a later row.
  uint64_t row, column, row_length, row_stride;
  uint64_t stream, high, key;  // `key`: of the counters that have these high 32 bits
};

LOMO_DEVICE void prepare(Shared& shared, const UpdateEntry& entry, const Step& step, bool stochastic, int per_hash) {
  const double lr = read(step.lr), weight_decay = read(step.weight_decay), inv_scale = read(step.inv_scale);
  const double clip_value = read(step.clip_value), clip_coef = read(step.clip_coef), found_inf = read(step.found_inf);
  shared.lr = static_cast<float>(lr);
  shared.decay = decay_of(lr, weight_decay);
  shared.inv_scale = static_cast<float>(inv_scale);
  shared.clip_value = static_cast<float>(clip_value);
  shared.clip_coef = static_cast<float>(clip_coef);
  shared.found_inf = found_inf != 0.0;
  if (!stochastic) return;
  const Shard& shard = entry.shard;
  const int64_t first = first_element(entry), row = first / shard.row_length;
  shared.column = static_cast<uint64_t>(first - row * shard.row_length);
  shared.row = static_cast<uint64_t>(shard.offset) + static_cast<uint64_t>(row) * shard.row_stride;
  shared.row_length = static_cast<uint64_t>(shard.row_length);
  shared.row_stride = static_cast<uint64_t>(shard.row_stride);
  shared.stream = stream_key(step.seed, entry.parameter_id, read(step.step));
  shared.high = (shared.row + shared.column) / per_hash >> 32;
  shared.key = block_key(shared.stream, shared.high << 32);
}

// Index in the whole parameter of the block's element x, x < 2^31.
LOMO_DEVICE uint64_t index_of(const Shared& shared, uint32_t x) {
  const uint64_t column = shared.column + x, length = shared.row_length;
  const uint64_t rows = length >> 31 ? column >= length : static_cast<uint32_t>(column) / static_cast<uint32_t>(length);
  return shared.row + rows * shared.row_stride + (column - rows * length);
}

// Random bits for kVector elements: 16 each for bfloat16, in pairs, 32 each for float16.
template <class P>
struct Random {
  static constexpr int kWords = kVector / P::kPerHash;
  uint32_t words[kWords];

  __device__ __forceinline__ uint32_t get(int i) const {
    return P::kPerHash == 1 ? words[i] : i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
  }
};

// Those of the block's elements from x on.
template <class P>
LOMO_DEVICE void draw(Random<P>& random, const Shared& shared, uint32_t x, bool whole) {
  constexpr int kWords = Random<P>::kWords;
  const uint64_t first = index_of(shared, x), last = index_of(shared, x + kVector - 1);
  const uint64_t counter = first / P::kPerHash;
  if (whole && last - first == kVector - 1 && counter >> 32 == shared.high && last / P::kPerHash >> 32 == shared.high) {
    const uint32_t low = static_cast<uint32_t>(counter);
#pragma unroll
    for (int w = 0; w < kWords; ++w) random.words[w] = random_bits(shared.key, low + w);
    if (first % P::kPerHash) {  // an element then shares its hash with the one before it
      const uint32_t next = random_bits(shared.key, low + kWords);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        random.words[w] = random.words[w] >> 16 | (w + 1 < kWords ? random.words[w + 1] : next) << 16;
      }
    }
    return;
  }
  // The ends of a tensor, of a shard's row, or of the counters that share a key: one by one. Not unrolled, since it is
  // long and rare; the inner loop keeps the words in registers.
#pragma unroll
  for (int w = 0; w < kWords; ++w) random.words[w] = 0;
#pragma unroll 1
  for (int i = 0; i < kVector; ++i) {
    const uint64_t index = index_of(shared, x + i), own = index / P::kPerHash;
    const uint64_t key = own >> 32 == shared.high ? shared.key : block_key(shared.stream, own);
    uint32_t bits = random_bits(key, static_cast<uint32_t>(own));
    if (P::kPerHash == 2) bits = (index % 2 ? bits >> 16 : bits & 0xffffu) << (i % 2 * 16);
#pragma unroll
    for (int w = 0; w < kWords; ++w) random.words[w] |= w == i / P::kPerHash ? bits : 0;
  }
}

template <class P, class G, bool kStochastic>
LOMO_DEVICE void update(Group<P>& p, const Group<G>& g, const Scalars& scalars, const Shared& shared, uint32_t x,
                        bool whole) {
  Random<P> random;
  if (kStochastic) draw(random, shared, x, whole);
  const auto element = [&](int i) {
    return update_element<P, kStochastic>(p.get(i), G::widen(g.get(i)), scalars, kStochastic ? random.get(i) : 0u);
  };
#pragma unroll
  for (int i = 0; i < kVector; i += 2) p.set_pair(i, element(i), element(i + 1));
}

// Blocks that a multiprocessor must have room for, which bounds their registers to 64 or 80: 1024 threads with 64 bytes
// each under way, or 768 with 64 to 128. Nothing may spill, with no nvcc.
template <class P, class G, bool kStochastic>
constexpr int kResident = sizeof(Group<P>) + sizeof(Group<G>) == 32 && !kStochastic ? 4 : 3;

template <class P, class G, bool kStochastic, int kCapacity>
__global__ void __launch_bounds__(kThreads, kResident<P, G, kStochastic>)
    sgd_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ Shared shared;
  const int index = entry_of_block(arguments);
  const UpdateEntry& entry = arguments.entries[index];
  int64_t first = first_element(entry);
  Scalars scalars;
  double sum = 0.0;
  for (uint32_t tile = 0; tile < entry.tiles_per_block; ++tile, first += kTile) {
    const Range range = range_of_tile(first, entry.numel);
    Group<P> p[kGroups];
    Group<G> g[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      load(g[k], entry.grad, first, place_in_tile(k), range);
      load(p[k], entry.param, first, place_in_tile(k), range);
    }
    if (tile == 0) {  // while the first loads are under way
      if (threadIdx.x == 0) prepare(shared, entry, arguments.step, kStochastic, P::kPerHash);
      __syncthreads();
      scalars.lr = shared.lr;
      scalars.decay = shared.decay;
      scalars.inv_scale = shared.inv_scale;
      scalars.clip_value = shared.clip_value;
      scalars.clip_coef = shared.clip_coef;
      if (shared.found_inf && !entry.slot) return;
    }
    if (entry.slot) {
      sum += sum_squares([&](int i) { return G::widen(g[i / kVector].get(i % kVector)) * scalars.inv_scale; });
    }
    if (shared.found_inf) continue;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int x = place_in_tile(k);
      update<P, G, kStochastic>(p[k], g[k], scalars, shared, tile * uint32_t{kTile} + x, range.has_group(x));
      store(p[k], entry.param, first, x, range);
    }
  }
  if (entry.slot) add_to_slot(entry, index, arguments.workspace, sum);
}

UpdateEntry entry_for(const Parameter& parameter) {
  UpdateEntry entry;
  // Stores cost more than loads where they are misaligned, so the groups follow the parameter's alignment; but with a
  // norm they follow the elements' numbers, as sq_norm does.
  const uint32_t size = parameter.dtype == kFloat32 ? 4 : 2;
  const uint32_t beyond = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(parameter.data) % 16);
  deal(entry, parameter.grad, parameter.grad.slot ? 0 : beyond / size);
  entry.param = parameter.data;
  entry.parameter_id = parameter.parameter_id;
  entry.shard = parameter.shard;
  return entry;
}

template <class P, class G>
void run(std::vector<UpdateEntry>& entries, const Step& step, const WorkspaceSource& workspace, void* stream) {
  with_capacity(entries, [&](auto capacity) {
    Arguments<capacity()> arguments{};
    arguments.step = step;
    launch_all(arguments, entries, workspace, [&](uint32_t blocks) {
      constexpr bool kRounds = sizeof(typename P::Storage) < 4;
      launch(kRounds && step.stochastic ? sgd_kernel<P, G, kRounds, capacity()> : sgd_kernel<P, G, false, capacity()>,
             blocks, arguments, stream);
    });
  });
}

}  // namespace

void sgd(const std::vector<Parameter>& parameters, const Step& step, const WorkspaceSource& workspace, void* stream) {
  for (int p = 0; p < kDTypes; ++p) {
    for (int g = 0; g < kDTypes; ++g) {
      std::vector<UpdateEntry> entries;
      for (const Parameter& parameter : parameters) {
        if (parameter.dtype == p && parameter.grad.dtype == g && parameter.grad.numel) {
          entries.push_back(entry_for(parameter));
        }
      }
      if (entries.empty()) continue;
      with_format(static_cast<DType>(p), [&](auto param) {
        with_format(static_cast<DType>(g),
                    [&](auto grad) { run<decltype(param), decltype(grad)>(entries, step, workspace, stream); });
      });
    }
  }
}

}  // namespace cuda
}  // namespace lomo
