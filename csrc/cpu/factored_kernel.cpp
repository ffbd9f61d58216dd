// Factored gradients on CPU tensors, compiled once per instruction set (LOMO_ISA names it): see
// lomo_kernels/ops/factored.py. Plain loops, which the compiler vectorises. The order of the additions is written out,
// so every instruction set gives the same bits.
#include "kernels.h"
#include "widen.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lomo {
namespace {

constexpr int kLanes = 64;              // columns that are handled at a time
constexpr int kSums = 8;                // partial sums of a row
constexpr int64_t kShortBuffer = 1024;  // elements of short rows that are clipped together
static_assert(kShortRow <= kShortBuffer, "a short row fits");

// Whether clipping leaves a gradient as it is. Then its instructions are left out, half of all.
bool is_plain(const Scalars& s) {
  return s.inv_scale == 1.0f && s.clip_value == __builtin_inff() && s.clip_coef == 1.0f;
}

// A number that is not finite becomes NaN, or stays as it is if kPlain.
template <class G, bool kPlain>
LOMO_FN void clip_lanes(const typename G::Storage* __restrict g, float* __restrict to, const Scalars& s) {
  widen<kLanes>(g, to, G{});
  for (int lane = 0; lane < kLanes && !kPlain; ++lane) {
    const float scaled = to[lane] * s.inv_scale;
    const float clipped = clamped(scaled, s.clip_value) * s.clip_coef;
    to[lane] = is_finite(scaled) ? clipped : __builtin_nanf("");
  }
}

// The last columns of a row, padded with zeros.
template <class G, bool kPlain>
LOMO_FN void clip_last(const typename G::Storage* g, int64_t n, float* to, const Scalars& s) {
  typename G::Storage padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = g[i];
  clip_lanes<G, kPlain>(padded, to, s);
}

template <class G, bool kPlain>
void clip_all(const typename G::Storage* g, int64_t n, float* to, const Scalars& s) {
  for (; n >= kLanes; n -= kLanes, g += kLanes, to += kLanes) clip_lanes<G, kPlain>(g, to, s);
  if (!n) return;
  alignas(64) float last[kLanes];
  clip_last<G, kPlain>(g, n, last, s);
  for (int64_t i = 0; i < n; ++i) to[i] = last[i];
}

// Adds squares to the sum of each column, and to the kSums of their row. A float32's square is exact in float64, so a
// fused multiply-add gives the bits of two instructions, in 0.73 of the time (bfloat16, one thread of Zen 4).
LOMO_FN void add_squares_of_lanes(double* __restrict of_columns, double* __restrict of_row, const float* __restrict x) {
#if defined(__AVX512F__)
  __m512d sums = _mm512_loadu_pd(of_row);
  for (int part = 0; part < kLanes; part += kSums) {
    const __m512d wide = _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x + part));  // unmasked, g++ 12 warns in vain
    _mm512_storeu_pd(of_columns + part, _mm512_fmadd_pd(wide, wide, _mm512_loadu_pd(of_columns + part)));
    sums = _mm512_fmadd_pd(wide, wide, sums);
  }
  _mm512_storeu_pd(of_row, sums);
#else
  for (int part = 0; part < kLanes; part += kSums) {
    for (int i = 0; i < kSums; ++i) {
      const double square = static_cast<double>(x[part + i]) * static_cast<double>(x[part + i]);
      of_columns[part + i] += square;
      of_row[i] += square;
    }
  }
#endif
}

// Squares in float64: none overflows, and none is lost.
template <class G, bool kPlain>
void add_squares(double* __restrict column_sums, double* __restrict row_sums, const typename G::Storage* g,
                 int64_t stride, int64_t rows, int64_t columns, const Scalars& s) {
  alignas(64) double of_rows[kFactorRows][kSums] = {};
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t n = columns - column < kLanes ? columns - column : kLanes;
    alignas(64) double of_columns[kLanes] = {};
    for (int64_t row = 0; row < rows; ++row) {
      alignas(64) float x[kLanes];
      const auto* from = g + row * stride + column;
      // The next block of rows: 4096 x 4096 bfloat16 take 3.2 ms, without this 6 (one thread of Zen 4).
      __builtin_prefetch(from + rows * stride);
      __builtin_prefetch(from + rows * stride + kLanes / 2);
      n == kLanes ? clip_lanes<G, kPlain>(from, x, s) : clip_last<G, kPlain>(from, n, x, s);
      add_squares_of_lanes(of_columns, of_rows[row], x);
    }
    for (int64_t i = 0; i < n; ++i) column_sums[column + i] += of_columns[i];
  }
  for (int64_t row = 0; row < rows; ++row) {
    double* sums = of_rows[row];
    for (int width = kSums / 2; width >= 1; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    row_sums[row] += sums[0];
  }
}

template <class G>
void factor_sums(double* column_sums, double* row_sums, const void* grad, int64_t stride, int64_t rows, int64_t columns,
                 const Scalars& s) {
  const auto* g = static_cast<const typename G::Storage*>(grad);
  if (is_plain(s)) return add_squares<G, true>(column_sums, row_sums, g, stride, rows, columns, s);
  add_squares<G, false>(column_sums, row_sums, g, stride, rows, columns, s);
}

