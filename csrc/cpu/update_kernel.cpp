// The update on CPU tensors, compiled once per instruction set (LOMO_ISA names it). Plain loops over the formula, which
// the compiler vectorises; the ends of a run go through the same loops as its middle, padded, so they cannot differ.
#include <type_traits>

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

// ---- float16 in vectors ----
//
// The processor converts a vector of kLanes neighbours in one instruction. Without such an instruction the code works
// on single numbers, in loops that the compiler vectorises. With NEON an element takes 4 instructions instead of 16
// (to nearest, g++ 12).

// Smallest and largest magnitude for which stochastic_ordinary() is right. Others are subnormal or next to that, next
// to infinity, or not finite: 1 number in 400 of N(0, 0.02). are_ordinary() says whether all of kN results are in
// range.
constexpr int kLeast = 0x0401, kMost = 0x7bfe;

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__)) || defined(__aarch64__)
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class Vector>
LOMO_FN Vector load(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}
template <class Vector>
LOMO_FN void store(void* to, Vector vector) {
  memcpy(to, &vector, sizeof vector);
}

LOMO_FN Floats widen(const uint32_t* from, Float32) { return load<Floats>(from); }
LOMO_FN Floats widen(const uint16_t* from, BFloat16) {
  return reinterpret_cast<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}
#if defined(__AVX512F__)
LOMO_FN Floats widen(const uint16_t* from, Float16) {
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(load<Halves>(from)));
}
template <int kRounding>
LOMO_FN Halves narrowed(Floats x) {
  return reinterpret_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, x, kRounding));
}
#elif defined(__AVX2__)
LOMO_FN Floats widen(const uint16_t* from, Float16) {
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(load<Halves>(from)));
}
template <int kRounding>
LOMO_FN Halves narrowed(Floats x) {
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(x, kRounding));
}
#endif

// stochastic_ordinary() is right if Float16::is_ordinary(x); for other numbers are_ordinary() refuses the result.
#if defined(__aarch64__)
LOMO_FN Floats widen(const uint16_t* from, Float16) {
  return reinterpret_cast<Floats>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
}
LOMO_FN Halves nearest(Floats x) { return reinterpret_cast<Halves>(vcvt_f16_f32(reinterpret_cast<float32x4_t>(x))); }
// The conversion rounds to nearest, so what it would round is cut off before.
LOMO_FN Halves stochastic_ordinary(Floats x, Words random) {
  return nearest(reinterpret_cast<Floats>((reinterpret_cast<Words>(x) + (random >> 19)) & 0xffffe000u));
}
#else
LOMO_FN Halves nearest(Floats x) { return narrowed<_MM_FROUND_TO_NEAREST_INT>(x); }

// The processor rounds toward zero, so nothing becomes infinite.
LOMO_FN Halves stochastic_ordinary(Floats x, Words random) {
  return narrowed<_MM_FROUND_TO_ZERO>(reinterpret_cast<Floats>(reinterpret_cast<Words>(x) + (random >> 19)));
}
#endif

LOMO_FN Halves where_finite(Floats x, Halves then, Halves otherwise) {
  const Halves finite = __builtin_convertvector((reinterpret_cast<Words>(x) & 0x7f800000u) != 0x7f800000u, Halves);
  return (then & finite) | (otherwise & ~finite);
}

LOMO_FN Words counters(uint32_t first) {
  constexpr uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<Words>(kLane) + first;
}
#else
constexpr int kLanes = 1;
typedef float Floats;
typedef uint32_t Words;
typedef uint16_t Halves;

template <class T>
LOMO_FN T load(const T* from) {
  return *from;
}
template <class T>
LOMO_FN Floats widen(const typename T::Storage* from, T) {
  return T::widen(*from);
}
template <class T>
LOMO_FN void store(T* to, T x) {
  *to = x;
}
LOMO_FN Halves nearest(Floats x) { return static_cast<Halves>(Float16::nearest(x)); }
LOMO_FN Halves stochastic_ordinary(Floats x, Words random) {
  return static_cast<Halves>(Float16::is_ordinary(x) ? Float16::stochastic_ordinary(x, random) : 0);
}
LOMO_FN Halves where_finite(Floats x, Halves then, Halves otherwise) { return is_finite(x) ? then : otherwise; }
LOMO_FN Words counters(uint32_t first) { return first; }
#endif

