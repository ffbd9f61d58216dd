// _gram on CPU tensors: ||grad_output^T input||^2 from Gram matrices. Documented in lomo_kernels/tiled.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "kernels.h"
#include "rows.h"

namespace lomo {
namespace {

// Error of an inner product of rows a and b in float32, as a part of |a| |b|. With it the sum's estimate is 3 times the
// error for random bfloat16 rows (their squares' last bits are not random), and no data of tests/test_linear.py has an
// error above 4 estimates; the worst seen was 2.6, for float16 rows of one magnitude.
constexpr double kError = 0x1p-23;

// bfloat16 instructions take numbers below this for zero, as operands and as sums.
constexpr double kLeast = 0x1p-126;

// |row| of each row.
std::vector<double> lengths(const Rows& m, DType dtype) {
  const Kernels& k = kernels();
  const int64_t bytes = dtype == kFloat32 ? 4 : 2;
  std::vector<double> result(m.rows);
  torch::stable::parallel_for(0, m.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* from = static_cast<const char*>(m.data) + row * m.stride * bytes;
      result[row] = std::sqrt(k.sum_squares[dtype](from, m.columns, 1.0f));
    }
  });
  return result;
}

// What sum_ij A_ij B_ij loses to underflow in A, at most: an inner product of a_i and a_j loses columns * kLeast and
// sqrt(columns) * kLeast * (|a_i| + |a_j|), and |B_ij| <= |b_i| |b_j|.
double lost(const std::vector<double>& a, const std::vector<double>& b, int64_t columns) {
  double b_sum = 0.0, ab_sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) b_sum += b[i], ab_sum += a[i] * b[i];
  const double n = static_cast<double>(columns);
  return kLeast * b_sum * (n * b_sum + 2.0 * std::sqrt(n) * ab_sum);
}

Tensor gram(const Tensor& input, const Tensor& grad_output) {
  const char* op = "_gram";
  const DType dtype = dtype_of(input, op, "input");
  const Rows x = rows_of(input, dtype, op, "input"), gy = rows_of(grad_output, dtype, op, "grad_output");
  LOMO_CHECK(x.rows == gy.rows, op, ": input has ", x.rows, " rows, grad_output has ", gy.rows);
  const auto block = kernels().gram[dtype];
  const auto x_lengths = lengths(x, dtype), gy_lengths = lengths(gy, dtype);
  // A part of the sum for each pair of blocks, added up in a fixed order: the same bits for any number of threads.
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t i = 0; i < x.rows; i += kGramBlock) {
    for (int64_t j = i; j < x.rows; j += kGramBlock) pairs.emplace_back(i, j);
  }
  std::vector<GramSums> parts(pairs.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(pairs.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      parts[p] = block(x, gy, x_lengths.data(), gy_lengths.data(), pairs[p].first, pairs[p].second);
    }
  });
  GramSums total{0.0, 0.0, 0.0};
  for (const GramSums& part : parts) {
    total.sum += part.sum, total.variance += part.variance, total.common += part.common;
  }
  Tensor result = torch::stable::new_empty(input, {2}, ScalarType::Double);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  to[0] = total.sum;
  to[1] = kError * (std::sqrt(total.variance) + total.common) + lost(x_lengths, gy_lengths, x.columns) +
          lost(gy_lengths, x_lengths, gy.columns);
  return result;
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) { m.impl("_gram", TORCH_BOX(&lomo::gram)); }
