// The arguments of an update that are the same for all its elements, read from CPU tensors.
#pragma once

#include "../checks.h"

namespace lomo {

// What all parameters of one call have in common.
struct Step {
  Scalars scalars;
  bool found_inf;
  bool stochastic;
  int64_t seed, step;
};

inline Step step_from(const Tensor& lr, const std::optional<Tensor>& weight_decay,
                      const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& clip_value,
                      const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& found_inf, bool stochastic,
                      int64_t seed, const std::optional<Tensor>& step, const char* op) {
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

}  // namespace lomo
