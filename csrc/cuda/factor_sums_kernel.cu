// factor_sums_ on a GPU: sums of squares of a gradient's rows and columns, in float64, in which no square overflows and
// none is lost. The gradient is read once. The order of the additions depends on the shape alone.
#include "common.cuh"

namespace lomo {
namespace cuda {
namespace {

// A strip's tile has 16 rows and 256 columns: a run of 256 neighbours of each of a warp's two rows.
constexpr int kTileRows = 16, kTileColumns = 256, kWarps = kThreads / kWarp;
static_assert(kTileRows == 2 * kWarps && kTileRows * kTileColumns == kTile, "a warp has two runs of a tile");

// sum + x * x. The square is exact in float64, so a fused operation has the bits of two.
LOMO_DEVICE double add_square(double sum, float x) {
  const double wide = x;
#if defined(__CUDACC__)
  return __fma_rn(wide, wide, sum);
#else
  return sum + wide * wide;
#endif
}

template <class G>
LOMO_DEVICE float clip(uint32_t bits, const Scalars& scalars) {
  return factored(G::widen(bits) * scalars.inv_scale, 1.0f, 1.0f, scalars);
}

// ---- Strips of large matrices ---------------------------------------------------------------------------------------

struct Strips {
  Matrices grad;
  ScalarVector scalars;
  double *of_rows, *of_columns;   // [strips, rows of all matrices] and [chunks, columns of all matrices], or the sums
  int64_t strips, chunks, chunk;  // a block's strip has `chunk` rows
  bool is_aligned;                // every row

  // Whether a block adds to the sums themselves, because no other block has a part of them.
  __host__ LOMO_DEVICE_MEMBER bool adds_rows() const { return strips == 1; }
  __host__ LOMO_DEVICE_MEMBER bool adds_columns() const { return chunks == 1; }
};

// A block goes down a strip of 256 columns. Column sums stay in registers. A row's sum needs one warp.
template <class G>
__global__ void __launch_bounds__(kThreads, 3) sums_of_strips_kernel(const __grid_constant__ Strips arguments) {
  constexpr int kCount = kVector<G>;
  __shared__ double shared[kWarps][kTileColumns];
  const int64_t rows = arguments.grad.rows, columns = arguments.grad.columns;
  const int64_t strip = blockIdx.x % arguments.strips, above = blockIdx.x / arguments.strips;
  const int64_t chunk = above % arguments.chunks, matrix = above / arguments.chunks;
  const int64_t first_row = chunk * arguments.chunk, first_column = strip * kTileColumns;
  const int64_t end = first_row + arguments.chunk < rows ? first_row + arguments.chunk : rows;
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t own_column = first_column + lane * kCount;
  const auto* grad = static_cast<const typename G::Storage*>(arguments.grad.data) + matrix * rows * columns;
  const bool is_straight = arguments.is_aligned && first_column + kTileColumns <= columns;
  // Of rows `row` and `row` + 8.
  const auto load = [&](Share<G, kCount>& g, int64_t row) {
    const auto* own = grad + (row * columns + own_column);
    if (is_straight && row - warp + kTileRows <= end) {
      load_straight<Use::once>(g, own, kWarps * columns);
      return;
    }
#pragma unroll
    for (int i = 0; i < kShare; i += 2) {
      const int64_t column = own_column + distance<kCount>(i % 8),
                    at = i / 8 * kWarps * columns + distance<kCount>(i % 8);
      const bool in_rows = row + i / 8 * kWarps < end;
      const uint32_t even = in_rows && column < columns ? uint32_t{own[at]} : 0u;
      const uint32_t odd = in_rows && column + 1 < columns ? uint32_t{own[at + 1]} : 0u;
      if (g.kWide) {
        g.words[i] = even, g.words[i + 1] = odd;
      } else {
        g.words[i / 2] = even | odd << 16;
      }
    }
  };
  Share<G, kCount> g, next;
  int64_t row = first_row + warp;
  load(g, row);
  const Scalars scalars = read_clipping(arguments.scalars);
  double of_columns[8] = {};
  for (int64_t left = end - first_row; left > 0; left -= kTileRows, row += kTileRows) {
    if (left > kTileRows) load(next, row + kTileRows);
    double of_rows[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float x = clip<G>(g.bits(8 * k + i), scalars);
        of_columns[i] = add_square(of_columns[i], x);
        of_rows[k] = add_square(of_rows[k], x);
      }
    }
    // Even lanes add up the first row, odd ones the second.
    const bool odd = lane % 2;
    const double own = odd ? of_rows[1] : of_rows[0], other = odd ? of_rows[0] : of_rows[1];
    double sum = own + __shfl_xor_sync(0xffffffffu, other, 1);
#pragma unroll
    for (uint32_t lanes = 2; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    const int64_t of_sum = row + (odd ? kWarps : 0);
    if (lane < 2 && of_sum < end) {
      double* to = arguments.of_rows + ((strip * arguments.grad.matrices + matrix) * rows + of_sum);
      *to = arguments.adds_rows() ? *to + sum : sum;
    }
    g = next;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) shared[warp][i * kWarp + lane] = of_columns[i];
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += shared[w][threadIdx.x];
  const int64_t column = own_column + distance<kCount>(warp);
  if (column < columns) {
    double* to = arguments.of_columns + ((chunk * arguments.grad.matrices + matrix) * columns + column);
    *to = arguments.adds_columns() ? *to + total : total;
  }
}

// ---- Parts of sums --------------------------------------------------------------------------------------------------

// Sums, and their parts: [parts, count].
struct Parts {
  double* sums;
  const double* parts;
  int64_t count, of_each;

