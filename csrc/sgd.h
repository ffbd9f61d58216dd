// What sgd_ and sgd_list_ take apart from scalars, checked. For every backend.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "view.h"

namespace lomo {

inline Shard shard_of(const int64_t* shard, size_t size, const char* op) {
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

// `sq_norm` may be null.
inline Update update_of(const Tensor& param, const Tensor& grad, const Tensor* sq_norm, int64_t parameter_id,
                        const Shard& shard, const Device& device, const char* op) {
  LOMO_CHECK(same_shape(param, grad), op, ": grad has shape ", shape_of(grad), ", param has shape ", shape_of(param));
  Update update;
  update.grad = view_of(grad, const_cast<void*>(grad.const_data_ptr()), device, op, "grad");
  update.param = view_of(param, param.mutable_data_ptr(), device, op, "param");
  if (update.param.numel) {
    LOMO_CHECK(!overlaps_itself(update.param), op,
               ": several elements of param share one place in memory (an expanded tensor?); it cannot be updated in "
               "place. Pass a contiguous parameter");
    const auto [p_begin, p_end] = update.param.range();
    const auto [g_begin, g_end] = update.grad.range();
    LOMO_CHECK(p_end <= g_begin || g_end <= p_begin, op, ": param and grad share memory");
  }
  update.parameter_id = parameter_id;
  if (sq_norm) update.slot = slot_of(*sq_norm, device, op, "sq_norm");
  update.shard = shard;
  return update;
}

// Two names of one parameter would update it twice. Strided views may interleave, so only those without gaps are
// compared.
inline void check_apart(const std::vector<Update>& updates, const char* op) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(updates.size());
  for (const Update& update : updates) {
    if (update.param.numel && is_dense(update.param)) ranges.push_back(update.param.range());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    LOMO_CHECK(ranges[i - 1].second <= ranges[i].first, op, ": two params share memory; it would be updated twice");
  }
}

// The arguments of sgd_list_. `sq_norm` is empty or has one slot per parameter; `shard` is empty or has three numbers
// per parameter.
inline std::vector<Update> updates_of(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                      const std::vector<Tensor>& sq_norm, const std::vector<int64_t>& parameter_id,
                                      const std::vector<int64_t>& shard, const Device& device, const char* op) {
  const size_t n = params.size();
  LOMO_CHECK(grads.size() == n, op, ": ", n, " params, ", grads.size(), " grads");
  LOMO_CHECK(sq_norm.empty() || sq_norm.size() == n, op, ": ", n, " params, ", sq_norm.size(), " sq_norm slots");
  LOMO_CHECK(parameter_id.size() == n, op, ": ", n, " params, ", parameter_id.size(), " parameter_id");
  LOMO_CHECK(shard.empty() || shard.size() == 3 * n, op, ": ", n, " params, ", shard.size(), " numbers in shard");
  std::vector<Update> updates;
  updates.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    updates.push_back(update_of(params[i], grads[i], sq_norm.empty() ? nullptr : &sq_norm[i], parameter_id[i],
                                shard.empty() ? Shard{} : shard_of(shard.data() + 3 * i, 3, op), device, op));
  }
  check_apart(updates, op);
  return updates;
}

}  // namespace lomo