#if defined(__AVX2__) && defined(__F16C__)
template <int kN>
LOMO_FN void copy(const uint16_t* from, uint16_t* to) {
  for (int i = 0; i < kN; i += 16) store(to + i, load<__m256i>(from + i));
}

template <int kN>
LOMO_FN bool are_ordinary(const uint16_t* rounded) {
  __m256i others = _mm256_setzero_si256();
  for (int i = 0; i < kN; i += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded + i));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff));
    const __m256i rank = _mm256_sub_epi16(magnitude, _mm256_set1_epi16(static_cast<int16_t>(kLeast + 0x8000)));
    others = _mm256_or_si256(others, _mm256_cmpgt_epi16(rank, _mm256_set1_epi16(kMost - kLeast - 0x8000)));
  }
  return _mm256_testz_si256(others, others);
}
#else
template <int kN>
LOMO_FN void copy(const uint16_t* __restrict from, uint16_t* __restrict to) {
  for (int i = 0; i < kN; ++i) to[i] = from[i];
}

template <int kN>
LOMO_FN bool are_ordinary(const uint16_t* rounded) {
  uint16_t others = 0;
  for (int i = 0; i < kN; ++i) others |= static_cast<uint16_t>((rounded[i] & 0x7fffu) - kLeast) > kMost - kLeast;
  return !others;
}
#endif

// ---- The update of a group, by the parameter's type ----
//
// kFinite: all its scaled gradients are finite, and the scalars, so that no element has to keep its parameter.

template <class R, bool kFinite, bool kStochastic, class G>
LOMO_FN void update_group(uint32_t* __restrict p, uint16_t*, const typename G::Storage* __restrict g, const Scalars& s,
                          Random, Float32, G) {
  for (int i = 0; i < kGroup; ++i) p[i] = update_element<Float32, R, false>(p[i], G::widen(g[i]), s, 0);
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

template <class R, bool kFinite, bool kStochastic>
LOMO_FN uint32_t update_bfloat16(uint32_t param, float grad, const Scalars& s, uint32_t random) {
  if (!kFinite) return update_element<BFloat16, R, kStochastic>(param, grad, s, random);
  const float p = updated<R>(BFloat16::widen(param), grad * s.inv_scale, s);
  return kStochastic ? BFloat16::stochastic<true>(p, random) : BFloat16::nearest<true>(p);
}

template <class R, bool kFinite, bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* p, uint16_t*, const typename G::Storage* __restrict g, const Scalars& s,
                          Random random, BFloat16, G) {
  Pair* __restrict pairs = reinterpret_cast<Pair*>(p);
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint32_t bits = kStochastic ? random_bits(random.block, random.counter + static_cast<uint32_t>(i)) : 0;
    float g_even, g_odd;
    pair_of(g, i, g_even, g_odd, G{});
    const uint32_t even = update_bfloat16<R, kFinite, kStochastic>(pairs[i] & 0xffffu, g_even, s, bits & 0xffffu);
    const uint32_t odd = update_bfloat16<R, kFinite, kStochastic>(pairs[i] >> 16, g_odd, s, bits >> 16);
    pairs[i] = even | odd << 16;
  }
}

template <class R, bool kFinite, bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* p, uint16_t* low, const typename G::Storage* __restrict g, const Scalars& s, Random,
                          SplitBFloat16, G) {
  Pair* __restrict pairs = reinterpret_cast<Pair*>(p);
  Pair* __restrict low_pairs = reinterpret_cast<Pair*>(low);
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int i = 0; i < kGroup / 2; ++i) {
    float g_even, g_odd;
    pair_of(g, i, g_even, g_odd, G{});
    uint32_t even = pairs[i] & 0xffffu, odd = pairs[i] >> 16;
    uint32_t low_even = low_pairs[i] & 0xffffu, low_odd = low_pairs[i] >> 16;
    update_split<R, kFinite>(even, low_even, g_even, s);
    update_split<R, kFinite>(odd, low_odd, g_odd, s);
    pairs[i] = even | odd << 16;
    low_pairs[i] = low_even | low_odd << 16;
  }
}

