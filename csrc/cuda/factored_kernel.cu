// factored_update_ and factored_sq_norm_ on a GPU: the update and the norm of gradients that are multiplied by a factor
// of their row and of their column. Elements are dealt out as those of update_ and sq_norm_ are.
#include "update.cuh"

namespace lomo {
namespace cuda {
namespace {

// ---- Factors of elements --------------------------------------------------------------------------------------------

// Division by a number that a launch does not change, by a product (Granlund and Montgomery 1994).
struct Divisor {
  uint64_t divisor, wide;  // `wide`: ceil(2^(63 + shift) / divisor)
  uint32_t narrow, shift;  // `narrow`: ceil(2^(31 + shift) / divisor), below 2^32; shift: ceil(log2(divisor))

  explicit Divisor(uint64_t d = 1) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    using Wide = unsigned __int128;
    wide = static_cast<uint64_t>(((Wide{1} << (63 + shift)) + d - 1) / d);
    narrow = static_cast<uint32_t>(((Wide{1} << (31 + shift)) + d - 1) / d);
  }
  // n < 2^63.
  LOMO_DEVICE_MEMBER uint64_t quotient(uint64_t n) const { return __umul64hi(2 * n, wide) >> shift; }
  // n < 2^31, divisor <= 2^31.
  LOMO_DEVICE_MEMBER uint32_t quotient(uint32_t n) const { return __umulhi(2 * n, narrow) >> shift; }
};

// How a launch finds the factors of an element.
struct Lookup {
  static constexpr bool kAny = true;
  const float *rows, *columns;  // null: ones
  Divisor by_columns, by_rows;  // `by_rows`: of one matrix
  int64_t numel;
  bool one_matrix;

  Lookup() = default;
  Lookup(const Matrices& grad, const Factors& factors)
      : rows(factors.rows),
        columns(factors.columns),
        by_columns(static_cast<uint64_t>(grad.columns)),
        by_rows(static_cast<uint64_t>(grad.rows)),
        numel(grad.numel()),
        one_matrix(grad.matrices == 1) {}

  LOMO_DEVICE_MEMBER uint64_t matrix_of(uint64_t row) const { return one_matrix ? 0 : by_rows.quotient(row); }

  // Makes factored gradients of 4 neighbours. `first`: the first one's number; those that there are not stay.
  LOMO_DEVICE_MEMBER void multiply(float* g, int64_t first, const Scalars& scalars) const {
    uint64_t row = by_columns.quotient(static_cast<uint64_t>(first > 0 ? first : 0));
    uint64_t column = static_cast<uint64_t>(first > 0 ? first : 0) - row * by_columns.divisor;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < 0 || first + i >= numel) continue;
      const float row_factor = rows ? rows[row] : 1.0f;
      const float column_factor = columns ? columns[matrix_of(row) * by_columns.divisor + column] : 1.0f;
      g[i] = factored(g[i] * scalars.inv_scale, row_factor, column_factor, scalars);
      if (++column == by_columns.divisor) ++row, column = 0;
    }
  }

  // The factors of this thread's share of a straight tile, of which kCount neighbours are in one row.
  template <int kCount>
  struct Share {
    float rows[kShare / kCount], columns[kShare];

    // `block`: the block's first element, from which the share's first one is x elements away. No load waits for
    // another one.
    LOMO_DEVICE_MEMBER void load(const Lookup& lookup, int64_t block, uint32_t x) {
      constexpr int kGroups = kShare / kCount;
      const uint64_t first_row = lookup.by_columns.quotient(static_cast<uint64_t>(block));
      const uint32_t width = static_cast<uint32_t>(lookup.by_columns.divisor);
      const uint32_t first_column = static_cast<uint32_t>(static_cast<uint64_t>(block) - first_row * width);
      uint32_t row[kGroups], column[kGroups];
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        const uint32_t position = first_column + x + distance<kCount>(k * kCount);
        row[k] = lookup.by_columns.quotient(position);
        column[k] = position - row[k] * width;
      }
#pragma unroll
      for (float& factor : rows) factor = 1.0f;
#pragma unroll
      for (float& factor : columns) factor = 1.0f;
      if (lookup.rows) {
        const float* from = lookup.rows + first_row;
#pragma unroll
        for (int k = 0; k < kGroups; ++k) rows[k] = from[row[k]];
      }
      if (lookup.columns) {
#pragma unroll
        for (int k = 0; k < kGroups; ++k) {
          const float* from = lookup.columns + lookup.matrix_of(first_row + row[k]) * width + column[k];
#pragma unroll
          for (int i = 0; i < kCount; i += 4) {
            const uint4 four = *cuda::wide<const uint4>(from + i);
            float* to = columns + k * kCount + i;
            to[0] = float_of(four.x), to[1] = float_of(four.y), to[2] = float_of(four.z), to[3] = float_of(four.w);
          }
        }
      }
    }
    LOMO_DEVICE_MEMBER float times(float g, int i) const { return g * rows[i / kCount] * columns[i]; }
  };
};

