// What the kernels of one instruction set offer, and which set is in force. No torch header: the kernel sources are
// compiled once per instruction set and must not share inline functions with anything compiled otherwise.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace lomo {

// Elements are handled in tiles that stay in the first-level cache, so a second look at a gradient is free, and float64
// sums are formed tile by tile, in the same order whatever calls for them.
constexpr int64_t kTile = 4096;

// How a new parameter of 16 bits is stored.
enum Rounding : int { kToNearest, kToRandom, kSplitUp, kRoundings };

// A run of elements whose indices in the whole parameter are consecutive, for stochastic rounding.
struct Stream {
  uint64_t key;          // of (seed, parameter id, step), see numerics.h
  uint64_t first_index;  // index of element 0 of the run in the whole, unsharded parameter
};

// A matrix whose rows are consecutive in memory, `stride` elements from one to the next.
struct Rows {
  const void* data;
  int64_t rows, columns, stride;
};

// Rows are taken in blocks of this many, pair by pair, for sums over the inner products of rows.
constexpr int kGramBlock = 32;

// A product is made in blocks of at most this many rows and columns, from packed factors that stay in the second-level
// cache: steps of tokens, pairs of them for bfloat16 instructions, else single ones. Each is a word for a row or
// column.
constexpr int64_t kProductRows = 256, kProductColumns = 528, kProductDepth = 128;
constexpr int64_t kProductScratch = kProductDepth * (kProductRows + kProductColumns);  // words

// Of A_ij B_ij, and of its error where that of A_ij is some part of |a_i| |a_j| and that of B_ij likewise. In units of
// that part: the variance of errors that know nothing of each other, and the sum of those that may have one sign, for
// the inner products of rows that are copies of one another, or of a row with itself, are rounded in the same way.
struct GramSums {
  double sum, variance, common;
};

// Rows whose columns' squares are added up at a time: each is a stream of memory that the processor reads ahead.
constexpr int kFactorRows = 8;

// Rows of fewer columns are handled many at a time, of several matrices: those of a 3 x 3 convolution have 9 elements.
constexpr int64_t kShortRow = 64;

struct Kernels {
  const char* isa;

  // Sum of float32(grad * inv_scale)^2 over n elements, within 1e-6 of float64; not finite exactly when a term is not.
  double (*sum_squares[kDTypes])(const void* grad, int64_t n, float inv_scale);

  // Adds a row of n <= kTile elements to kTile float32 sums: sums[i] += row[i].
  void (*add_row[kDTypes])(float* sums, const void* row, int64_t n);

  // The update of numerics.h on n elements: [rule][parameter dtype][gradient dtype][rounding]. `low`: of a split
  // bfloat16 parameter. float16 parameters are not split.
  void (*update[Rules::kCount][kDTypes][kDTypes][kRoundings])(void* param, void* low, const void* grad, int64_t n,
                                                              const Scalars& scalars, Stream stream);

  // Factored gradients, see lomo_kernels/ops/factored.py. Adds the squares of a block of clipped rows, at most
  // kFactorRows of them, `stride` elements from one to the next, to the sums of its rows and columns.
  void (*factor_sums[kDTypes])(double* column_sums, double* row_sums, const void* grad, int64_t stride, int64_t rows,
                               int64_t columns, const Scalars& scalars);
  // The same for consecutive rows of fewer than kShortRow columns, any number of them. Each `rows_of_matrix` rows have
  // column sums of their own.
  void (*factor_sums_short[kDTypes])(double* column_sums, double* row_sums, const void* grad, int64_t rows,
                                     int64_t columns, int64_t rows_of_matrix, const Scalars& scalars);
  // out = the factored gradient of consecutive rows. Factors that are null are ones. The first matrix has `rows_left`
  // of these rows, or more than there are. Each further one has `rows_of_matrix`, and column factors of its own.
  void (*factored[kDTypes])(float* out, const void* grad, int64_t rows, int64_t columns, const Scalars& scalars,
                            const float* row_factors, const float* column_factors, int64_t rows_left,
                            int64_t rows_of_matrix);

  // With A = a a^T and B = b b^T: sums over the entries of the block that begins at row i and column j >= i, and of its
  // mirror image. a_lengths, b_lengths: the norms of all rows.
  GramSums (*gram[kDTypes])(const Rows& a, const Rows& b, const double* a_lengths, const double* b_lengths, int64_t i,
                            int64_t j);

  // Rows [row, row + rows) and columns [column, column + columns) of out = a^T b, or out += where `add`. out: `stride`
  // elements from row to row. scratch: kProductScratch words. Not for float32.
  void (*product[kDTypes])(float* out, int64_t stride, const Rows& a, const Rows& b, int64_t row, int64_t rows,
                           int64_t column, int64_t columns, bool add, uint32_t* scratch);
};

// The kernels in force: of LOMO_KERNELS_ISA, else the best the processor has. Throws std::runtime_error where that
// names no instruction set or one the processor lacks.
const Kernels& kernels();

}  // namespace lomo
