// Vectors of float32 and the operands of inner products, for the kernels of products. Included once per instruction
// set.
//
// These kernels are compiled with fused multiply-adds: a product's bits are not part of the contract.
#pragma once

#include "widen.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lomo {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float LooseVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t LooseWords __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

LOMO_FN Vector load_vector(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
LOMO_FN void store_vector(float* to, Vector v) { *reinterpret_cast<LooseVector*>(to) = v; }

// kStep consecutive elements of one row, as `multiply_add` wants them: it adds their products, lane by lane.
template <class T>
struct Operand {
  static constexpr int kStep = kLanes;
  Vector values;
};

LOMO_FN Operand<Float32> load(const uint32_t* from, Float32) {
  return {reinterpret_cast<Vector>(*reinterpret_cast<const LooseWords*>(from))};
}

LOMO_FN Operand<Float16> load(const uint16_t* from, Float16) {
#if defined(__AVX512F__)
  return {_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
#else
  float wide[kLanes];
  widen<kLanes>(from, wide, Float16{});
  return {load_vector(wide)};
#endif
}

template <class T>
LOMO_FN Vector multiply_add(Vector sum, const Operand<T>& a, const Operand<T>& b) {
  return sum + a.values * b.values;
}

// bfloat16 comes in pairs, one in each half of a word.
#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  static constexpr int kStep = 2 * kLanes;
  Words pairs;
};

LOMO_FN Operand<BFloat16> load(const uint16_t* from, BFloat16) { return {*reinterpret_cast<const LooseWords*>(from)}; }

// Two fused multiply-adds a lane, in the time of one: 105e9 products a second on one thread of Zen 4. Subnormal
// operands count as zero, and subnormal sums become zero.
LOMO_FN Vector multiply_add(Vector sum, const Operand<BFloat16>& a, const Operand<BFloat16>& b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a.pairs, (__m512bh)b.pairs);
}
#else
template <>
struct Operand<BFloat16> {
  static constexpr int kStep = 2 * kLanes;
  Vector even, odd;
};

LOMO_FN Operand<BFloat16> load(const uint16_t* from, BFloat16) {
  const Words pairs = *reinterpret_cast<const LooseWords*>(from);
  return {reinterpret_cast<Vector>(pairs << 16), reinterpret_cast<Vector>(pairs & 0xffff0000u)};
}

LOMO_FN Vector multiply_add(Vector sum, const Operand<BFloat16>& a, const Operand<BFloat16>& b) {
  sum = sum + a.even * b.even;
  return sum + a.odd * b.odd;
}
#endif

}  // namespace
}  // namespace lomo
