// update_ on CUDA tensors. What it does is documented in lomo_kernels/ops/update.py.
#include "../update.h"

#include <torch/csrc/stable/library.h>

#include "device.h"

namespace lomo {
namespace cuda {
namespace {

// Whether elements can be paired in the order in which they lie in memory: then their strides do not matter.
bool lie_alike(const Update& one) {
  const View& param = one.param;
  return param.strides == one.grad.strides && (!one.low || param.strides == one.low->strides) && is_dense(param);
}

// The kernels take contiguous tensors; others are copied, and the copies of what is written are copied back. But where
// nothing depends on the elements' order (not the random bits, not the order of a sum) and both lie alike without gaps,
// as channels_last weights do, they are taken as they lie.
void run(const std::vector<Update>& updates, const Step& step, const Device& device) {
  Stream stream(device);
  std::vector<Tensor> grads;
  CopiesInOrder written(device);
  std::vector<Parameter> parameters;
  parameters.reserve(updates.size());
  for (const Update& one : updates) {
    const View &param = one.param, &grad = one.grad;
    Parameter p{param.data, param.dtype, {grad.data, grad.dtype, grad.numel, one.slot}, one.parameter_id, one.shard};
    if (one.low) p.low = one.low->data;
    const bool as_they_lie = !step.stochastic && !one.slot && lie_alike(one);
    if (param.numel && !as_they_lie) {
      p.data = written.of(param);
      if (one.low) p.low = written.of(*one.low);
      if (!grad.contiguous) {
        grads.push_back(torch::stable::contiguous(tensor_of(grad, device)));
        p.grad.data = grads.back().const_data_ptr();
      }
    }
    parameters.push_back(p);
  }
  update(parameters, step, [&] { return stream.workspace(); }, stream.get());
  written.bring_back();
}

void update_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& scalars,
             const std::vector<Tensor>& sq_norm, int64_t rule, bool stochastic, int64_t seed,
             const std::vector<int64_t>& parameter_id, const std::vector<int64_t>& shard,
             const std::vector<Tensor>& low) {
  const char* op = "update_";
  const Device device = params.empty() ? scalars.device() : device_of(params[0], op, "param");
  const Step step{scalars_on(scalars, device, op), checked_rule(rule, op), stochastic, seed};
  const auto updates = updates_of(params, grads, sq_norm, parameter_id, shard, low, stochastic, device, op);
  if (!updates.empty()) run(updates, step, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, LOMO_DISPATCH_KEY, m) {
  if (!lomo::cuda::serves_every_gpu()) return;  // Triton's will be registered
  m.impl("update_", TORCH_BOX(&lomo::cuda::update_));
}
