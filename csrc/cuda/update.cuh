// What updates with and without factors share. The formula is that of csrc/numerics.h; here is who does which element.
#pragma once

#include "common.cuh"

namespace lomo {
namespace cuda {
namespace {

template <class P>
constexpr bool kSplits = std::is_same_v<P, SplitBFloat16>;

struct UpdateEntry : Entry {
  void* param;
  uint64_t key;  // parameter_key; the address of its low parts if the parameter is split
  Shard shard;
};

// What a block's threads share.
struct Shared {
  float scalars[kStep];  // as float32, without the step; at kWeightDecay the factor of decay_of()
  // Element x of the block has column `column` + x of the row whose first element has index `row`, or of a later row.
  uint64_t row, column, row_length, row_stride;
  uint64_t stream, high, key;  // `key`: of the counters that have these high 32 bits
  // Whether all of the block's elements are in one row and share this key, and the first index is a multiple of 8. Then
  // their counters are `counter` and the following ones, and the low bits of a thread's first counter are zero.
  uint32_t plain;
  uint32_t counter, addend;
};

// One thread each.
LOMO_DEVICE void prepare_scalar(Shared& shared, const Step& step, uint32_t i) {
  const double number = read(step.scalars, i);
  shared.scalars[i] = i == kWeightDecay ? decay_of(read(step.scalars, kLr), number)
                      : i == kFoundInf  ? (number != 0.0 ? 1.0f : 0.0f)
                                        : static_cast<float>(number);
}

LOMO_DEVICE void prepare_random(Shared& shared, const UpdateEntry& entry, const Step& step, uint32_t per_hash) {
  const Shard& shard = entry.shard;
  const int64_t first = first_element(entry, first_tile(entry)), row = first / shard.row_length;
  shared.column = static_cast<uint64_t>(first - row * shard.row_length);
  shared.row = static_cast<uint64_t>(shard.offset) + static_cast<uint64_t>(row) * shard.row_stride;
  shared.row_length = static_cast<uint64_t>(shard.row_length);
  shared.row_stride = static_cast<uint64_t>(shard.row_stride);
  const uint64_t elements = entry.tiles_per_block * static_cast<uint64_t>(kTile), index = shared.row + shared.column;
  shared.stream = stream_of(entry.key, step_of(read(step.scalars, kStep)));
  shared.high = index / per_hash >> 32;
  shared.key = block_key(shared.stream, shared.high << 32);
  shared.counter = static_cast<uint32_t>(index / per_hash);
  shared.addend = addend_of(shared.key);
  shared.plain = first >= 0 && shared.column + elements <= shared.row_length && index % 8 == 0 &&
                 (index + elements - 1) / per_hash >> 32 == shared.high;
}

// Index in the whole parameter of the block's element x, x < 2^31.
LOMO_DEVICE uint64_t index_of(const Shared& shared, uint32_t x) {
  const uint64_t column = shared.column + x, length = shared.row_length;
  const uint64_t rows = length >> 31 ? column >= length : static_cast<uint32_t>(column) / static_cast<uint32_t>(length);
  return shared.row + rows * shared.row_stride + (column - rows * length);
}

// A random word of `draw`.
template <class P>
LOMO_DEVICE uint32_t word_of(uint32_t begun, uint32_t addend) {
  const uint32_t hash = continue_hash(begun, addend);
  return P::kPerHash == 2 ? end_hash(hash) : hash;
}

// Random words for the block's elements [x, x + kCount). bfloat16: one word for two elements, the even one has the low
// half. float16: one word for each, without end_hash. Returns false if the elements are not neighbours in the whole
// parameter, or do not share the block's key. `plain_counter`: the first one's, if the block is plain.
template <class P, int kCount>
LOMO_DEVICE bool draw(uint32_t* words, const Shared& shared, uint32_t x, uint32_t plain_counter) {
  constexpr int kWords = kCount / P::kPerHash;
  if (shared.plain) {
    const uint32_t begun = begin_hash(shared.key, plain_counter);
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = word_of<P>(begun ^ w, shared.addend);
    return true;
  }
  const uint64_t first = index_of(shared, x), last = index_of(shared, x + kCount - 1);
  const uint64_t counter = first / P::kPerHash;
  if (last - first != kCount - 1 || counter >> 32 != shared.high || last / P::kPerHash >> 32 != shared.high)
    return false;
  const auto word = [&](int w) {
    return word_of<P>(begin_hash(shared.key, static_cast<uint32_t>(counter) + w), shared.addend);
  };
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = word(w);
  if (first % P::kPerHash) {  // an element then shares its hash with the one before it
    const uint32_t next = word(kWords);
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = words[w] >> 16 | (w + 1 < kWords ? words[w + 1] : next) << 16;
  }
  return true;
}

// Rounds 8 results into 4 words. Nearly always all of them are ordinary, see numerics.h.
template <class P>
LOMO_DEVICE void round_stochastic(uint32_t* words, const float (&x)[8], const uint32_t* random) {
  if (P::all_ordinary(x)) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) words[i / 2] = P::stochastic_pair(x[i], x[i + 1], random + i / P::kPerHash);
    return;
  }
  const auto rounded = [&](int i) {
    const uint32_t word = random[i / P::kPerHash];
    return P::stochastic(x[i], P::kPerHash == 1 ? end_hash(word) : i % 2 ? word >> 16 : word & 0xffffu);
  };
#pragma unroll
  for (int i = 0; i < 8; i += 2) words[i / 2] = rounded(i) | rounded(i + 1) << 16;
}

// An update multiplies clipped gradients by factors F. It has none here; factored_kernel.cu has others.
struct NoFactors {
  static constexpr bool kAny = false;

