// out = a^T b, or out += a^T b, compiled once per instruction set: both factors are packed into panels, in which a step
// reads what it needs from consecutive memory, and a register tile runs through the panels.
#include "kernels.h"
#include "vectors.h"

namespace lomo {
namespace {

// A register tile: kRows x kVectors sums, which leave registers for a row of b and one number of a.
constexpr int kRows = kRegisters == 32 ? 8 : 4, kVectors = 3;
constexpr int kColumns = kVectors * kLanes;

static_assert(kProductRows % kRows == 0 && kProductColumns % kColumns == 0, "whole panels");

// A word holds what a step multiplies: a bfloat16 pair, of two tokens, or a float32.
#if defined(__AVX512BF16__)
template <class T>
constexpr int kTokens = 1;
template <>
constexpr int kTokens<BFloat16> = 2;
[[maybe_unused]] LOMO_FN Vector multiply_add(Vector sum, Words a, Words b, BFloat16) {  // unused beside AMX
  return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a);                               // see vectors.h
}
#else
template <class T>
constexpr int kTokens = 1;
#endif
template <class T>
LOMO_FN Vector multiply_add(Vector sum, Words a, Words b, T) {
  return sum + reinterpret_cast<Vector>(a) * reinterpret_cast<Vector>(b);
}

template <int kN, class T>
LOMO_FN void pack_row(uint32_t* to, const typename T::Storage* from, const typename T::Storage* next, T) {
  if constexpr (kTokens<T> == 2 && kN % kLanes == 0) {
    typedef uint16_t Half __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
    for (int i = 0; i < kN; i += kLanes) {
      const auto low = __builtin_convertvector(*reinterpret_cast<const Half*>(from + i), Words);
      const auto high = __builtin_convertvector(*reinterpret_cast<const Half*>(next + i), Words);
      *reinterpret_cast<LooseWords*>(to + i) = low | high << 16;
    }
  } else if constexpr (kTokens<T> == 2) {
    for (int i = 0; i < kN; ++i) to[i] = from[i] | static_cast<uint32_t>(next[i]) << 16;
  } else if constexpr (kN % kLanes == 0) {
    float wide[kN];
    widen<kN>(from, wide, T{});
    memcpy(to, wide, sizeof wide);
  } else {
    for (int i = 0; i < kN; ++i) to[i] = bits_of(T::widen(from[i]));
  }
}

// Columns [column, column + columns) in panels of kN, of `steps` steps of tokens from `token` on; what lies outside is
// zero. A few steps at a time, so that whole cache lines of the tokens' rows are used while they are near.
template <int kN, class T>
LOMO_FN void pack(uint32_t* to, const Rows& m, int64_t token, int64_t steps, int64_t column, int64_t columns) {
  using Storage = typename T::Storage;
  constexpr int64_t kNear = 8;
  for (int64_t first = 0; first < steps; first += kNear) {
    const int64_t end = first + kNear < steps ? first + kNear : steps;
    for (int64_t c = 0; c < columns; c += kN) {
      const int64_t n = columns - c;
      for (int64_t s = first; s < end; ++s) {
        Storage part[2][kN];
        const Storage* rows[2] = {};
        for (int half = 0; half < kTokens<T>; ++half) {
          const int64_t t = token + s * kTokens<T> + half;
          const Storage* row = static_cast<const Storage*>(m.data) + t * m.stride + column + c;
          if (t < m.rows && n >= kN) {
            rows[half] = row;
          } else {
            for (int64_t i = 0; i < kN; ++i) part[half][i] = t < m.rows && i < n ? row[i] : Storage{0};
            rows[half] = part[half];
          }
        }
        pack_row<kN>(to + c * steps + s * kN, rows[0], rows[1], T{});
      }
    }
  }
}

// out[kRows][kColumns] = or += the product of two panels.
template <class T>
LOMO_FN void tile(float* out, int64_t stride, const uint32_t* a, const uint32_t* b, int64_t steps, bool add) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t s = 0; s < steps; ++s, a += kRows, b += kColumns) {
    Words right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const LooseWords*>(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Words left = Words{} + a[r];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(sums[r][v], left, right[v], T{});
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * stride + v * kLanes;
      store_vector(to, add ? load_vector(to) + sums[r][v] : sums[r][v]);
    }
  }
}

template <class T>
void product(float* out, int64_t stride, const Rows& a, const Rows& b, int64_t row, int64_t rows, int64_t column,
             int64_t columns, bool add, uint32_t* scratch) {
  uint32_t *const packed_a = scratch, *const packed_b = scratch + kProductDepth * kProductRows;
  int64_t token = 0;
  do {  // once even without tokens: the product is zero then
    const int64_t left = (a.rows - token + kTokens<T> - 1) / kTokens<T>;
    const int64_t steps = left < kProductDepth ? left : kProductDepth;
    pack<kRows, T>(packed_a, a, token, steps, row, rows);
    pack<kColumns, T>(packed_b, b, token, steps, column, columns);
    for (int64_t j = 0; j < columns; j += kColumns) {
      const int64_t n_j = columns - j < kColumns ? columns - j : kColumns;
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t n_i = rows - i < kRows ? rows - i : kRows;
        float* to = out + (row + i) * stride + column + j;
        if (n_i == kRows && n_j == kColumns) {
          tile<T>(to, stride, packed_a + i * steps, packed_b + j * steps, steps, add);
          continue;
        }
        float whole[kRows * kColumns];  // the same tile, of which a part is wanted
        tile<T>(whole, kColumns, packed_a + i * steps, packed_b + j * steps, steps, false);
        for (int64_t r = 0; r < n_i; ++r) {
          for (int64_t c = 0; c < n_j; ++c) {
            const float sum = whole[r * kColumns + c];
            to[r * stride + c] = add ? to[r * stride + c] + sum : sum;
          }
        }
      }
    }
    token += steps * kTokens<T>;
    add = true;
  } while (token < a.rows);
}

}  // namespace
}  // namespace lomo

#if defined(__AMX_BF16__)
#include "amx_product.h"
#endif

namespace lomo {
namespace LOMO_ISA {
void install_product(Kernels& k) {
  k.product[kFloat32] = nullptr;  // torch has that one
#if defined(__AMX_BF16__)
  k.product[kBFloat16] = product_by_tiles;
#else
  k.product[kBFloat16] = product<BFloat16>;
#endif
  k.product[kFloat16] = product<Float16>;
}
}  // namespace LOMO_ISA

}  // namespace lomo
