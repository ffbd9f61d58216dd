// Sums of squares on CPU tensors, compiled once per instruction set (LOMO_ISA names it). The order of the additions is
// written out, so every instruction set gives the same bits.
#include "kernels.h"
#include "widen.h"

namespace lomo {
namespace {

constexpr int kLanes = 64;
constexpr int kRows = 8;  // terms of a float32 partial sum: its error stays under 8 * 2^-24 = 4.8e-7
constexpr int kBlock = kLanes * kRows;

// Below this the squares' own underflow (at most 2^-150 each) could be seen in a tile's sum; above, it is under 2^-38
// of it.
constexpr double kTiny = 0x1p-100;

// Adds the squares of one block to the lanes, in partial sums of type T.
template <class T, class G>
LOMO_FN void add_block(double* __restrict lanes, const typename G::Storage* __restrict g, float inv_scale) {
  T sums[kLanes] = {};
  for (int row = 0; row < kRows; ++row) {
    alignas(64) float x[kLanes];
    widen<kLanes>(g + row * kLanes, x, G{});
    for (int lane = 0; lane < kLanes; ++lane) {
      const T scaled = static_cast<T>(x[lane] * inv_scale);
      sums[lane] += scaled * scaled;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(sums[lane]);
}

// Sum of squares of at most a tile. One reduction of the lanes for a whole tile: with one for every block the norm of
// 4096 x 4096 bfloat16 numbers took 1.9 ms instead of 1.3 (Zen 4; reading them takes 1.3).
template <class T, class G>
double tile_sum(const typename G::Storage* g, int64_t n, float inv_scale) {
  alignas(64) double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) add_block<T, G>(lanes, g + i, inv_scale);
  if (i < n) {  // zeros add nothing: the last block goes through the same code
    typename G::Storage padded[kBlock] = {};
    for (int64_t j = 0; i + j < n; ++j) padded[j] = g[i + j];
    add_block<T, G>(lanes, padded, inv_scale);
  }
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <class G>
double sum_squares(const void* grad, int64_t n, float inv_scale) {
  const auto* g = static_cast<const typename G::Storage*>(grad);
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = n - i < kTile ? n - i : kTile;
    double sum = tile_sum<float, G>(g + i, m, inv_scale);
    if (!(sum >= kTiny && sum <= 1.7976931348623157e308)) sum = tile_sum<double, G>(g + i, m, inv_scale);
    total += sum;
  }
  return total;
}

}  // namespace

namespace LOMO_ISA {
void install_sq_norm(Kernels& k) {
  k.sum_squares[kFloat32] = sum_squares<Float32>;
  k.sum_squares[kBFloat16] = sum_squares<BFloat16>;
  k.sum_squares[kFloat16] = sum_squares<Float16>;
}
}  // namespace LOMO_ISA

}  // namespace lomo
