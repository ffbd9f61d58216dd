// Sums of squares on CPU tensors, compiled once per instruction set (LOMO_ISA names it). The order of the additions is
// written out, so every instruction set gives the same bits.
#include "kernels.h"

namespace lomo {
namespace {

constexpr int64_t kLanes = 64;
constexpr int64_t kRows = 8;  // terms of a float32 partial sum: its error stays under 8 * 2^-24 = 4.8e-7
constexpr int64_t kBlock = kLanes * kRows;
constexpr int64_t kAhead = 4096;  // bytes

// Below this the squares' own underflow (at most 2^-150 each) could be seen in the sum; above, it is under 2^-41 of it.
constexpr double kTiny = 0x1p-100;

// Sum of squares of one block, with partial sums of type T and float64 above.
template <class T, class G>
double block_sum(const typename G::Storage* __restrict g, float inv_scale) {
  double sums[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    T sum = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      const T x = static_cast<T>(G::widen(g[row * kLanes + lane]) * inv_scale);
      sum += x * x;
    }
    sums[lane] = static_cast<double>(sum);
  }
  for (int64_t width = kLanes / 2; width >= 1; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

template <class G>
double sum_squares(const void* grad, int64_t n, float inv_scale) {
  using Storage = typename G::Storage;
  const auto* g = static_cast<const Storage*>(grad);
  double total = 0.0;
  for (int64_t b = 0; b < n; b += kBlock) {
    Storage padded[kBlock];
    const Storage* block = g + b;
    // Without it the loads of one core are too few to fill the bus: 4096 x 4096 bfloat16 took 1.06 times less than
    // torch, now 1.3.
    for (int64_t i = 0; i < kBlock * int64_t{sizeof(Storage)}; i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(block) + kAhead + i);
    }
    if (n - b < kBlock) {  // zeros add nothing: the last block goes through the same code
      for (int64_t i = 0; i < kBlock; ++i) padded[i] = b + i < n ? block[i] : Storage{0};
      block = padded;
    }
    double sum = block_sum<float, G>(block, inv_scale);
    if (!(sum >= kTiny && sum <= 1.7976931348623157e308)) sum = block_sum<double, G>(block, inv_scale);
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