  template <int kCount>
  struct Share {
    LOMO_DEVICE_MEMBER void load(const NoFactors&, int64_t, uint32_t) {}
    LOMO_DEVICE_MEMBER float times(float g, int) const { return g; }
  };
};

// Which of a thread's gradients are finite, and with factors which of their products.
template <class F>
struct Finite {
  float scaled[kShare], products[F::kAny ? kShare : 1];

  template <class R, class Factors>
  LOMO_DEVICE_MEMBER float updated(float param, float g, const Factors& factors, int i, const Scalars& scalars) {
    scaled[i] = g * scalars.inv_scale;
    const float product = factors.times(clipped(scaled[i], scalars), i);
    if constexpr (F::kAny) products[i] = product;
    return stepped<R>(param, product, scalars);
  }
  LOMO_DEVICE_MEMBER bool all() const {
    return sum_of_magnitudes(scaled) <= kLargest && (!F::kAny || sum_of_magnitudes(products) <= kLargest);
  }
};

// Updates this thread's share of a straight tile. `own`: its element 0, which is the block's element x. Returns false
// and stores nothing if a gradient is not finite, or if neighbours here are not neighbours in the whole parameter.
template <class P, class G, class R, int kCount, bool kStochastic, class F>
LOMO_DEVICE bool update_straight(const Share<P, kCount>& p, const Share<G, kCount>& g,
                                 const typename F::template Share<kCount>& factors, const Scalars& scalars,
                                 const Shared& shared, uint32_t x, typename P::Storage* own) {
  Share<P, kCount> updates;
  Finite<F> finite;
  [[maybe_unused]] const uint32_t counter = shared.counter + x / P::kPerHash;  // once for all of the draws
#pragma unroll
  for (int begin = 0; begin < kShare; begin += 8) {
    [[maybe_unused]] uint32_t random[8 / P::kPerHash];
    if constexpr (kStochastic) {
#pragma unroll
      for (int i = 0; i < 8; i += kCount) {
        const uint32_t past = distance<kCount>(begin + i);
        if (!draw<P, kCount>(random + i / P::kPerHash, shared, x + past, counter + past / P::kPerHash)) return false;
      }
    }
    float results[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      results[i] = finite.template updated<R>(p.get(begin + i), g.get(begin + i), factors, begin + i, scalars);
    }
    uint32_t* words = updates.words + begin / p.kPerWord;
    if constexpr (kStochastic) {
      round_stochastic<P>(words, results, random);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i += p.kPerWord) {
        if constexpr (Share<P, kCount>::kWide) {
          words[i] = P::nearest(results[i]);
        } else {
          words[i / 2] = P::nearest_pair(results[i], results[i + 1]);
        }
      }
    }
  }
  const bool all_finite = finite.all();
  if (all_finite) store_straight(updates, own);
  return all_finite;
}