// Whether neighbours in a straight tile that begins with a tensor are in one row, and their factors aligned.
bool has_straight_tiles(const Matrices& grad, const Factors& factors) {
  return grad.columns % 8 == 0 && grad.columns < int64_t{1} << 30 &&
         reinterpret_cast<uintptr_t>(factors.columns) % 16 == 0;
}

// ---- The update -----------------------------------------------------------------------------------------------------

struct UpdateArguments {
  UpdateEntry entry;
  Step step;
  Lookup lookup;
};

// Blocks that a multiprocessor must have room for: 768 threads with 128 bytes each under way, half of them factors,
// which the caches have; or 512, whose registers are bounded to 128. Nothing may spill.
template <class P, class G, bool kStochastic>
constexpr int kResidentFactored =
    sizeof(typename P::Storage) + sizeof(typename G::Storage) == 4 && !kStochastic && !kSplits<P> ? 3 : 2;

template <class P, class G, class R, bool kStochastic>
__global__ void __launch_bounds__(kThreads, kResidentFactored<P, G, kStochastic>)
    factored_update_kernel(const __grid_constant__ UpdateArguments arguments) {
  update_tiles<P, G, R, kStochastic>(arguments.entry, 0, arguments.lookup, arguments.step, {});
}

template <class P>
void run_update(P, DType grad, const UpdateArguments& arguments, void* stream) {
  constexpr bool kRounds = sizeof(typename P::Storage) < 4 && !kSplits<P>;
  with_format(grad, [&](auto g) {
    using G = decltype(g);
    Rules::with(arguments.step.rule, [&](auto rule) {
      using R = decltype(rule);
      launch(kRounds && arguments.step.stochastic ? factored_update_kernel<P, G, R, kRounds>
                                                  : factored_update_kernel<P, G, R, false>,
             arguments.entry.blocks, arguments, stream);
    });
  });
}

// ---- The sum of squares ---------------------------------------------------------------------------------------------

struct NormArguments {
  Entry entry;
  Workspace workspace;
  ScalarVector scalars;
  Lookup lookup;
};

template <class G>
__global__ void __launch_bounds__(kThreads, 3)
    factored_sq_norm_kernel(const __grid_constant__ NormArguments arguments) {
  constexpr int kCount = kVector<G>;
  const Entry& entry = arguments.entry;
  const Lookup& lookup = arguments.lookup;
  const int64_t block = first_element(entry, first_tile(entry));
  const auto load = [&](Share<G, kCount>& g, uint32_t tile) {
    const int64_t own = block + tile * kTile + own_position<kCount>();
    if (is_straight(entry, first_tile(entry) + tile)) {
      load_straight<Use::once>(g, static_cast<const typename G::Storage*>(entry.grad) + own);
    } else {
      load_elements(g, entry.grad, own, entry.numel);
    }
  };
  Share<G, kCount> g, next;
  load(g, 0);
  const Scalars scalars = read_clipping(arguments.scalars);
  double sum = 0.0;
  for (uint32_t tile = 0; tile < entry.tiles_per_block; ++tile) {
    if (tile + 1 < entry.tiles_per_block) load(next, tile + 1);
    const uint32_t x = tile * uint32_t{kTile} + own_position<kCount>();
    float f[kShare];
    if (is_straight(entry, first_tile(entry) + tile)) {
      typename Lookup::Share<kCount> factors;
      factors.load(lookup, block, x);
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        f[i] = factored(g.get(i) * scalars.inv_scale, factors.rows[i / kCount], factors.columns[i], scalars);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kShare; ++i) f[i] = g.get(i);
#pragma unroll
      for (int i = 0; i < kShare; i += 4) lookup.multiply(f + i, block + x + distance<kCount>(i), scalars);
    }
    sum += sum_squares<kCount>([&](int i) { return f[i]; });
    g = next;
  }
  add_to_slot<kCount>(entry, 0, arguments.workspace, sum);
}

}  // namespace

void factored_update(const Parameter& parameter, const Matrices& grad, const Factors& factors, const Step& step,
                     void* stream) {
  if (!grad.numel()) return;
  UpdateArguments arguments{entry_for(parameter, step.seed), step, {grad, factors}};
  if (arguments.entry.lead || !has_straight_tiles(grad, factors)) arguments.entry.straight_end = 0;
  if (parameter.low) {
    run_update(SplitBFloat16{}, grad.dtype, arguments, stream);
  } else {
    with_format(parameter.dtype, [&](auto param) { run_update(param, grad.dtype, arguments, stream); });
  }
}

void factored_sq_norm(double* slot, const Matrices& grad, const Factors& factors, const ScalarVector& scalars,
                      const WorkspaceSource& workspace, void* stream) {
  if (!grad.numel()) return;
  NormArguments arguments{{}, {}, scalars, {grad, factors}};
  deal(arguments.entry, {grad.data, grad.dtype, grad.numel(), slot}, 0);
  if (!has_straight_tiles(grad, factors)) arguments.entry.straight_end = 0;
  if (arguments.entry.blocks > 1) arguments.workspace = workspace();
  with_format(grad.dtype,
              [&](auto g) { launch(factored_sq_norm_kernel<decltype(g)>, arguments.entry.blocks, arguments, stream); });
}

}  // namespace cuda
}  // namespace lomo
