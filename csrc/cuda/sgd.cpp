// sgd_ and sgd_list_ on CUDA tensors. What they do is documented in lomo_kernels/ops/sgd.py.
#include "../sgd.h"

#include <torch/csrc/stable/library.h>

#include "device.h"

namespace lomo {
namespace cuda {
namespace {

Step step_from(const Tensor& lr, const std::optional<Tensor>& weight_decay, const std::optional<Tensor>& inv_scale,
               const std::optional<Tensor>& clip_value, const std::optional<Tensor>& clip_coef,
               const std::optional<Tensor>& found_inf, bool stochastic, int64_t seed, const std::optional<Tensor>& step,
               const Device& device, const char* op) {
  Step s;
  s.scalars[kLr] = number_on(lr, device, op, "lr", 0.0);
  s.scalars[kWeightDecay] = number_on(weight_decay, device, op, "weight_decay", 0.0);
  s.scalars[kInvScale] = number_on(inv_scale, device, op, "inv_scale", 1.0);
  s.scalars[kClipValue] = number_on(clip_value, device, op, "clip_value", __builtin_inf());
  s.scalars[kClipCoef] = number_on(clip_coef, device, op, "clip_coef", 1.0);
  s.scalars[kFoundInf] = number_on(found_inf, device, op, "found_inf", 0.0);
  s.stochastic = stochastic;
  s.seed = seed;
  s.step = step_on(step, device, op);
  return s;
}

// Whether elements can be paired in the order in which they lie in memory: then their strides do not matter.
bool lie_alike(const View& param, const View& grad) { return param.strides == grad.strides && is_dense(param); }

// The kernels take contiguous tensors; others are copied, and the parameter's copy is copied back. But where nothing
// depends on the elements' order (not the random bits, not the order of a sum) and both lie alike without gaps, as
// channels_last weights do, they are taken as they lie.
void run(const std::vector<Update>& updates, const Step& step, const Device& device) {
  Stream stream(device);
  std::vector<Tensor> grads;
  std::vector<std::pair<Tensor, Tensor>> params;  // the parameter, its copy
  std::vector<Parameter> parameters;
  parameters.reserve(updates.size());
  for (const Update& update : updates) {
    const View &param = update.param, &grad = update.grad;
    Parameter p{
        param.data, param.dtype, {grad.data, grad.dtype, grad.numel, update.slot}, update.parameter_id, update.shard};
    const bool as_they_lie = !step.stochastic && !update.slot && lie_alike(param, grad);
    if (param.numel && !grad.contiguous && !as_they_lie) {
      grads.push_back(torch::stable::contiguous(tensor_of(grad, device)));
      p.grad.data = grads.back().const_data_ptr();
    }
    if (param.numel && !param.contiguous && !as_they_lie) {
      const Tensor original = tensor_of(param, device);
      params.emplace_back(original, torch::stable::contiguous(original));
      p.data = params.back().second.mutable_data_ptr();
    }
    parameters.push_back(p);
  }
  sgd(parameters, step, [&] { return stream.workspace(); }, stream.get());
  for (auto& [original, copy] : params) torch::stable::copy_(original, copy);
}

void sgd_(const Tensor& param, const Tensor& grad, const Tensor& lr, const std::optional<Tensor>& weight_decay,
          const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& clip_value,
          const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& found_inf,
          const std::optional<Tensor>& sq_norm, bool stochastic, int64_t seed, int64_t parameter_id,
          const std::optional<Tensor>& step, const std::optional<std::vector<int64_t>>& shard) {
  const char* op = "sgd_";
  const Device device = device_of(param, op, "param");
  const Step common =
      step_from(lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, stochastic, seed, step, device, op);
  const Update update = checked_update(param, grad, sq_norm ? &*sq_norm : nullptr, parameter_id,
                                       shard ? shard_of(shard->data(), shard->size(), op) : Shard{}, device, op);
  run({update}, common, device);
}

void sgd_list_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& lr,
               const std::optional<Tensor>& weight_decay, const std::optional<Tensor>& inv_scale,
               const std::optional<Tensor>& clip_value, const std::optional<Tensor>& clip_coef,
               const std::optional<Tensor>& found_inf, const std::vector<Tensor>& sq_norm, bool stochastic,
               int64_t seed, const std::vector<int64_t>& parameter_id, const std::optional<Tensor>& step,
               const std::vector<int64_t>& shard) {
  if (params.empty()) return;
  const char* op = "sgd_list_";
  const Device device = device_of(params[0], op, "param");
  const Step common =
      step_from(lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, stochastic, seed, step, device, op);
  run(updates_of(params, grads, sq_norm, parameter_id, shard, device, op), common, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, LOMO_DISPATCH_KEY, m) {
  if (!lomo::cuda::serves_every_gpu()) return;  // Triton's will be registered
  m.impl("sgd_", TORCH_BOX(&lomo::cuda::sgd_));
  m.impl("sgd_list_", TORCH_BOX(&lomo::cuda::sgd_list_));
}