// The same of a split parameter. `own_low`: where the low part of its element 0 is.
template <class P, class G, class R, int kCount, class F>
LOMO_DEVICE bool update_split_straight(const Share<P, kCount>& p, const Share<P, kCount>& low,
                                       const Share<G, kCount>& g, const typename F::template Share<kCount>& factors,
                                       const Scalars& scalars, typename P::Storage* own, typename P::Storage* own_low) {
  Share<P, kCount> highs, lows;
  Finite<F> finite;
#pragma unroll
  for (int i = 0; i < kShare; i += 2) {
    uint32_t high[2], rest[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float before = joined(p.bits(i + k), low.bits(i + k));
      const float x = finite.template updated<R>(before, g.get(i + k), factors, i + k, scalars);
      high[k] = high_part(x), rest[k] = low_part(x);
    }
    highs.words[i / 2] = high[0] | high[1] << 16;
    lows.words[i / 2] = rest[0] | rest[1] << 16;
  }
  const bool all_finite = finite.all();
  if (all_finite) {
    store_straight(highs, own);
    store_straight(lows, own_low);
  }
  return all_finite;
}

// Updates 4 elements one by one, by the formula. For the ends of a tensor, for what is not aligned or not finite, and
// for the ends of a shard's rows and of counters that share a key. `first`: the block's element 0; `x`: counted from
// there.
template <class P, class G, class R, int kCount, bool kStochastic, class F>
LOMO_DEVICE void update_4(const UpdateEntry& entry, const F& factors, const Scalars& scalars, const Shared& shared,
                          int64_t first, uint32_t x) {
  uint32_t p[4];
  float g[4];
  [[maybe_unused]] uint32_t low[4];
  [[maybe_unused]] auto* lows = reinterpret_cast<typename P::Storage*>(entry.key);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    p[i] = element<P>(entry.param, first + x + i, entry.numel);
    g[i] = G::widen(element<G>(entry.grad, first + x + i, entry.numel));
    if constexpr (kSplits<P>) low[i] = element<P>(lows, first + x + i, entry.numel);
  }
  Scalars applied = scalars;
  if constexpr (F::kAny) {
    factors.multiply(g, first + x, scalars);
    applied.inv_scale = applied.clip_coef = 1.0f;
    applied.clip_value = __builtin_inff();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t random = 0;
    if (kStochastic) {
      const uint64_t index = index_of(shared, x + i), counter = index / P::kPerHash;
      const uint64_t key = counter >> 32 == shared.high ? shared.key : block_key(shared.stream, counter);
      random = random_bits(key, static_cast<uint32_t>(counter));
      if (P::kPerHash == 2) random = index % 2 ? random >> 16 : random & 0xffffu;
    }
    if constexpr (kSplits<P>) {
      update_split<R>(p[i], low[i], g[i], applied);
    } else {
      p[i] = update_element<P, R, kStochastic>(p[i], g[i], applied, random);
    }
    const int64_t at = first + x + i;
    if (at >= 0 && at < entry.numel) {
      static_cast<typename P::Storage*>(entry.param)[at] = static_cast<typename P::Storage>(p[i]);
      if constexpr (kSplits<P>) lows[at] = static_cast<typename P::Storage>(low[i]);
    }
  }
}

