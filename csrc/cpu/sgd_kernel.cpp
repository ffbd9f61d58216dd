// The update on CPU tensors, compiled once per instruction set (LOMO_ISA names it). Plain loops over the formula, which
// the compiler vectorises; the ends of a run go through the same loops as its middle, padded, so they cannot differ.
#include "kernels.h"
#include "widen.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even element of a pair has the low half of its word");

namespace lomo {
namespace {

constexpr int kGroup = 64;  // elements updated at a time

// Where a group's random bits come from; see numerics.h.
struct Random {
  uint64_t block;
  uint32_t counter;  // of its first hash
};

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

// ---- The update of a group, by the parameter's type ----
//
// kFinite: all its scaled gradients are finite, and the scalars, so that no element has to keep its parameter.

template <bool kFinite, bool kStochastic, class G>
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

template <bool kFinite, bool kStochastic>
LOMO_FN uint32_t update_bfloat16(uint32_t param, float grad, const Scalars& s, uint32_t random) {
  if (!kFinite) return update_element<BFloat16, kStochastic>(param, grad, s, random);
  const float p = updated(BFloat16::widen(param), grad * s.inv_scale, s);
  return kStochastic ? BFloat16::stochastic<true>(p, random) : BFloat16::nearest<true>(p);
}

template <bool kFinite, bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* p, const typename G::Storage* __restrict g, const Scalars& s, Random random,
                          BFloat16, G) {
  Pair* __restrict pairs = reinterpret_cast<Pair*>(p);
#pragma GCC ivdep
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint32_t bits = kStochastic ? random_bits(random.block, random.counter + static_cast<uint32_t>(i)) : 0;
    float g_even, g_odd;
    pair_of(g, i, g_even, g_odd, G{});
    const uint32_t even = update_bfloat16<kFinite, kStochastic>(pairs[i] & 0xffffu, g_even, s, bits & 0xffffu);
    const uint32_t odd = update_bfloat16<kFinite, kStochastic>(pairs[i] >> 16, g_odd, s, bits >> 16);
    pairs[i] = even | odd << 16;
  }
}

template <bool kFinite, bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* __restrict p, const typename G::Storage* __restrict g, const Scalars& s,
                          Random random, Float16, G) {
  alignas(64) float new_p[kGroup], scaled[kGroup];
  alignas(64) uint16_t rounded[kGroup];
  widen<kGroup>(p, new_p, Float16{});
  widen<kGroup>(g, scaled, G{});
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
  for (int i = 0; i < kGroup; ++i) p[i] = kFinite || is_finite(scaled[i]) ? rounded[i] : p[i];
}

// ---- Runs ----

// Whether a group's gradients are finite: then their products with a factor of at most 1 are. For 16 bits this takes
// four instructions a vector less than to find it out in the update, of which arithmetic is two thirds of the time
// (bfloat16 from memory, Zen 4).
template <class G>
LOMO_FN bool all_finite(const uint16_t* g) {
  constexpr uint16_t kMagnitude = 0x7fff, kLargest = G::kInfinity - 1;
#if defined(__AVX512BW__)
  const auto larger = [&](int i) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(g + i), _mm512_set1_epi16(kMagnitude));
    return _mm512_cmpgt_epu16_mask(magnitude, _mm512_set1_epi16(kLargest));
  };
  return !(larger(0) | larger(32));
#elif defined(__AVX2__)
  const auto larger = [&](int i) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(g + i));
    return _mm256_cmpgt_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(kMagnitude)), _mm256_set1_epi16(kLargest));
  };
  const __m256i any = _mm256_or_si256(_mm256_or_si256(larger(0), larger(16)), _mm256_or_si256(larger(32), larger(48)));
  return _mm256_testz_si256(any, any);
#else
  uint16_t any = 0;
  for (int i = 0; i < kGroup; ++i) any |= (g[i] & kMagnitude) > kLargest;
  return !any;