// Short rows are clipped together, then added up one after the other. If each row is clipped alone, as kLanes elements,
// the 512 x 512 matrices of a 3 x 3 convolution take 12 ns per element in place of 0.7 (bfloat16, one thread of Zen 4).
template <class G, bool kPlain>
void add_squares_of_short_rows(double* column_sums, double* row_sums, const typename G::Storage* g, int64_t rows,
                               int64_t columns, int64_t rows_of_matrix, const Scalars& s) {
  const int64_t together = kShortBuffer / columns;
  for (int64_t row = 0, of_matrix = 0; row < rows;) {
    const int64_t end = row + together < rows ? row + together : rows;
    alignas(64) float x[kShortBuffer];
    clip_all<G, kPlain>(g + row * columns, (end - row) * columns, x, s);
    for (const float* from = x; row < end; ++row, from += columns) {
      double of_row = 0.0;
      for (int64_t i = 0; i < columns; ++i) {
        const double square = static_cast<double>(from[i]) * static_cast<double>(from[i]);
        column_sums[i] += square;
        of_row += square;
      }
      row_sums[row] += of_row;
      if (++of_matrix == rows_of_matrix) of_matrix = 0, column_sums += columns;
    }
  }
}

template <class G>
void factor_sums_short(double* column_sums, double* row_sums, const void* grad, int64_t rows, int64_t columns,
                       int64_t rows_of_matrix, const Scalars& s) {
  const auto* g = static_cast<const typename G::Storage*>(grad);
  const auto add = is_plain(s) ? add_squares_of_short_rows<G, true> : add_squares_of_short_rows<G, false>;
  add(column_sums, row_sums, g, rows, columns, rows_of_matrix, s);
}

// Not inlined: the compiler forgets `__restrict` of a function that it inlines.
template <class G, bool kPlain, bool kColumns>
__attribute__((noinline)) void factor_row(float* __restrict out, const typename G::Storage* __restrict g, int64_t n,
                                          const Scalars& s, float row_factor, const float* __restrict column_factors) {
  alignas(64) float x[kLanes];
  for (; n >= kLanes; n -= kLanes, g += kLanes, out += kLanes, column_factors += kColumns ? kLanes : 0) {
    clip_lanes<G, kPlain>(g, x, s);
    for (int i = 0; i < kLanes; ++i) out[i] = kColumns ? x[i] * row_factor * column_factors[i] : x[i] * row_factor;
  }
  if (!n) return;
  clip_last<G, kPlain>(g, n, x, s);
  for (int64_t i = 0; i < n; ++i) out[i] = kColumns ? x[i] * row_factor * column_factors[i] : x[i] * row_factor;
}

// Multiplies clipped rows, in place.
void multiply_short_rows(float* out, int64_t rows, int64_t columns, const float* row_factors,
                         const float* column_factors, int64_t rows_left, int64_t rows_of_matrix) {
  for (int64_t row = 0; row < rows; ++row, out += columns) {
    const float row_factor = row_factors ? row_factors[row] : 1.0f;
    if (!column_factors) {
      for (int64_t i = 0; i < columns; ++i) out[i] *= row_factor;
      continue;
    }
    for (int64_t i = 0; i < columns; ++i) out[i] = out[i] * row_factor * column_factors[i];
    if (--rows_left == 0) rows_left = rows_of_matrix, column_factors += columns;
  }
}

template <class G>
void factored(float* out, const void* grad, int64_t rows, int64_t columns, const Scalars& s, const float* row_factors,
              const float* column_factors, int64_t rows_left, int64_t rows_of_matrix) {
  const auto* g = static_cast<const typename G::Storage*>(grad);
  if ((!row_factors && !column_factors) || columns < kShortRow) {
    is_plain(s) ? clip_all<G, true>(g, rows * columns, out, s) : clip_all<G, false>(g, rows * columns, out, s);
    if (!row_factors && !column_factors) return;
    return multiply_short_rows(out, rows, columns, row_factors, column_factors, rows_left, rows_of_matrix);
  }
  const auto row_of = is_plain(s) ? (column_factors ? factor_row<G, true, true> : factor_row<G, true, false>)
                                  : (column_factors ? factor_row<G, false, true> : factor_row<G, false, false>);
  for (int64_t row = 0; row < rows; ++row, out += columns, g += columns) {
    row_of(out, g, columns, s, row_factors ? row_factors[row] : 1.0f, column_factors);
    if (column_factors && --rows_left == 0) rows_left = rows_of_matrix, column_factors += columns;
  }
}

template <class G>
void install(Kernels& k, DType g) {
  k.factor_sums[g] = factor_sums<G>;
  k.factor_sums_short[g] = factor_sums_short<G>;
  k.factored[g] = factored<G>;
}

}  // namespace

namespace LOMO_ISA {
void install_factored(Kernels& k) {
  install<Float32>(k, kFloat32);
  install<BFloat16>(k, kBFloat16);
  install<Float16>(k, kFloat16);
}
}  // namespace LOMO_ISA

}  // namespace lomo
