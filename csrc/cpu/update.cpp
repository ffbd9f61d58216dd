// update_ on CPU tensors. What it does is documented in lomo_kernels/ops/update.py.
#include <torch/csrc/stable/library.h>

#include "step.h"

namespace lomo {
namespace {

void run(const Update& update, const Step& step) {
  const Kernels& k = kernels();
  const View& grad = update.grad;
  if (step.found_inf && !update.slot) return;
  const uint64_t key = step.stochastic ? stream_key(step.seed, update.parameter_id, step.step) : 0;
  const double sum = sum_over_tiles(grad.numel, [&](int64_t begin, int64_t n) {
    Tile g(grad, begin, n);
    const double tile_sum = update.slot ? k.sum_squares[grad.dtype](g.data(), n, step.scalars.inv_scale) : 0.0;
    if (step.found_inf) return tile_sum;
    update_tile(update, step, step.scalars, key, begin, n, grad.dtype, g.data());
    return tile_sum;
  });
  if (update.slot) *update.slot += sum;
}

void update_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& scalars,
             const std::vector<Tensor>& sq_norm, int64_t rule, bool stochastic, int64_t seed,
             const std::vector<int64_t>& parameter_id, const std::vector<int64_t>& shard,
             const std::vector<Tensor>& low) {
  const char* op = "update_";
  const Step step = step_from(scalars, rule, stochastic, seed, op);
  const auto updates = updates_of(params, grads, sq_norm, parameter_id, shard, low, stochastic, kCPU, op);
  for (const Update& update : updates) run(update, step);
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) { m.impl("update_", TORCH_BOX(&lomo::update_)); }