// What a block does: updates its tiles.
template <class P, class G, class R, bool kStochastic, class F>
LOMO_DEVICE void update_tiles(const UpdateEntry& entry, int index, const F& factors, const Step& step,
                              const Workspace& workspace) {
  constexpr int kCount = kVector<P, G>;
  __shared__ Shared shared;
  const int64_t block = first_element(entry, first_tile(entry));
  double sum = 0.0;
  uint32_t tile = 0;
  do {
    const uint32_t x = tile * uint32_t{kTile} + own_position<kCount>();  // this thread's element 0, in the block
    const auto* own_g = static_cast<const typename G::Storage*>(entry.grad) + block + x;
    auto* own_p = static_cast<typename P::Storage*>(entry.param) + block + x;
    [[maybe_unused]] auto* own_low = reinterpret_cast<typename P::Storage*>(entry.key) + block + x;
    const bool straight = is_straight(entry, first_tile(entry) + tile);
    Share<P, kCount> p;
    [[maybe_unused]] Share<P, kCount> low;
    Share<G, kCount> g;
    [[maybe_unused]] typename F::template Share<kCount> share_of_factors;
    if (straight) {
      load_straight<Use::again>(g, own_g);  // `once` would leave the parameters in the cache, until the next kernel
      load_straight<Use::again>(p, own_p);
      if constexpr (kSplits<P>) load_straight<Use::again>(low, own_low);
      share_of_factors.load(factors, block, x);
    }
    if (tile == 0) {  // while the first loads are under way
      if (threadIdx.x < kStep) prepare_scalar(shared, step, threadIdx.x);
      if (kStochastic && threadIdx.x == kWarp) prepare_random(shared, entry, step, P::kPerHash);
      __syncthreads();
    }
    const Scalars scalars{shared.scalars[kInvScale], shared.scalars[kClipValue], shared.scalars[kClipCoef],
                          shared.scalars[kWeightDecay], shared.scalars[kLr]};
    if (!F::kAny && entry.slot) {
      if (!straight) load_elements(g, entry.grad, block + x, entry.numel);
      sum += sum_squares<kCount>([&](int i) { return g.get(i) * scalars.inv_scale; });
    }
    if (shared.scalars[kFoundInf] != 0.0f) continue;
    if constexpr (kSplits<P>) {
      if (straight && update_split_straight<P, G, R, kCount, F>(p, low, g, share_of_factors, scalars, own_p, own_low))
        continue;
    } else {
      if (straight &&
          update_straight<P, G, R, kCount, kStochastic, F>(p, g, share_of_factors, scalars, shared, x, own_p))
        continue;
    }
#pragma unroll 1
    for (int i = 0; i < kShare; i += 4) {
      update_4<P, G, R, kCount, kStochastic>(entry, factors, scalars, shared, block, x + distance<kCount>(i));
    }
  } while (++tile < entry.tiles_per_block);
  if (!F::kAny && entry.slot) add_to_slot<kCount>(entry, index, workspace, sum);
}

inline UpdateEntry entry_for(const Parameter& parameter, int64_t seed) {
  UpdateEntry entry;
  // Stores cost more than loads where they are misaligned, so the groups follow the parameter's alignment; but with a
  // norm they follow the elements' numbers, as sq_norm does.
  const uint32_t beyond = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(parameter.data) % 16);
  deal(entry, parameter.grad, parameter.grad.slot ? 0 : beyond / size_of(parameter.dtype));
  if (!is_aligned(parameter.data, parameter.dtype, entry.lead)) entry.straight_end = 0;
  if (parameter.low && !is_aligned(parameter.low, parameter.dtype, entry.lead)) entry.straight_end = 0;
  entry.param = parameter.data;
  entry.key = parameter.low ? reinterpret_cast<uint64_t>(parameter.low) : parameter_key(seed, parameter.parameter_id);
  entry.shard = parameter.shard;
  return entry;
}

}  // namespace
}  // namespace cuda
}  // namespace lomo
