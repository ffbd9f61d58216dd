// The numerics contract: what one step does to one element, in plain functions for host and device.
//
// IEEE float32, every operation rounded to nearest even, never contracted into a fused multiply-add (compile with
// -ffp-contract=off, nvcc --fmad=false, and no flush to zero). `lomo_kernels/reference.py` states the same in torch;
// the two agree in every bit, on every backend. No torch header is included here, and everything is static and inlined:
// sources built for different instruction sets include this file, and the linker must never merge their copies.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LOMO_FN static __host__ __device__ __forceinline__
#else
#define LOMO_FN static inline __attribute__((always_inline))
#endif

namespace lomo {
namespace {

LOMO_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

LOMO_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

LOMO_FN bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
LOMO_FN bool is_nan(float x) { return x != x; }

// |x[0]| + |x[1]| + ... If the sum is below a bound, every number is, and none is a NaN. This takes one addition per
// number. The sum may reach the bound although no number does, so the code after such a test must be right either way.
template <int kCount>
LOMO_FN float sum_of_magnitudes(const float (&x)[kCount]) {
  float sum = __builtin_fabsf(x[0]);
  for (int i = 1; i < kCount; ++i) sum += __builtin_fabsf(x[i]);
  return sum;
}

// ---- Element types ----
//
// Memory holds `Storage`; a register holds its bits in the low end of 32; arithmetic is in float32.

struct Float32 {
  using Storage = uint32_t;
  static constexpr int kPerHash = 1;  // elements that share a hash
  LOMO_FN float widen(uint32_t bits) { return float_of(bits); }
  LOMO_FN uint32_t nearest(float x) { return bits_of(x); }
  LOMO_FN uint32_t stochastic(float x, uint32_t /*random*/) { return bits_of(x); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr Storage kInfinity = 0x7f80;  // the least magnitude that is not finite
  static constexpr int kPerHash = 2;
  LOMO_FN float widen(uint32_t bits) { return float_of(bits << 16); }

  // Adding less than one unit of the kept part to the magnitude, then cutting, rounds; a carry is the next exponent. A
  // NaN must be quiet already, as one that arithmetic made is: cutting keeps it a NaN, and a carry could make it zero.
  // kOrdinary: x is no NaN, or one whose low 16 bits are zero, which no carry reaches. Arithmetic on bfloat16 and
  // finite numbers makes no other.
  template <bool kOrdinary = false>
  LOMO_FN uint32_t round(float x, uint32_t bias) {
    return (bits_of(x) + (!kOrdinary && is_nan(x) ? 0u : bias)) >> 16;
  }
  template <bool kOrdinary = false>
  LOMO_FN uint32_t nearest(float x) {
    return round<kOrdinary>(x, 0x7fffu + ((bits_of(x) >> 16) & 1u));
  }

  // `random`: 16 bits. Rounds up with probability (bits cut) / 2^16. Never to infinity where `nearest` stays finite:
  // above the largest finite value, less than half a unit is cut instead.
  template <bool kOrdinary = false>
  LOMO_FN uint32_t stochastic(float x, uint32_t random) {
    return round<kOrdinary>(x, (bits_of(x) & 0x7fff8000u) == 0x7f7f0000u ? 0u : random);
  }

  // Two neighbours at once, the even one in the low half.
  LOMO_FN uint32_t nearest_pair(float even, float odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
    return pair;
#else
    return nearest(even) | nearest(odd) << 16;
#endif
  }

  // Rounds a pair stochastically, if `all_ordinary` is true: no number is a NaN or next to infinity. `random`: one word
  // for the pair.
  // Blackwell's cvt.rs.bf16x2.f32 adds the same random bits in the same places, but exists for the targets sm_100a and
  // sm_103a only, whose code runs on no other GPU: there is no PTX of it for later ones. It is not used.
  LOMO_FN uint32_t stochastic_pair(float even, float odd, const uint32_t* random) {
    return (bits_of(even) + (*random & 0xffffu)) >> 16 | ((bits_of(odd) + (*random >> 16)) & 0xffff0000u);
  }
  template <int kCount>
  LOMO_FN bool all_ordinary(const float (&x)[kCount]) {
    return sum_of_magnitudes(x) < float_of(0x7f7f0000u);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr Storage kInfinity = 0x7c00;
  static constexpr int kPerHash = 1;
  // The GPU's own conversions give the same bits as the formulas (but for which NaN a NaN becomes) in one instruction.
  LOMO_FN float widen(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
#else
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    // Exponent bias 127 - 15 = 112. A subnormal is 2^-14 * (1 + m) - 2^-14: exact, and no float32 subnormal is touched.
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = magnitude + (224u << 23);
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t sign = (bits & 0x8000u) << 16;
    return float_of(sign | (magnitude < (1u << 23) ? subnormal : magnitude >= (31u << 23) ? special : normal));
#endif
  }

  // Sign of x, and a magnitude; NaN becomes quiet.
  LOMO_FN uint32_t assemble(float x, uint32_t magnitude) {
    const uint32_t u = bits_of(x);
    return ((u >> 16) & 0x8000u) | (is_nan(x) ? 0x7e00u | ((u >> 13) & 0x3ffu) : magnitude);
  }

  LOMO_FN uint32_t nearest(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t u = bits_of(x) & 0x7fffffffu;
    const uint32_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    // The last bit of a float32 in [1/2, 1) is 2^-24, as of a subnormal result: the addition rounds it.
    const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = u < (113u << 23) ? subnormal : normal;
    return assemble(x, finite < 0x7c00u ? finite : 0x7c00u);
#endif
  }

  // `random`: 32 bits, of which the top s are used, s being the number of bits cut from the 24 of the significand: 13,
  // more for results below 2^-14. Rounds up with probability (bits cut) / 2^s. Never to infinity where `nearest` stays
  // finite, which is below 65520.
  LOMO_FN uint32_t stochastic(float x, uint32_t random) {
#if defined(__CUDA_ARCH__) || defined(LOMO_EMULATION)  // where a branch costs little and spares the other side
    if (is_ordinary(x)) return stochastic_ordinary(x, random);
#endif
    const uint32_t u = bits_of(x) & 0x7fffffffu;
    const uint32_t s = 126u - (u >> 23);  // of a subnormal result: 14 and more
    const uint32_t m = (u & 0x7fffffu) | 0x800000u;
    const uint32_t cut = s <= 32u ? m << ((32u - s) & 31u) : 0u;  // the fraction cut off, times 2^32
    const uint32_t subnormal = (s < 24u ? m >> (s & 31u) : 0u) + (random > ~cut ? 1u : 0u);
    const uint32_t finite = u < (113u << 23) ? subnormal : stochastic_normal(u, random);
    return assemble(x, finite < 0x7c00u ? finite : u < 0x477ff000u ? 0x7bffu : 0x7c00u);
  }
  LOMO_FN uint32_t stochastic_normal(uint32_t u, uint32_t random) { return (u - (112u << 23) + (random >> 19)) >> 13; }

  // The same for a whole group of elements of which none is subnormal, next to infinity or not finite: few are.
  LOMO_FN bool is_ordinary(float x) { return (bits_of(x) & 0x7fffffffu) - (113u << 23) < 0x477fe000u - (113u << 23); }
  LOMO_FN uint32_t stochastic_ordinary(float x, uint32_t random) {
    const uint32_t u = bits_of(x);
    return ((u >> 16) & 0x8000u) | stochastic_normal(u & 0x7fffffffu, random);
  }

  // Two neighbours at once, the even one in the low half.
  LOMO_FN uint32_t nearest_pair(float even, float odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(odd), "f"(even));
    return pair;
#else
    return nearest(even) | nearest(odd) << 16;
#endif
  }

  // Rounds a pair stochastically, if `all_ordinary` is true: adds random bits below the last bit, then truncates. It
  // reads only the top 13 random bits, which end_hash does not change.
  LOMO_FN uint32_t stochastic_pair(float even, float odd, const uint32_t* random) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const float low = float_of(bits_of(even) + (random[0] >> 19)), high = float_of(bits_of(odd) + (random[1] >> 19));
    uint32_t pair;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return stochastic_ordinary(even, random[0]) | stochastic_ordinary(odd, random[1]) << 16;
#endif
  }
  template <int kCount>
  LOMO_FN bool all_ordinary(const float (&x)[kCount]) {
    bool large_enough = true;
    for (int i = 0; i < kCount; ++i) large_enough = large_enough & (__builtin_fabsf(x[i]) >= 0x1p-14f);
    return large_enough & (sum_of_magnitudes(x) < float_of(0x477fe000u));
  }
};

// ---- Split weights ----
//
// A bfloat16 and a low part of 16 bits that together are a float32: (bits of the bfloat16 << 16) + the low part, a
// signed number, are its bits. The bfloat16 is the nearest one. A tie goes away from zero: then the low part has 16
// bits.

// split() makes no pair of which this is NaN, unless `high` is. Such a pair has a low part that is older than its
// `high`: then it counts as zero.
LOMO_FN float joined(uint32_t high, uint32_t low) {
  const uint32_t bits = (high << 16) + static_cast<uint32_t>(static_cast<int32_t>(low << 16) >> 16);
  return float_of(is_nan(float_of(bits)) ? high << 16 : bits);
}

// kOrdinary: as in BFloat16::round.
template <bool kOrdinary = false>
LOMO_FN uint32_t high_part(float x) {
  return BFloat16::round<kOrdinary>(x, 0x8000u);
}
template <bool kOrdinary = false>
LOMO_FN uint32_t low_part(float x) {
  return !kOrdinary && is_nan(x) ? 0u : bits_of(x) & 0xffffu;
}

// In kernels, the type of a parameter whose low parts lie elsewhere, in the same order.
struct SplitBFloat16 : BFloat16 {
  static constexpr int kPerHash = 1;
};

// ---- Random bits ----
//
// A counter through a hash, so they do not depend on threads, blocks, backends or sharding.

// A bijection of 64 bits (the increment and finaliser of SplitMix64, Steele, Lea and Flood 2014).
LOMO_FN uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Once per parameter, and once more per step.
LOMO_FN uint64_t parameter_key(int64_t seed, int64_t parameter_id) {
  return mix64(mix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(parameter_id));
}
LOMO_FN uint64_t stream_of(uint64_t parameter_key, int64_t step) {
  return mix64(parameter_key ^ static_cast<uint64_t>(step));
}
LOMO_FN uint64_t stream_key(int64_t seed, int64_t parameter_id, int64_t step) {
  return stream_of(parameter_key(seed, parameter_id), step);
}

// Once per 2^32 counters.
LOMO_FN uint64_t block_key(uint64_t stream, uint64_t counter) { return mix64(stream ^ (counter >> 32)); }

// The first part of random_bits, which neighbours share: if the low bits of `counter` are zero,
// begin_hash(block, counter + i) is begin_hash(block, counter) ^ i for i < 128. Words: uint32_t, or a vector of them.
template <class Words>
LOMO_FN Words begin_hash(uint64_t block, Words counter) {
  const Words x = counter ^ static_cast<uint32_t>(block);
  return x ^ (x >> 7) ^ (x >> 16);
}
// The second part. `addend`: addend_of(block). Only the last shift is missing, which changes only the low 17 bits.
constexpr uint32_t kSecondMultiplier = 0xd35a2d97u;
LOMO_FN uint32_t addend_of(uint64_t block) { return static_cast<uint32_t>(block >> 32) * kSecondMultiplier; }
template <class Words>
LOMO_FN Words continue_hash(Words begun, uint32_t addend) {
  const Words x = begun * 0x21f0aaadu;
  return (x ^ (x >> 15)) * kSecondMultiplier + addend;
}
LOMO_FN uint32_t end_hash(uint32_t x) { return x ^ (x >> 15); }

// Once per counter: 32 bits. Two multiply-xorshift rounds with multipliers found by search (github.com/skeeto/
// hash-prospector); the key's halves enter before and between them, so streams are no permutations of each other. The
// first shift is doubled: with >> 16 alone, numbers of counters 2^12 apart were correlated by 0.7%; now none are,
// within 3.5 standard errors at 4 million draws, at lags of powers of two and of usual row lengths.
LOMO_FN uint32_t random_bits(uint64_t block, uint32_t counter) {
  return end_hash(continue_hash(begin_hash(block, counter), addend_of(block)));
}

}  // namespace

// Index of a dtype in tables of kernels.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kDTypes = 3 };

// Where the elements of a local shard stand in the whole parameter: element i at
// offset + i / row_length * row_stride + i % row_length.
struct Shard {
  int64_t offset = 0;
  int64_t row_length = INT64_MAX;
  int64_t row_stride = INT64_MAX;
};

// ---- The update ----

// The order of the vector of scalars, see lomo_kernels/ops/scalars.py. kFoundInf: if it is not zero, parameters are not
// changed. kStep: the bits of an int64.
enum Scalar : int { kLr, kWeightDecay, kInvScale, kClipValue, kClipCoef, kFoundInf, kStep, kScalars };

// What does not change from element to element. A factor that was not given is 1 and a clip value that was not given is
// infinite: both are exact, so the formula has no branches.
struct Scalars {
  float inv_scale = 1.0f;
  float clip_value = __builtin_inff();
  float clip_coef = 1.0f;
  float decay = 1.0f;  // float32(1 - lr * weight_decay), computed in float64
  float lr = 0.0f;
};

namespace {

LOMO_FN int64_t step_of(double bits) {
  int64_t step;
  memcpy(&step, &bits, sizeof step);
  return step;
}

LOMO_FN float decay_of(double lr, double weight_decay) { return static_cast<float>(1.0 - lr * weight_decay); }

template <class Floats>
LOMO_FN Floats splat(float x) {
  if constexpr (sizeof(Floats) > sizeof x) {
    return Floats{} + x;
  } else {
    return x;
  }
}

// Floats: float, or a vector of floats. Compilers do not see that clamping a vector to infinity changes nothing. On a
// GPU a NaN is dropped, whose parameter is kept anyway. limit > 0.
template <class Floats>
LOMO_FN Floats clamped(Floats x, float limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  // The lesser magnitude, and the product of the signs: one instruction instead of two.
  asm("min.xorsign.abs.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
  return x;
#elif defined(__CUDA_ARCH__)
  return fminf(fmaxf(x, -limit), limit);
#elif defined(LOMO_EMULATION)  // as from sm_86 on
  return __builtin_copysignf(__builtin_fminf(__builtin_fabsf(x), limit), x);
#else
  if (sizeof(Floats) > sizeof limit && limit == __builtin_inff()) return x;
  const Floats bound = splat<Floats>(limit);
  x = x < -bound ? -bound : x;
  return x > bound ? bound : x;
#endif
}

// ---- Rules ----
//
// What is done with an element's gradient after it was clipped. Each has
//   direction(g): Floats is float, or a vector of floats
//   kUnbounded: whether the direction of a gradient that is not finite is not finite

struct Sgd {
  static constexpr bool kUnbounded = true;
  template <class Floats>
  LOMO_FN Floats direction(Floats g) {
    return g;
  }
};

// 1, -1, or +0 for zero.
struct Sign {
  static constexpr bool kUnbounded = false;
  template <class Floats>
  LOMO_FN Floats direction(Floats g) {
    const Floats zero = splat<Floats>(0.0f), one = splat<Floats>(1.0f);
    return (g > zero ? one : zero) - (g < zero ? one : zero);
  }
};

template <class... Each>
struct RuleList {
  static constexpr int kCount = sizeof...(Each);

  // Calls run(rule, its number) for each rule.
  template <class Run>
  static void for_each(const Run& run) {
    int number = 0;
    (run(Each{}, number++), ...);
  }

  // Calls run(rule) with the rule of this number.
  template <class Run>
  static void with(int number, const Run& run) {
    for_each([&](auto rule, int i) {
      if (i == number) run(rule);
    });
  }
};

// By number, see lomo_kernels/rules.py.
using Rules = RuleList<Sgd, Sign>;

// ---- The formula ----

template <class Floats>
LOMO_FN Floats clipped(Floats scaled_grad, const Scalars& s) {
  return clamped(scaled_grad, s.clip_value) * s.clip_coef;
}

// The parameter after a step by a clipped gradient, or by a factored one.
template <class R, class Floats>
LOMO_FN Floats stepped(Floats param, Floats g, const Scalars& s) {
  const Floats p = param * s.decay;
  return p - s.lr * R::direction(g);
}

template <class R, class Floats>
LOMO_FN Floats updated(Floats param, Floats scaled_grad, const Scalars& s) {
  return stepped<R>(param, clipped(scaled_grad, s), s);
}

// The gradient times its row's and its column's factor, which are 1 if there are none. NaN if the scaled gradient is
// not finite.
LOMO_FN float factored(float scaled_grad, float row_factor, float column_factor, const Scalars& s) {
  const float f = clipped(scaled_grad, s) * row_factor * column_factor;
  return is_finite(scaled_grad) ? f : __builtin_nanf("");
}

// An element whose scaled gradient is not finite keeps its parameter, with its low part.
template <class P, class R, bool kStochastic>
LOMO_FN uint32_t update_element(uint32_t param, float grad, const Scalars& s, uint32_t random) {
  const float g = grad * s.inv_scale;
  const float p = updated<R>(P::widen(param), g, s);
  const uint32_t rounded = kStochastic ? P::stochastic(p, random) : P::nearest(p);
  return is_finite(g) ? rounded : param;
}

// The same of a split weight. kFinite: as is_finite(grad * s.inv_scale), and all scalars are finite.
template <class R, bool kFinite = false>
LOMO_FN void update_split(uint32_t& param, uint32_t& low, float grad, const Scalars& s) {
  const float g = grad * s.inv_scale;
  const float p = updated<R>(joined(param, low), g, s);
  const bool kept = !kFinite && !is_finite(g);
  param = kept ? param : high_part<kFinite>(p);
  low = kept ? low : low_part<kFinite>(p);
}

}  // namespace
}  // namespace lomo
