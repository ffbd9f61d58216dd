// sgd_ and sgd_list_ on CPU tensors. What they do is documented in lomo_kernels/ops/sgd.py.
#include "../sgd.h"

#include <torch/csrc/stable/library.h>

#include "step.h"
#include "traverse.h"

namespace lomo {
namespace {

// Calls run(begin, n, index) for the longest runs of consecutive indices in elements [begin, begin + n) of a shard.
template <class Run>
void for_each_run(const Shard& shard, int64_t begin, int64_t n, const Run& run) {
  for (const int64_t end = begin + n; begin < end;) {
    const int64_t row = begin / shard.row_length, column = begin % shard.row_length;
    const int64_t length = std::min(end - begin, shard.row_length - column);
    run(begin, length, static_cast<uint64_t>(shard.offset + row * shard.row_stride + column));
    begin += length;
  }
}

void run(const Update& update, const Step& step) {
  const Kernels& k = kernels();
  const View &param = update.param, &grad = update.grad;
  if (step.found_inf && !update.slot) return;
  const auto update_run = k.update[param.dtype][grad.dtype][step.stochastic];
  const uint64_t key = step.stochastic ? stream_key(step.seed, update.parameter_id, step.step) : 0;
  const double sum = sum_over_tiles(param.numel, [&](int64_t begin, int64_t n) {
    Tile g(grad, begin, n);
    const double tile_sum = update.slot ? k.sum_squares[grad.dtype](g.data(), n, step.scalars.inv_scale) : 0.0;
    if (step.found_inf) return tile_sum;
    Tile p(param, begin, n);
    if (step.stochastic) {
      for_each_run(update.shard, begin, n, [&](int64_t first, int64_t length, uint64_t index) {
        const int64_t i = first - begin;
        update_run(static_cast<char*>(p.data()) + i * param.element_size(),
                   static_cast<const char*>(g.data()) + i * grad.element_size(), length, step.scalars, {key, index});
      });
    } else {
      update_run(p.data(), g.data(), n, step.scalars, {});
    }
    p.store();
    return tile_sum;
  });
  if (update.slot) *update.slot += sum;
}

void sgd_(const Tensor& param, const Tensor& grad, const Tensor& lr, const std::optional<Tensor>& weight_decay,
          const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& clip_value,
          const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& found_inf,
          const std::optional<Tensor>& sq_norm, bool stochastic, int64_t seed, int64_t parameter_id,
          const std::optional<Tensor>& step, const std::optional<std::vector<int64_t>>& shard) {
  const char* op = "sgd_";
  const Step common =
      step_from(lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, stochastic, seed, step, op);
  const Update update = checked_update(param, grad, sq_norm ? &*sq_norm : nullptr, parameter_id,
                                       shard ? shard_of(shard->data(), shard->size(), op) : Shard{}, kCPU, op);
  run(update, common);
}

void sgd_list_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& lr,
               const std::optional<Tensor>& weight_decay, const std::optional<Tensor>& inv_scale,
               const std::optional<Tensor>& clip_value, const std::optional<Tensor>& clip_coef,
               const std::optional<Tensor>& found_inf, const std::vector<Tensor>& sq_norm, bool stochastic,
               int64_t seed, const std::vector<int64_t>& parameter_id, const std::optional<Tensor>& step,
               const std::vector<int64_t>& shard) {
  const char* op = "sgd_list_";
  const Step common =
      step_from(lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, stochastic, seed, step, op);
  const auto updates = updates_of(params, grads, sq_norm, parameter_id, shard, kCPU, op);
  for (const Update& update : updates) run(update, common);
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&lomo::sgd_));
  m.impl("sgd_list_", TORCH_BOX(&lomo::sgd_list_));
}
