// Sums of an embedding's gradient rows on CPU tensors, compiled once per instruction set (LOMO_ISA names it).
#include "kernels.h"
#include "widen.h"

namespace lomo {
namespace {

constexpr int kGroup = 64;  // elements added at a time
static_assert(kTile % kGroup == 0, "sums have room for whole groups");

template <class G>
LOMO_FN void add_group(float* __restrict sums, const typename G::Storage* __restrict row) {
  alignas(64) float x[kGroup];
  widen<kGroup>(row, x, G{});
  for (int i = 0; i < kGroup; ++i) sums[i] += x[i];
}

template <class G>
void add_row(float* sums, const void* from, int64_t n) {
  const auto* row = static_cast<const typename G::Storage*>(from);
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) add_group<G>(sums + i, row + i);
  if (i < n) {  // zeros change no sum: the last group goes through the same code
    typename G::Storage padded[kGroup] = {};
    for (int64_t j = 0; i + j < n; ++j) padded[j] = row[i + j];
    add_group<G>(sums + i, padded);
  }
}

}  // namespace

namespace LOMO_ISA {
void install_embedding(Kernels& k) {
  k.add_row[kFloat32] = add_row<Float32>;
  k.add_row[kBFloat16] = add_row<BFloat16>;
  k.add_row[kFloat16] = add_row<Float16>;
}
}  // namespace LOMO_ISA

}  // namespace lomo
