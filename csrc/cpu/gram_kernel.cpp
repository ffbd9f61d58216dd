// ||b^T a||^2 from the inner products of the rows of a and of b, block by block, compiled once per instruction set.
// No Gram matrix is written: a block of each stays in the first-level cache until the two are multiplied.
#include "kernels.h"
#include "vectors.h"

namespace lomo {
namespace {

// A register tile: inner products of kI rows with kJ others. The sums and the operands of a step fill the registers.
constexpr int kI = kRegisters == 32 ? 4 : 2, kJ = 4;

// Features that are added up in float32, 64 to a lane; then float64 goes on. So the error is that of short sums however
// long a row is, and the same for every instruction set.
constexpr int64_t kChunk = 64 * kLanes;

static_assert(kGramBlock % kI == 0 && kGramBlock % kJ == 0, "whole register tiles");

typedef double Block[kGramBlock][kGramBlock];

// to[j] += the sum of the lanes of sums[j].
LOMO_FN void add_lanes(double* to, const Vector* sums) {
#if defined(__x86_64__)
  static_assert(kJ == 4, "four sums are transposed");
  __m128 rows[4];
  for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
    const __m512 v = (__m512)sums[j];
    const __m256 half =
        _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, v, 0), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
    rows[j] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    const __m256 v = (__m256)sums[j];
    rows[j] = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
    rows[j] = (__m128)sums[j];
#endif
  }
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  float total[4];
  _mm_storeu_ps(total, _mm_add_ps(_mm_add_ps(rows[0], rows[1]), _mm_add_ps(rows[2], rows[3])));
  for (int j = 0; j < 4; ++j) to[j] += static_cast<double>(total[j]);
#else
  for (int j = 0; j < kJ; ++j) {
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[j][lane];
    to[j] += static_cast<double>(total);
  }
#endif
}

// One step of the register tile.
template <class T>
LOMO_FN void step(Vector (&sums)[kI][kJ], const typename T::Storage* const* a, const typename T::Storage* const* b,
                  int64_t k) {
  Operand<T> left[kI];
#pragma GCC unroll 4
  for (int i = 0; i < kI; ++i) left[i] = load(a[i] + k, T{});
#pragma GCC unroll 4
  for (int j = 0; j < kJ; ++j) {
    const Operand<T> right = load(b[j] + k, T{});
#pragma GCC unroll 4
    for (int i = 0; i < kI; ++i) sums[i][j] = multiply_add(sums[i][j], left[i], right);
  }
}

// The block's entries [0, kI) x [0, kJ) += inner products of n elements.
template <class T>
LOMO_FN void add_tile(double* to, const typename T::Storage* const* a, const typename T::Storage* const* b, int64_t n) {
  using Storage = typename T::Storage;
  constexpr int64_t kStep = Operand<T>::kStep;
  Vector sums[kI][kJ] = {};
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) step<T>(sums, a, b, k);
  if (k < n) {  // the same step on copies, padded with zeros
    Storage padded[kI + kJ][kStep] = {};
    const Storage* rows[kI + kJ];
    for (int r = 0; r < kI + kJ; ++r) {
      const Storage* from = (r < kI ? a[r] : b[r - kI]) + k;
      for (int64_t i = 0; i < n - k; ++i) padded[r][i] = from[i];
      rows[r] = padded[r];
    }
    step<T>(sums, rows, rows + kI, 0);
  }
  for (int i = 0; i < kI; ++i) add_lanes(to + i * kGramBlock, sums[i]);
}

// Inner products of the rows [first_i, first_i + n_i) with [first_j, first_j + n_j), those at or right of the diagonal.
// Register tiles that reach beyond take the last row again; nobody reads what they find.
template <class T>
LOMO_FN void fill(Block& block, const Rows& m, int64_t first_i, int64_t n_i, int64_t first_j, int64_t n_j) {
  using Storage = typename T::Storage;
  const auto row = [&](int64_t first, int64_t i, int64_t n) {
    return static_cast<const Storage*>(m.data) + (first + (i < n ? i : n - 1)) * m.stride;
  };
  for (int64_t k = 0; k < m.columns; k += kChunk) {
    const int64_t n = m.columns - k < kChunk ? m.columns - k : kChunk;
    for (int64_t i = 0; i < n_i; i += kI) {
      const Storage* a[kI];
      for (int r = 0; r < kI; ++r) a[r] = row(first_i, i + r, n_i) + k;
      for (int64_t j = first_i == first_j ? i / kJ * kJ : 0; j < n_j; j += kJ) {
        const Storage* b[kJ];
        for (int r = 0; r < kJ; ++r) b[r] = row(first_j, j + r, n_j) + k;
        add_tile<T>(&block[i][j], a, b, n);
      }
    }
  }
}

// Rows whose cosine is above the root of this are taken for copies of one row.
constexpr double kParallel = 0.999;

template <class T>
GramSums gram(const Rows& a, const Rows& b, const double* a_lengths, const double* b_lengths, int64_t first_i,
              int64_t first_j) {
  const auto at_most_a_block = [](int64_t rows) { return rows < kGramBlock ? rows : int64_t{kGramBlock}; };
  const int64_t n_i = at_most_a_block(a.rows - first_i), n_j = at_most_a_block(a.rows - first_j);
  alignas(64) Block of_a = {}, of_b = {};
  fill<T>(of_a, a, first_i, n_i, first_j, n_j);
  fill<T>(of_b, b, first_i, n_i, first_j, n_j);
  const bool diagonal = first_i == first_j;
  double sums[kGramBlock] = {}, variances[kGramBlock] = {}, common[kGramBlock] = {};
  for (int64_t i = 0; i < n_i; ++i) {
    for (int64_t j = diagonal ? i : 0; j < n_j; ++j) {
      const double weight = diagonal && i == j ? 1.0 : 2.0;  // the other half of the matrix is this one
      const double x = of_a[i][j], x_error = a_lengths[first_i + i] * a_lengths[first_j + j];
      const double y = of_b[i][j], y_error = b_lengths[first_i + i] * b_lengths[first_j + j];
      const double from_x = x_error * y, from_y = y_error * x;
      sums[j] += weight * (x * y);
      variances[j] += weight * weight * (from_x * from_x + from_y * from_y);
      common[j] += weight * (x * x > kParallel * (x_error * x_error) ? __builtin_fabs(from_x) : 0.0);
      common[j] += weight * (y * y > kParallel * (y_error * y_error) ? __builtin_fabs(from_y) : 0.0);
    }
  }
  GramSums result{0.0, 0.0, 0.0};
  for (int64_t j = 0; j < n_j; ++j) {
    result.sum += sums[j], result.variance += variances[j], result.common += common[j];
  }
  return result;
}

}  // namespace

namespace LOMO_ISA {
void install_gram(Kernels& k) {
  k.gram[kFloat32] = gram<Float32>;
  k.gram[kBFloat16] = gram<BFloat16>;
  k.gram[kFloat16] = gram<Float16>;
}
}  // namespace LOMO_ISA

}  // namespace lomo
