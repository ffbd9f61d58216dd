// sgd_ and sgd_list_ on CPU tensors. What they do is documented in lomo_kernels/ops/sgd.py.
#include <torch/csrc/stable/library.h>

#include "traverse.h"

namespace lomo {
namespace {

// Where the elements of a local shard stand in the whole parameter.
struct Shard {
  int64_t offset = 0;
  int64_t row_length = INT64_MAX;
  int64_t row_stride = INT64_MAX;

  // Calls run(begin, n, index) for the longest runs of consecutive indices in elements [begin, begin + n).
  template <class Run>
  void for_each_run(int64_t begin, int64_t n, const Run& run) const {
    for (const int64_t end = begin + n; begin < end;) {
      const int64_t row = begin / row_length, column = begin % row_length;
      const int64_t length = std::min(end - begin, row_length - column);
      run(begin, length, static_cast<uint64_t>(offset + row * row_stride + column));
      begin += length;
    }
  }
};

Shard shard_of(const int64_t* shard, size_t size, const char* op) {
  LOMO_CHECK(size == 3, op, ": shard has ", size, " numbers, expected (offset, row_length, row_stride)");
  LOMO_CHECK(shard[0] >= 0 && shard[1] > 0 && shard[2] >= shard[1], op, ": shard is (", shard[0], ", ", shard[1], ", ",
             shard[2], "), expected offset >= 0, row_length > 0 and row_stride >= row_length");
  return {shard[0], shard[1], shard[2]};
}

// One parameter's part of a step, checked.
struct Update {
  View param, grad;
  double* slot = nullptr;  // sum of squares wanted
  int64_t parameter_id = 0;
  Shard shard;
};

Update checked(const Tensor& param, const Tensor& grad, const char* op) {
  LOMO_CHECK(same_shape(param, grad), op, ": grad has shape ", shape_of(grad), ", param has shape ", shape_of(param));
  Update update;
  update.grad = view_of(grad, const_cast<void*>(grad.const_data_ptr()), op, "grad");
  update.param = view_of(param, param.mutable_data_ptr(), op, "param");
  if (update.param.numel) {
    LOMO_CHECK(!overlaps_itself(update.param), op,
               ": several elements of param share one place in memory (an expanded tensor?); it cannot be updated in "
               "place. Pass a contiguous parameter");
    const auto [p_begin, p_end] = update.param.range();
    const auto [g_begin, g_end] = update.grad.range();
    LOMO_CHECK(p_end <= g_begin || g_end <= p_begin, op, ": param and grad share memory");
  }
  return update;
}

// Two names of one parameter would update it twice. Strided views may interleave, so only contiguous ones are compared.
void check_apart(const std::vector<Update>& updates, const char* op) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(updates.size());
  for (const Update& update : updates) {
    if (update.param.contiguous && update.param.numel) ranges.push_back(update.param.range());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    LOMO_CHECK(ranges[i - 1].second <= ranges[i].first, op, ": two params share memory; it would be updated twice");
  }
}

// What all parameters of one call have in common.
struct Step {
  Scalars scalars;
  bool found_inf;
  bool stochastic;
  int64_t seed, step;
};

Step step_from(const Tensor& lr, const std::optional<Tensor>& weight_decay, const std::optional<Tensor>& inv_scale,
               const std::optional<Tensor>& clip_value, const std::optional<Tensor>& clip_coef,
               const std::optional<Tensor>& found_inf, bool stochastic, int64_t seed, const std::optional<Tensor>& step,
               const char* op) {
  const double rate = number_of(lr, op, "lr", 0.0);
  Scalars s;
  s.lr = static_cast<float>(rate);
  s.decay = decay_of(rate, number_of(weight_decay, op, "weight_decay", 0.0));
  s.inv_scale = static_cast<float>(number_of(inv_scale, op, "inv_scale", s.inv_scale));
  s.clip_value = static_cast<float>(number_of(clip_value, op, "clip_value", s.clip_value));
  s.clip_coef = static_cast<float>(number_of(clip_coef, op, "clip_coef", s.clip_coef));
  const bool skip = number_of(found_inf, op, "found_inf", 0.0) != 0.0;
  return {s, skip, stochastic, seed, step_of(step, op)};
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
      update.shard.for_each_run(begin, n, [&](int64_t first, int64_t length, uint64_t index) {
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
  Update update = checked(param, grad, op);
  update.parameter_id = parameter_id;
  if (sq_norm) update.slot = slot_of(*sq_norm, op, "sq_norm");
  if (shard) update.shard = shard_of(shard->data(), shard->size(), op);
  run(update, common);
}

// `sq_norm` is empty or has one slot per parameter; `shard` is empty or has three numbers per parameter.
void sgd_list_(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& lr,
               const std::optional<Tensor>& weight_decay, const std::optional<Tensor>& inv_scale,
               const std::optional<Tensor>& clip_value, const std::optional<Tensor>& clip_coef,
               const std::optional<Tensor>& found_inf, const std::vector<Tensor>& sq_norm, bool stochastic,
               int64_t seed, const std::vector<int64_t>& parameter_id, const std::optional<Tensor>& step,
               const std::vector<int64_t>& shard) {
  const char* op = "sgd_list_";
  const size_t n = params.size();
  LOMO_CHECK(grads.size() == n, op, ": ", n, " params, ", grads.size(), " grads");
  LOMO_CHECK(sq_norm.empty() || sq_norm.size() == n, op, ": ", n, " params, ", sq_norm.size(), " sq_norm slots");
  LOMO_CHECK(parameter_id.size() == n, op, ": ", n, " params, ", parameter_id.size(), " parameter_id");
  LOMO_CHECK(shard.empty() || shard.size() == 3 * n, op, ": ", n, " params, ", shard.size(), " numbers in shard");
  const Step common =
      step_from(lr, weight_decay, inv_scale, clip_value, clip_coef, found_inf, stochastic, seed, step, op);
  std::vector<Update> updates;
  updates.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    Update update = checked(params[i], grads[i], op);
    update.parameter_id = parameter_id[i];
    if (!sq_norm.empty()) update.slot = slot_of(sq_norm[i], op, "sq_norm");
    if (!shard.empty()) update.shard = shard_of(shard.data() + 3 * i, 3, op);
    updates.push_back(std::move(update));
  }
  check_apart(updates, op);
  for (const Update& update : updates) run(update, common);
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&lomo::sgd_));
  m.impl("sgd_list_", TORCH_BOX(&lomo::sgd_list_));
}
