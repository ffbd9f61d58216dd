// The arguments of an update that are the same for all its elements.
#pragma once

#include "../checks.h"

namespace lomo {

// What all parameters of one call have in common.
struct Step {
  Scalars scalars;
  bool found_inf;
  int64_t step;
  int rule;
  bool stochastic;
  int64_t seed;
};

inline Step step_from(const Tensor& scalars, int64_t rule, bool stochastic, int64_t seed, const char* op) {
  const double* given = scalars_of(scalars, op);
  Scalars s;
  s.lr = static_cast<float>(given[kLr]);
  s.decay = decay_of(given[kLr], given[kWeightDecay]);
  s.inv_scale = static_cast<float>(given[kInvScale]);
  s.clip_value = static_cast<float>(given[kClipValue]);
  s.clip_coef = static_cast<float>(given[kClipCoef]);
  return {s, given[kFoundInf] != 0.0, step_of(given[kStep]), checked_rule(rule, op), stochastic, seed};
}

}  // namespace lomo
