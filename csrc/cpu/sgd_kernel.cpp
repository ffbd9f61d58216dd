// The update on CPU tensors, compiled once per instruction set (LOMO_ISA names it). Plain loops over the formula: the
// compiler vectorises body and tail from one source, so they cannot differ.
#include "kernels.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even element takes the low half of a pair's random bits");

namespace lomo {
namespace {

constexpr int64_t kBlock = 512;  // random bits made at a time: 1 or 2 KiB

// Not std::min: a copy that was not inlined could be merged with another instruction set's.
LOMO_FN int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P, class G>
void update_nearest(void* param, const void* grad, int64_t n, const Scalars& scalars, Stream) {
  auto* __restrict p = static_cast<typename P::Storage*>(param);
  const auto* __restrict g = static_cast<const typename G::Storage*>(grad);
  const Scalars s = scalars;
  for (int64_t i = 0; i < n; ++i) {
    p[i] = static_cast<typename P::Storage>(update_element<P, false>(p[i], G::widen(g[i]), s, 0));
  }
}

void fill_random(uint32_t* __restrict out, int64_t n, uint64_t stream, uint64_t counter) {
  while (n > 0) {
    const uint64_t block = block_key(stream, counter);
    const uint32_t first = static_cast<uint32_t>(counter);
    const int64_t m = min(n, (int64_t{1} << 32) - first);
    for (int64_t i = 0; i < m; ++i) out[i] = random_bits(block, first + static_cast<uint32_t>(i));
    out += m, counter += static_cast<uint64_t>(m), n -= m;
  }
}

// Random bits of n elements from index `first` on. One hash gives 32 bits: two bfloat16 elements or one float16 element.
template <class P>
struct RandomBlock;

template <>
struct RandomBlock<BFloat16> {
  typedef uint16_t __attribute__((may_alias)) Half;
  alignas(64) uint32_t words[kBlock / 2 + 1] = {};
  const Half* fill(uint64_t key, uint64_t first, int64_t n) {
    fill_random(words, static_cast<int64_t>((first + n - 1) / 2 - first / 2) + 1, key, first / 2);
    return reinterpret_cast<const Half*>(words) + first % 2;
  }
};

template <>
struct RandomBlock<Float16> {
  alignas(64) uint32_t words[kBlock] = {};
  const uint32_t* fill(uint64_t key, uint64_t first, int64_t n) {
    fill_random(words, n, key, first);
    return words;
  }
};

template <class P, class G>
void update_stochastic(void* param, const void* grad, int64_t n, const Scalars& scalars, Stream stream) {
  auto* __restrict p = static_cast<typename P::Storage*>(param);
  const auto* __restrict g = static_cast<const typename G::Storage*>(grad);
  const Scalars s = scalars;
  RandomBlock<P> block;
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t m = min(kBlock, n - b);
    const auto* random = block.fill(stream.key, stream.first_index + static_cast<uint64_t>(b), m);
    for (int64_t i = 0; i < m; ++i) {
      p[b + i] = static_cast<typename P::Storage>(update_element<P, true>(p[b + i], G::widen(g[b + i]), s, random[i]));
    }
  }
}

template <class G>
void install_gradient(Kernels& k, DType g) {
  k.update[kFloat32][g][0] = k.update[kFloat32][g][1] = update_nearest<Float32, G>;  // float32 is not rounded
  k.update[kBFloat16][g][0] = update_nearest<BFloat16, G>;
  k.update[kBFloat16][g][1] = update_stochastic<BFloat16, G>;
  k.update[kFloat16][g][0] = update_nearest<Float16, G>;
  k.update[kFloat16][g][1] = update_stochastic<Float16, G>;
}

}  // namespace

namespace LOMO_ISA {
void install_sgd(Kernels& k) {
  install_gradient<Float32>(k, kFloat32);
  install_gradient<BFloat16>(k, kBFloat16);
  install_gradient<Float16>(k, kFloat16);
}
}  // namespace LOMO_ISA

}  // namespace lomo
