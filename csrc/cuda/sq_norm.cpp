// sq_norm_ on CUDA tensors. What it does is documented in lomo_kernels/ops/sq_norm.py.
#include <torch/csrc/stable/library.h>

#include "../overlap.h"
#include "device.h"

namespace lomo {
namespace cuda {
namespace {

void sq_norm_(const std::vector<Tensor>& slots, const std::vector<Tensor>& grads,
              const std::optional<Tensor>& inv_scale) {
  const char* op = "sq_norm_";
  LOMO_CHECK(slots.size() == grads.size(), op, ": ", slots.size(), " slots for ", grads.size(), " grads");
  if (grads.empty()) return;
  const Device device = device_of(slots[0], op, "slot");
  const Number scale = number_on(inv_scale, device, op, "inv_scale", 1.0);
  std::vector<View> views;
  std::vector<Gradient> gradients;
  for (size_t i = 0; i < grads.size(); ++i) {
    double* slot = slot_of(slots[i], device, op, "slot");
    views.push_back(view_of(grads[i], const_cast<void*>(grads[i].const_data_ptr()), device, op, "grad"));
    gradients.push_back({views[i].data, views[i].dtype, views[i].numel, slot});
  }
  std::vector<Region> regions;
  for (size_t i = 0; i < grads.size(); ++i) {
    regions.push_back(region_of(gradients[i].slot, "slot"));
    if (views[i].numel) regions.push_back(region_of(views[i], Access::kRead, "grad"));
  }
  check_no_overlap(regions, op);
  Stream stream(device);
  std::vector<Tensor> copies;  // the kernels take contiguous tensors
  for (size_t i = 0; i < grads.size(); ++i) {
    if (views[i].contiguous || !views[i].numel) continue;
    copies.push_back(torch::stable::contiguous(tensor_of(views[i], device)));
    gradients[i].data = copies.back().const_data_ptr();
  }
  sq_norm(gradients, scale, [&] { return stream.workspace(); }, stream.get());
}

}  // namespace
}  // namespace cuda
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, LOMO_DISPATCH_KEY, m) {
  if (!lomo::cuda::serves_every_gpu()) return;
  m.impl("sq_norm_", TORCH_BOX(&lomo::cuda::sq_norm_));
}
