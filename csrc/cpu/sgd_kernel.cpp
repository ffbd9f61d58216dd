// The update on CPU tensors, compiled once per instruction set (LOMO_ISA names it). Plain loops over the formula, which
// the compiler vectorises; the ends of a run go through the same loops as its middle, padded, so they cannot differ.
#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even element of a pair has the low half of its word");

namespace lomo {
namespace {

constexpr int kGroup = 64;  // elements updated at a time

// Where a group's random bits come from; see numerics.h.
struct Random {
  uint64_t block;
  uint32_t counter;  // of its first hash
};

// ---- Groups in float32.
// ------------------------------------------------------------------------------------------------ The processor's
// conversions of float16 give the same bits as the formula, except that widening makes a signalling NaN quiet, as the
// arithmetic that follows would. 4096 x 4096 elements from memory: 6.4 ms instead of 18.0 with AVX-512.

LOMO_FN void widen(const uint16_t* __restrict from, float* __restrict to, BFloat16) {
  for (int i = 0; i < kGroup; ++i) to[i] = BFloat16::widen(from[i]);
}

LOMO_FN void widen(const uint32_t* __restrict from, float* __restrict to, Float32) {
  for (int i = 0; i < kGroup; ++i) to[i] = Float32::widen(from[i]);
}

LOMO_FN void widen(const uint16_t* __restrict from, float* __restrict to, Float16) {
#if defined(__AVX512F__)
  for (int i = 0; i < kGroup; i += 16) {
    _mm512_storeu_ps(to + i,
                     _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
#elif defined(__F16C__)
  for (int i = 0; i < kGroup; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#else
  for (int i = 0; i < kGroup; ++i) to[i] = Float16::widen(from[i]);
#endif
}

LOMO_FN void nearest(const float* __restrict from, uint16_t* __restrict to) {
#if defined(__AVX512F__)
  for (int i = 0; i < kGroup; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i), 0));
  }
#elif defined(__F16C__)
  for (int i = 0; i < kGroup; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#else
  for (int i = 0; i < kGroup; ++i) to[i] = static_cast<uint16_t>(Float16::nearest(from[i]));
#endif
}

// ---- The update of a group, by the parameter's type.
// -------------------------------------------------------------------

template <bool kStochastic, class G>
LOMO_FN void update_group(uint32_t* __restrict p, const typename G::Storage* __restrict g, const Scalars& s, Random,
                          Float32, G) {
  for (int i = 0; i < kGroup; ++i) p[i] = update_element<Float32, false>(p[i], G::widen(g[i]), s, 0);
}

// Two neighbours in one word, the even one in its low half: 32-bit arithmetic then needs no other width, and one hash
// serves both.
typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;

LOMO_FN void pair_of(const uint16_t* g, int i, float& even, float& odd, BFloat16) {
  const uint32_t pair = reinterpret_cast<const Pair*>(g)[i];
  even = BFloat16::widen(pair & 0xffffu), odd = BFloat16::widen(pair >> 16);
}
template <class G>
LOMO_FN void pair_of(const typename G::Storage* g, int i, float& even, float& odd, G) {
  even = G::widen(g[2 * i]), odd = G::widen(g[2 * i + 1]);
}

template <bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* p, const typename G::Storage* __restrict g, const Scalars& s, Random random,
                          BFloat16, G) {
  Pair* __restrict pairs = reinterpret_cast<Pair*>(p);
#pragma GCC ivdep
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint32_t bits = kStochastic ? random_bits(random.block, random.counter + static_cast<uint32_t>(i)) : 0;
    float g_even, g_odd;
    pair_of(g, i, g_even, g_odd, G{});
    const uint32_t even = update_element<BFloat16, kStochastic>(pairs[i] & 0xffffu, g_even, s, bits & 0xffffu);
    const uint32_t odd = update_element<BFloat16, kStochastic>(pairs[i] >> 16, g_odd, s, bits >> 16);
    pairs[i] = even | odd << 16;
  }
}

template <bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* __restrict p, const typename G::Storage* __restrict g, const Scalars& s,
                          Random random, Float16, G) {
  alignas(64) float new_p[kGroup], scaled[kGroup];
  alignas(64) uint16_t rounded[kGroup];
  widen(p, new_p, Float16{});
  widen(g, scaled, G{});
  for (int i = 0; i < kGroup; ++i) {
    scaled[i] = scaled[i] * s.inv_scale;
    new_p[i] = updated(new_p[i], scaled[i], s);
  }
  if (kStochastic) {
    alignas(64) uint32_t bits[kGroup];
    uint32_t others = 0;
    for (int i = 0; i < kGroup; ++i) {
      bits[i] = random_bits(random.block, random.counter + static_cast<uint32_t>(i));
      others |= !Float16::is_ordinary(new_p[i]);
    }
    if (others) {
      for (int i = 0; i < kGroup; ++i) rounded[i] = static_cast<uint16_t>(Float16::stochastic(new_p[i], bits[i]));
    } else {
      for (int i = 0; i < kGroup; ++i)
        rounded[i] = static_cast<uint16_t>(Float16::stochastic_ordinary(new_p[i], bits[i]));
    }
  } else {
    nearest(new_p, rounded);
  }
  for (int i = 0; i < kGroup; ++i) p[i] = is_finite(scaled[i]) ? rounded[i] : p[i];
}