// Updates a group with numbers that are not ordinary: the parts that hold one, by the whole formula.
template <class R, class G>
__attribute__((noinline)) void update_others(uint16_t* __restrict p, const typename G::Storage* __restrict g,
                                             const Scalars& s, Random random, const uint16_t* __restrict rounded) {
  constexpr int kPart = kLanes > 1 ? 16 : kGroup;
  for (int part = 0; part < kGroup; part += kPart) {
    if (are_ordinary<kPart>(rounded + part)) {
      copy<kPart>(rounded + part, p + part);
      continue;
    }
    alignas(64) float scaled[kPart], x[kPart];
    for (int i = 0; i < kPart; i += kLanes) {
      const Floats scaled_grad = widen(g + part + i, G{}) * s.inv_scale;
      store(scaled + i, scaled_grad);
      store(x + i, updated<R>(widen(p + part + i, Float16{}), scaled_grad, s));
    }
#pragma GCC unroll 1  // otherwise the compiler unrolls the loop and then cannot vectorise it
    for (int i = 0; i < kPart; ++i) {
      const uint32_t bits = random_bits(random.block, random.counter + static_cast<uint32_t>(part + i));
      const uint32_t new_p = Float16::stochastic(x[i], bits);
      p[part + i] = is_finite(scaled[i]) ? static_cast<uint16_t>(new_p) : p[part + i];
    }
  }
}