#endif
}
template <class G>
LOMO_FN bool all_finite(const uint32_t*) {
  return false;  // not known
}

// Fewer elements than a group, padded with zeros: element 0 stands at `place` of the group.
template <class P, class G, bool kStochastic>
__attribute__((noinline)) void update_part(typename P::Storage* p, const typename G::Storage* g, int64_t place,
                                           int64_t n, const Scalars& s, Random random) {
  typename P::Storage p_group[kGroup] = {};
  typename G::Storage g_group[kGroup] = {};
  for (int64_t i = 0; i < n; ++i) p_group[place + i] = p[i], g_group[place + i] = g[i];
  update_group<false, kStochastic>(p_group, g_group, s, random, P{}, G{});
  for (int64_t i = 0; i < n; ++i) p[i] = p_group[place + i];
}

template <class P, class G, bool kStochastic>
LOMO_FN void update_run(typename P::Storage* p, const typename G::Storage* g, int64_t n, const Scalars& s,
                        Stream stream) {
  // A float32 update waits for memory, whatever it computes.
  const bool look = sizeof(typename P::Storage) == 2 && is_finite(s.lr) && is_finite(s.clip_coef) &&
                    is_finite(s.decay) && s.inv_scale <= 1.0f && s.inv_scale >= -1.0f;
  const uint64_t counter = stream.first_index / P::kPerHash;
  Random random{kStochastic ? block_key(stream.key, counter) : 0, static_cast<uint32_t>(counter)};
  int64_t i = 0;
  if (const int64_t place = static_cast<int64_t>(stream.first_index % P::kPerHash); place) {
    i = n < kGroup - place ? n : kGroup - place;
    update_part<P, G, kStochastic>(p, g, place, i, s, random);
    random.counter += kGroup / P::kPerHash;
  }
  for (; i + kGroup <= n; i += kGroup) {
    if (look && all_finite<G>(g + i)) {
      update_group<true, kStochastic>(p + i, g + i, s, random, P{}, G{});
    } else {
      update_group<false, kStochastic>(p + i, g + i, s, random, P{}, G{});
    }
    random.counter += kGroup / P::kPerHash;
  }
  if (i < n) update_part<P, G, kStochastic>(p + i, g + i, 0, n - i, s, random);
}

// One key of random bits serves 2^32 counters.
template <class P, class G, bool kStochastic>
LOMO_FN void update_runs(void* param, const void* grad, int64_t n, const Scalars& s, Stream stream) {
  constexpr uint64_t kPerKey = uint64_t{P::kPerHash} << 32;
  auto* p = static_cast<typename P::Storage*>(param);
  const auto* g = static_cast<const typename G::Storage*>(grad);
  for (int64_t i = 0, m; i < n; i += m) {
    const uint64_t left = kPerKey - stream.first_index % kPerKey;
    m = left < static_cast<uint64_t>(n - i) ? static_cast<int64_t>(left) : n - i;
    update_run<P, G, kStochastic>(p + i, g + i, m, s, stream);
    stream.first_index += static_cast<uint64_t>(m);
  }
}

// Scalars that are neutral here are known to the compiler, which leaves out their instructions.
template <class P, class G, bool kStochastic>
void update(void* param, const void* grad, int64_t n, const Scalars& given, Stream stream) {
  Scalars s = given;
  if (s.inv_scale != 1.0f || s.clip_value != __builtin_inff()) {
    update_runs<P, G, kStochastic>(param, grad, n, s, stream);
    return;
  }
  s.inv_scale = 1.0f, s.clip_value = __builtin_inff();
  if (s.clip_coef != 1.0f || s.decay != 1.0f) {
    update_runs<P, G, kStochastic>(param, grad, n, s, stream);
    return;
  }
  s.clip_coef = 1.0f, s.decay = 1.0f;
  update_runs<P, G, kStochastic>(param, grad, n, s, stream);
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
