// factor_sums_, factored_sq_norm_ and factored_update_ on CPU tensors. What they do is documented in
// lomo_kernels/ops/factored.py.
#include <torch/csrc/stable/library.h>

#include <numeric>

#include "../matrices.h"
#include "step.h"

namespace lomo {
namespace {

// Gradient, parameter, factors and product of a piece stay in the first-level cache together.
constexpr int64_t kPiece = 1024;

// Elements [row * columns + column, ... + rows * columns_of_piece): whole rows, or a part of one row.
struct Piece {
  int64_t row, rows, column, columns;
};

// Rows of one chunk: few enough for threads to share them out, and the same for any number of threads.
int64_t rows_of_chunk(const Shape& shape) {
  constexpr int64_t kChunk = 16 * kTile;
  return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, shape.columns));
}

int64_t chunks_of(const Shape& shape) {
  return shape.columns ? (shape.rows + rows_of_chunk(shape) - 1) / rows_of_chunk(shape) : 0;
}

// Calls visit(chunk, piece) for pieces of at most kPiece elements. Those of a chunk come in order, on one thread.
template <class Visit>
void for_each_piece(const Shape& shape, const Visit& visit) {
  const int64_t of_chunk = rows_of_chunk(shape), chunks = chunks_of(shape);
  if (!chunks) return;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t end = std::min(shape.rows, (chunk + 1) * of_chunk);
      for (int64_t row = chunk * of_chunk, rows; row < end; row += rows) {
        rows = std::min(std::max<int64_t>(1, kPiece / shape.columns), end - row);
        for (int64_t column = 0; column < shape.columns; column += kPiece) {
          visit(chunk, Piece{row, rows, column, std::min(shape.columns - column, kPiece)});
        }
      }
    }
  });
}

struct Factors {
  const float *rows, *columns;  // null: ones

  void multiply(float* out, const View& grad, const Shape& shape, const Piece& piece, const Scalars& s) const {
    Tile g(grad, piece.row * shape.columns + piece.column, piece.rows * piece.columns);
    const int64_t of_matrix = shape.rows_of_matrix(), matrix = piece.row / of_matrix;
    kernels().factored[grad.dtype](out, g.data(), piece.rows, piece.columns, s, rows ? rows + piece.row : nullptr,
                                   columns ? columns + matrix * shape.columns + piece.column : nullptr,
                                   (matrix + 1) * of_matrix - piece.row, of_matrix);
  }
};

void factor_sums_(const Tensor& row_sums, const Tensor& column_sums, const Tensor& grad, const Tensor& scalars) {
  const char* op = "factor_sums_";
  const Scalars s = step_from(scalars, 0, false, 0, op).scalars;
  const Shape shape = matrices_of(grad, row_sums, column_sums, ScalarType::Double, kCPU, op);
  const View g = view_of(grad, const_cast<void*>(grad.const_data_ptr()), kCPU, op, "grad");
  if (!g.numel) return;
  check_no_overlap({vector_region<double>(row_sums, Access::kWritten, "row_sums"),
                    vector_region<double>(column_sums, Access::kWritten, "column_sums"),
                    vector_region<double>(scalars, Access::kRead, "scalars"), region_of(g, Access::kRead, "grad")},
                   op);
  auto* of_rows = data_of<double>(row_sums);
  auto* of_columns = data_of<double>(column_sums);
  // Each chunk of rows has column sums of its own. So many chunks at most, whatever the number of threads.
  constexpr int64_t kChunks = 64, kLeast = 16 * kTile;
  const int64_t of_matrix = shape.rows_of_matrix();
  const int64_t least = std::max({kLeast / shape.columns, (of_matrix + kChunks - 1) / kChunks, int64_t{1}});
  const int64_t of_chunk = (least + kFactorRows - 1) / kFactorRows * kFactorRows;
  const int64_t chunks = (of_matrix + of_chunk - 1) / of_chunk;  // of a matrix
  std::vector<double> partial(chunks > 1 ? chunks * shape.columns : 0);
  const bool short_rows = g.contiguous && shape.columns < kShortRow;
  const auto sum_short = [&](int64_t begin, int64_t end, int64_t rows_of_matrix, double* columns) {
    kernels().factor_sums_short[g.dtype](columns, of_rows + begin, g.at(begin * shape.columns), end - begin,
                                         shape.columns, rows_of_matrix, s);
  };
  const auto chunk_sums = [&](int64_t matrix, int64_t chunk, double* columns) {
    const int64_t begin = matrix * of_matrix + chunk * of_chunk;
    const int64_t end = matrix * of_matrix + std::min(of_matrix, (chunk + 1) * of_chunk);
    if (short_rows) return sum_short(begin, end, of_matrix, columns);
    for (int64_t row = begin, rows; row < end; row += rows) {
      rows = g.contiguous ? std::min<int64_t>(kFactorRows, end - row) : 1;
      const int64_t width = g.contiguous ? shape.columns : kTile;  // what a strided tensor is copied by
      for (int64_t column = 0; column < shape.columns; column += width) {
        const int64_t n = std::min(width, shape.columns - column), first = row * shape.columns + column;
        if (g.contiguous) {
          kernels().factor_sums[g.dtype](columns + column, of_rows + row, g.at(first), shape.columns, rows, n, s);
        } else {
          Tile tile(g, first, n);
          kernels().factor_sums[g.dtype](columns + column, of_rows + row, tile.data(), n, 1, n, s);
        }
      }
    }
  };
  if (chunks == 1) {
    torch::stable::parallel_for(0, shape.matrices, 16, [&](int64_t first, int64_t last) {
      if (short_rows) {
        return sum_short(first * of_matrix, last * of_matrix, of_matrix, of_columns + first * shape.columns);
      }
      for (int64_t matrix = first; matrix < last; ++matrix) {
        chunk_sums(matrix, 0, of_columns + matrix * shape.columns);
      }
    });
    return;
  }
  for (int64_t matrix = 0; matrix < shape.matrices; ++matrix) {
    std::fill(partial.begin(), partial.end(), 0.0);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        chunk_sums(matrix, chunk, partial.data() + chunk * shape.columns);
      }
    });
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t i = 0; i < shape.columns; ++i) {
        of_columns[matrix * shape.columns + i] += partial[chunk * shape.columns + i];
      }
    }
  }
}

