// sq_norm_ on CPU tensors. What it does is documented in lomo_kernels/ops/sq_norm.py.
#include <torch/csrc/stable/library.h>

#include "../overlap.h"
#include "traverse.h"

namespace lomo {
namespace {

struct Norm {
  double* slot;
  View grad;
};

Norm checked(const Tensor& slot, const Tensor& grad, const char* op) {
  return {slot_of(slot, kCPU, op, "slot"), view_of(grad, const_cast<void*>(grad.const_data_ptr()), kCPU, op, "grad")};
}

void check_no_overlap(const std::vector<Norm>& norms, const char* op) {
  std::vector<Region> regions;
  regions.reserve(2 * norms.size());
  for (const Norm& norm : norms) {
    regions.push_back(region_of(norm.slot, "slot"));
    if (norm.grad.numel) regions.push_back(region_of(norm.grad, Access::kRead, "grad"));
  }
  lomo::check_no_overlap(std::move(regions), op);
}

void add(const Norm& norm, float inv_scale) {
  const Kernels& k = kernels();
  const View& grad = norm.grad;
  *norm.slot += sum_over_tiles(grad.numel, [&](int64_t begin, int64_t n) {
    return k.sum_squares[grad.dtype](Tile(grad, begin, n).data(), n, inv_scale);
  });
}

void sq_norm_(const std::vector<Tensor>& slots, const std::vector<Tensor>& grads,
              const std::optional<Tensor>& inv_scale) {
  const char* op = "sq_norm_";
  LOMO_CHECK(slots.size() == grads.size(), op, ": ", slots.size(), " slots for ", grads.size(), " grads");
  const float scale = static_cast<float>(number_of(inv_scale, op, "inv_scale", 1.0));
  std::vector<Norm> norms;
  norms.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) norms.push_back(checked(slots[i], grads[i], op));
  check_no_overlap(norms, op);
  for (const Norm& norm : norms) add(norm, scale);
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) { m.impl("sq_norm_", TORCH_BOX(&lomo::sq_norm_)); }