  __host__ LOMO_DEVICE_MEMBER uint32_t blocks() const {
    return of_each > 1 ? static_cast<uint32_t>((count + kThreads - 1) / kThreads) : 0;
  }
};

struct AddArguments {
  Parts rows, columns;
};

// A thread adds the parts of one sum, one after the other.
__global__ void __launch_bounds__(kThreads, 4) add_parts_kernel(const __grid_constant__ AddArguments arguments) {
  const uint32_t of_rows = arguments.rows.blocks();
  const bool is_rows = blockIdx.x < of_rows;
  const Parts& parts = is_rows ? arguments.rows : arguments.columns;
  const int64_t at = int64_t{blockIdx.x - (is_rows ? 0 : of_rows)} * kThreads + threadIdx.x;
  if (at >= parts.count) return;
  double total = parts.sums[at];
#pragma unroll 4
  for (int64_t part = 0; part < parts.of_each; ++part) total += __ldcg(parts.parts + part * parts.count + at);
  parts.sums[at] = total;
}

// ---- Many small matrices --------------------------------------------------------------------------------------------

struct SmallMatrices {
  Matrices grad;
  ScalarVector scalars;
  double *row_sums, *column_sums;
  int64_t together;  // matrices of a block
};

// A block has whole matrices, and a thread sums up one row or column after the other. What a row's thread has read, a
// column's finds in the first-level cache.
template <class G>
__global__ void __launch_bounds__(kThreads, 4)
    sums_of_matrices_kernel(const __grid_constant__ SmallMatrices arguments) {
  const int64_t first = blockIdx.x * arguments.together, left = arguments.grad.matrices - first;
  const auto matrices = static_cast<uint32_t>(left < arguments.together ? left : arguments.together);
  const auto rows = static_cast<uint32_t>(arguments.grad.rows), columns = static_cast<uint32_t>(arguments.grad.columns);
  const auto* grad = static_cast<const typename G::Storage*>(arguments.grad.data) + first * rows * columns;
  const Scalars scalars = read_clipping(arguments.scalars);
  const auto add = [&](double* to, const typename G::Storage* from, uint32_t count, uint32_t stride) {
    double sum = 0.0;
#pragma unroll 4
    for (uint32_t i = 0; i < count; ++i) sum = add_square(sum, clip<G>(from[i * stride], scalars));
    *to += sum;
  };
  for (uint32_t row = threadIdx.x; row < matrices * rows; row += kThreads) {
    add(arguments.row_sums + first * rows + row, grad + row * columns, columns, 1);
  }
  for (uint32_t column = threadIdx.x; column < matrices * columns; column += kThreads) {
    const uint32_t matrix = column / columns;
    const auto* from = grad + matrix * rows * columns + (column - matrix * columns);
    add(arguments.column_sums + first * columns + column, from, rows, columns);
  }
}

int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

void sums_of_matrices(double* row_sums, double* column_sums, const Matrices& grad, const ScalarVector& scalars,
                      void* stream) {
  const SmallMatrices arguments{grad, scalars, row_sums, column_sums, kTile / (grad.rows * grad.columns)};
  const auto blocks = static_cast<uint32_t>(divided_up(grad.matrices, arguments.together));
  with_format(grad.dtype, [&](auto g) { launch(sums_of_matrices_kernel<decltype(g)>, blocks, arguments, stream); });
}

}  // namespace

void factor_sums(double* row_sums, double* column_sums, const Matrices& grad, const ScalarVector& scalars,
                 const ScratchSource& scratch, void* stream) {
  if (!grad.numel()) return;
  if (grad.matrices > 1 && grad.rows * grad.columns <= kTile / 4) {
    return sums_of_matrices(row_sums, column_sums, grad, scalars, stream);
  }
  Strips strips{grad, scalars, row_sums, column_sums, divided_up(grad.columns, kTileColumns), 0, 0, false};
  const int64_t tiles = grad.matrices * strips.strips * divided_up(grad.rows, kTileRows);
  strips.chunk = kTileRows * divided_up(tiles, kSumBlocks);
  strips.chunks = divided_up(grad.rows, strips.chunk);
  const int64_t per_access = 16 / size_of(grad.dtype);
  strips.is_aligned = is_aligned(grad.data, grad.dtype, 0) && grad.columns % per_access == 0;
  const Parts no_parts{nullptr, nullptr, 0, 1};
  AddArguments add{no_parts, no_parts};
  const int64_t rows = grad.matrices * grad.rows, columns = grad.matrices * grad.columns;
  const int64_t of_rows = strips.adds_rows() ? 0 : strips.strips * rows;
  const int64_t of_columns = strips.adds_columns() ? 0 : strips.chunks * columns;
  if (of_rows + of_columns) {
    double* partials = scratch(of_rows + of_columns);
    if (of_rows) add.rows = {row_sums, strips.of_rows = partials, rows, strips.strips};
    if (of_columns) add.columns = {column_sums, strips.of_columns = partials + of_rows, columns, strips.chunks};
  }
  const auto blocks = static_cast<uint32_t>(grad.matrices * strips.strips * strips.chunks);
  with_format(grad.dtype, [&](auto g) { launch(sums_of_strips_kernel<decltype(g)>, blocks, strips, stream); });
  if (const uint32_t adding = add.rows.blocks() + add.columns.blocks()) launch(add_parts_kernel, adding, add, stream);
}

}  // namespace cuda
}  // namespace lomo