// ---- Runs.
// -------------------------------------------------------------------------------------------------------------

template <class P>
constexpr int kPerHash = 1;  // elements that share a hash
template <>
constexpr int kPerHash<BFloat16> = 2;

// Asks for the cache lines of `bytes` bytes, or for one in every page of them.
template <int64_t kStep>
LOMO_FN void prefetch(const void* data, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kStep) __builtin_prefetch(static_cast<const char*>(data) + b);
}

// Fewer elements than a group, padded with zeros: element 0 stands at `place` of the group.
template <class P, class G, bool kStochastic>
__attribute__((noinline)) void update_part(typename P::Storage* p, const typename G::Storage* g, int64_t place,
                                           int64_t n, const Scalars& s, Random random) {
  typename P::Storage p_group[kGroup] = {};
  typename G::Storage g_group[kGroup] = {};
  for (int64_t i = 0; i < n; ++i) p_group[place + i] = p[i], g_group[place + i] = g[i];
  update_group<kStochastic>(p_group, g_group, s, random, P{}, G{});
  for (int64_t i = 0; i < n; ++i) p[i] = p_group[place + i];
}

template <class P, class G, bool kStochastic>
LOMO_FN void update_run(typename P::Storage* p, const typename G::Storage* g, int64_t n, const Scalars& s,
                        Stream stream) {
  const int64_t p_bytes = n * static_cast<int64_t>(sizeof *p), g_bytes = n * static_cast<int64_t>(sizeof *g);
  const int64_t ahead = n == kTile ? 2048 : 0;
  if (n == kTile) prefetch<4096>(p + n, p_bytes), prefetch<4096>(g + n, g_bytes);
  uint64_t counter = stream.first_index / kPerHash<P>;
  Random random{kStochastic ? block_key(stream.key, counter) : 0, static_cast<uint32_t>(counter)};
  int64_t i = 0;
  if (const int64_t place = static_cast<int64_t>(stream.first_index % kPerHash<P>); place) {
    i = n < kGroup - place ? n : kGroup - place;
    update_part<P, G, kStochastic>(p, g, place, i, s, random);
    random.counter += kGroup / kPerHash<P>;
  }
  for (; i + kGroup <= n; i += kGroup) {
    prefetch<64>(reinterpret_cast<const char*>(g + i) + ahead, kGroup * sizeof *g);
    prefetch<64>(reinterpret_cast<const char*>(p + i) + ahead, kGroup * sizeof *p);
    update_group<kStochastic>(p + i, g + i, s, random, P{}, G{});
    random.counter += kGroup / kPerHash<P>;
  }
  if (i < n) update_part<P, G, kStochastic>(p + i, g + i, 0, n - i, s, random);
}

template <class P, class G, bool kStochastic>
void update(void* param, const void* grad, int64_t n, const Scalars& scalars, Stream stream) {
  constexpr uint64_t kPerKey = uint64_t{kPerHash<P>} << 32;  // one key serves 2^32 counters
  auto* p = static_cast<typename P::Storage*>(param);
  const auto* g = static_cast<const typename G::Storage*>(grad);
  Scalars s = scalars;
  const bool plain = s.inv_scale == 1.0f && s.clip_value == __builtin_inff();
  for (int64_t i = 0, m; i < n; i += m) {
    const uint64_t left = kPerKey - stream.first_index % kPerKey;
    m = left < static_cast<uint64_t>(n - i) ? static_cast<int64_t>(left) : n - i;
    if (plain) {  // known to the compiler, which leaves out their instructions
      s.inv_scale = 1.0f, s.clip_value = __builtin_inff();
      update_run<P, G, kStochastic>(p + i, g + i, m, s, stream);
    } else {
      update_run<P, G, kStochastic>(p + i, g + i, m, s, stream);
    }
    stream.first_index += static_cast<uint64_t>(m);
  }
}

template <class G>
void install_gradient(Kernels& k, DType g) {
  k.update[kFloat32][g][0] = k.update[kFloat32][g][1] = update<Float32, G, false>;  // float32 is not rounded
  k.update[kBFloat16][g][0] = update<BFloat16, G, false>;
  k.update[kBFloat16][g][1] = update<BFloat16, G, true>;
  k.update[kFloat16][g][0] = update<Float16, G, false>;
  k.update[kFloat16][g][1] = update<Float16, G, true>;
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