void factored_sq_norm_(const Tensor& slot, const Tensor& grad, const Tensor& row_factors, const Tensor& column_factors,
                       const Tensor& scalars) {
  const char* op = "factored_sq_norm_";
  const Scalars s = step_from(scalars, 0, false, 0, op).scalars;
  const Shape shape = matrices_of(grad, row_factors, column_factors, ScalarType::Float, kCPU, op);
  const View g = view_of(grad, const_cast<void*>(grad.const_data_ptr()), kCPU, op, "grad");
  double* sum = slot_of(slot, kCPU, op, "slot");
  std::vector<Region> regions{region_of(sum, "slot")};
  add_factor_regions(row_factors, column_factors, regions);
  if (g.numel) regions.push_back(region_of(g, Access::kRead, "grad"));
  check_no_overlap(std::move(regions), op);
  const Factors factors{data_of<const float>(row_factors), data_of<const float>(column_factors)};
  std::vector<double> partial(chunks_of(shape));  // so the sum has the same bits for any number of threads
  for_each_piece(shape, [&](int64_t chunk, const Piece& piece) {
    alignas(64) float f[kPiece];
    factors.multiply(f, g, shape, piece, s);
    partial[chunk] += kernels().sum_squares[kFloat32](f, piece.rows * piece.columns, 1.0f);
  });
  *sum += std::accumulate(partial.begin(), partial.end(), 0.0);
}

void factored_update_(const Tensor& param, const Tensor& grad, const Tensor& row_factors, const Tensor& column_factors,
                      const Tensor& scalars, int64_t rule, bool stochastic, int64_t seed, int64_t parameter_id,
                      const std::vector<int64_t>& shard, const std::optional<Tensor>& low) {
  const char* op = "factored_update_";
  const Step step = step_from(scalars, rule, stochastic, seed, op);
  const Shape shape = matrices_of(grad, row_factors, column_factors, ScalarType::Float, kCPU, op);
  const Update update =
      update_of(param, grad, nullptr, parameter_id, shard_of(shard.data(), shard.size(), param.numel(), op),
                low ? &*low : nullptr, stochastic, kCPU, op);
  std::vector<Region> regions;
  add_factor_regions(row_factors, column_factors, regions);
  add_regions(update, regions);
  check_no_overlap(std::move(regions), op);
  const Factors factors{data_of<const float>(row_factors), data_of<const float>(column_factors)};
  Scalars applied = step.scalars;  // what is left when the factored gradient is there
  applied.inv_scale = applied.clip_coef = 1.0f;
  applied.clip_value = __builtin_inff();
  if (step.found_inf) return;
  const uint64_t key = step.stochastic ? stream_key(step.seed, parameter_id, step.step) : 0;
  for_each_piece(shape, [&](int64_t, const Piece& piece) {
    const int64_t begin = piece.row * shape.columns + piece.column, n = piece.rows * piece.columns;
    alignas(64) float f[kPiece];
    factors.multiply(f, update.grad, shape, piece, step.scalars);
    update_tile(update, step, applied, key, begin, n, kFloat32, f);
  });
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) {
  m.impl("factor_sums_", TORCH_BOX(&lomo::factor_sums_));
  m.impl("factored_sq_norm_", TORCH_BOX(&lomo::factored_sq_norm_));
  m.impl("factored_update_", TORCH_BOX(&lomo::factored_update_));
}