template <class R, bool kFinite, bool kStochastic, class G>
LOMO_FN void update_group(uint16_t* __restrict p, uint16_t*, const typename G::Storage* __restrict g, const Scalars& s,
                          Random random, Float16, G) {
  alignas(64) uint16_t rounded[kGroup];
  Words counter = counters(random.counter);
  const uint32_t addend = addend_of(random.block);
  for (int i = 0; i < kGroup; i += kLanes, counter += kLanes) {
    const Floats scaled = widen(g + i, G{}) * s.inv_scale;
    const Floats x = updated<R>(widen(p + i, Float16{}), scaled, s);
    Halves result =
        kStochastic ? stochastic_ordinary(x, continue_hash(begin_hash(random.block, counter), addend)) : nearest(x);
    // If a parameter is kept, the 0 here sends the group to update_others().
    if (!kFinite) result = where_finite(scaled, result, kStochastic ? Halves{} : load<Halves>(p + i));
    store((kStochastic ? rounded : p) + i, result);
  }
  if (!kStochastic) return;
  if (!are_ordinary<kGroup>(rounded)) return update_others<R, G>(p, g, s, random, rounded);
  copy<kGroup>(rounded, p);
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
template <class P, class G, class R, bool kStochastic>
__attribute__((noinline)) void update_part(typename P::Storage* p, uint16_t* low, const typename G::Storage* g,
                                           int64_t place, int64_t n, const Scalars& s, Random random) {
  constexpr bool kSplits = std::is_same_v<P, SplitBFloat16>;
  typename P::Storage p_group[kGroup] = {};
  uint16_t low_group[kSplits ? kGroup : 1] = {};
  typename G::Storage g_group[kGroup] = {};
  for (int64_t i = 0; i < n; ++i) p_group[place + i] = p[i], g_group[place + i] = g[i];
  for (int64_t i = 0; kSplits && i < n; ++i) low_group[place + i] = low[i];
  update_group<R, false, kStochastic>(p_group, low_group, g_group, s, random, P{}, G{});
  for (int64_t i = 0; i < n; ++i) p[i] = p_group[place + i];
  for (int64_t i = 0; kSplits && i < n; ++i) low[i] = low_group[place + i];
}

template <class P, class G, class R, bool kStochastic>
LOMO_FN void update_run(typename P::Storage* p, uint16_t* low, const typename G::Storage* g, int64_t n,
                        const Scalars& s, Stream stream) {
  const auto low_at = [&](int64_t i) { return std::is_same_v<P, SplitBFloat16> ? low + i : nullptr; };
  // A float32 update waits for memory, whatever it computes.
  const bool look = sizeof(typename P::Storage) == 2 && is_finite(s.lr) && is_finite(s.clip_coef) &&
                    is_finite(s.decay) && s.inv_scale <= 1.0f && s.inv_scale >= -1.0f;
  // The stochastic rounding of float16 checks every result. The result of a gradient that is not finite is not
  // ordinary, unless the gradient was clamped, or its direction is finite.
  const bool seen = std::is_same_v<P, Float16> && kStochastic && R::kUnbounded && s.clip_value == __builtin_inff();
  const uint64_t counter = stream.first_index / P::kPerHash;
  Random random{kStochastic ? block_key(stream.key, counter) : 0, static_cast<uint32_t>(counter)};
  int64_t i = 0;
  if (const int64_t place = static_cast<int64_t>(stream.first_index % P::kPerHash); place) {
    i = n < kGroup - place ? n : kGroup - place;
    update_part<P, G, R, kStochastic>(p, low, g, place, i, s, random);
    random.counter += kGroup / P::kPerHash;
  }
  for (; i + kGroup <= n; i += kGroup) {
    if (seen || (look && all_finite<G>(g + i))) {
      update_group<R, true, kStochastic>(p + i, low_at(i), g + i, s, random, P{}, G{});
    } else {
      update_group<R, false, kStochastic>(p + i, low_at(i), g + i, s, random, P{}, G{});
    }
    random.counter += kGroup / P::kPerHash;
  }
  if (i < n) update_part<P, G, R, kStochastic>(p + i, low_at(i), g + i, 0, n - i, s, random);
}

// One key of random bits serves 2^32 counters.
template <class P, class G, class R, bool kStochastic>
LOMO_FN void update_runs(void* param, void* low_parts, const void* grad, int64_t n, const Scalars& s, Stream stream) {
  constexpr uint64_t kPerKey = uint64_t{P::kPerHash} << 32;
  auto* p = static_cast<typename P::Storage*>(param);
  auto* low = static_cast<uint16_t*>(low_parts);
  const auto* g = static_cast<const typename G::Storage*>(grad);
  for (int64_t i = 0, m; i < n; i += m) {
    const uint64_t left = kPerKey - stream.first_index % kPerKey;
    m = left < static_cast<uint64_t>(n - i) ? static_cast<int64_t>(left) : n - i;
    update_run<P, G, R, kStochastic>(p + i, std::is_same_v<P, SplitBFloat16> ? low + i : nullptr, g + i, m, s, stream);
    stream.first_index += static_cast<uint64_t>(m);
  }
}

// Scalars that are neutral here are known to the compiler, which leaves out their instructions.
template <class P, class G, class R, bool kStochastic>
void update(void* param, void* low, const void* grad, int64_t n, const Scalars& given, Stream stream) {
  Scalars s = given;
  if (s.inv_scale != 1.0f || s.clip_value != __builtin_inff()) {
    update_runs<P, G, R, kStochastic>(param, low, grad, n, s, stream);
    return;
  }
  s.inv_scale = 1.0f, s.clip_value = __builtin_inff();
  if (s.clip_coef != 1.0f || s.decay != 1.0f) {
    update_runs<P, G, R, kStochastic>(param, low, grad, n, s, stream);
    return;
  }
  s.clip_coef = 1.0f, s.decay = 1.0f;
  update_runs<P, G, R, kStochastic>(param, low, grad, n, s, stream);
}

template <class G, class R>
void install(Kernels& k, DType g, int rule) {
  auto& update_of = k.update[rule];
  for (auto& update_float32 : update_of[kFloat32][g]) update_float32 = update<Float32, G, R, false>;  // not rounded
  update_of[kBFloat16][g][kToNearest] = update<BFloat16, G, R, false>;
  update_of[kBFloat16][g][kToRandom] = update<BFloat16, G, R, true>;
  update_of[kBFloat16][g][kSplitUp] = update<SplitBFloat16, G, R, false>;
  update_of[kFloat16][g][kToNearest] = update<Float16, G, R, false>;
  update_of[kFloat16][g][kToRandom] = update<Float16, G, R, true>;
}

}  // namespace

namespace LOMO_ISA {
void install_update(Kernels& k) {
  Rules::for_each([&](auto rule, int number) {
    install<Float32, decltype(rule)>(k, kFloat32, number);
    install<BFloat16, decltype(rule)>(k, kBFloat16, number);
    install<Float16, decltype(rule)>(k, kFloat16, number);
  });
}
}  // namespace LOMO_ISA

}  // namespace lomo
