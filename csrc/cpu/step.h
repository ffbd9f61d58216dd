// The arguments of an update that are the same for all its elements, and the update of some of them.
#pragma once

#include "../update.h"
#include "traverse.h"

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

// The update of elements [begin, begin + n) of a parameter, which lie in consecutive memory.
//
// low: null if they are not split. key: stream_key(), for stochastic rounding. shard: of the parameter.
inline void update_elements(const Step& step, const Scalars& scalars, uint64_t key, const Shard& shard, DType dtype,
                            void* param, void* low, DType grad_dtype, const void* grad, int64_t begin, int64_t n) {
  const Rounding rounding = low ? kSplitUp : step.stochastic ? kToRandom : kToNearest;
  const auto kernel = kernels().update[step.rule][dtype][grad_dtype][rounding];
  if (rounding != kToRandom) return kernel(param, low, grad, n, scalars, {});
  for_each_run(shard, begin, n, [&](int64_t first, int64_t length, uint64_t index) {
    const int64_t i = first - begin;
    kernel(static_cast<char*>(param) + i * size_of(dtype), nullptr,
           static_cast<const char*>(grad) + i * size_of(grad_dtype), length, scalars, {key, index});
  });
}

// The same of at most kTile elements of a parameter that need not be contiguous; their gradients are.
inline void update_tile(const Update& update, const Step& step, const Scalars& scalars, uint64_t key, int64_t begin,
                        int64_t n, DType grad_dtype, const void* grad) {
  Tile p(update.param, begin, n);
  const auto run = [&](void* low) {
    update_elements(step, scalars, key, update.shard, update.param.dtype, p.data(), low, grad_dtype, grad, begin, n);
  };
  if (update.low) {  // g++ fills an empty std::optional<Tile> with zeros, all of it
    Tile low(*update.low, begin, n);
    run(low.data());
    low.store();
  } else {
    run(nullptr);
  }
  p.store();
}

}  // namespace lomo
