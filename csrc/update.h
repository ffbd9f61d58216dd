// What update_ takes apart from scalars, checked. For every backend.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "overlap.h"

namespace lomo {

// From three numbers, or none: the whole parameter. `numel`: of the part; the last of its elements has an index of 64
// bits.
inline Shard shard_of(const int64_t* shard, size_t size, int64_t numel, const char* op) {
  if (size == 0) return {};
  LOMO_CHECK(size == 3, op, ": shard has ", size, " numbers, expected (offset, row_length, row_stride)");
  LOMO_CHECK(shard[0] >= 0 && shard[1] > 0 && shard[2] >= shard[1], op, ": shard is (", shard[0], ", ", shard[1], ", ",
             shard[2], "), expected offset >= 0, row_length > 0 and row_stride >= row_length");
  const int64_t last = std::max<int64_t>(numel - 1, 0);
  int64_t index = 0;
  const bool fits = !__builtin_mul_overflow(last / shard[1], shard[2], &index) &&
                    !__builtin_add_overflow(index, shard[0], &index) &&
                    !__builtin_add_overflow(index, last % shard[1], &index);
  LOMO_CHECK(fits, op, ": shard is (", shard[0], ", ", shard[1], ", ", shard[2], "): the last of ", numel,
             " elements has an index beyond 64 bits");
  return {shard[0], shard[1], shard[2]};
}

// One parameter's part of a step, checked.
struct Update {
  View param, grad;
  std::optional<View> low;  // of a split parameter
  double* slot = nullptr;   // sum of squares wanted
  int64_t parameter_id = 0;
  Shard shard;
};

// `tensor`, which is written in place: `name` is what the operator calls it.
inline void check_writable(const View& view, const char* op, const char* name) {
  LOMO_CHECK(!view.numel || !overlaps_itself(view), op, ": several elements of ", name,
             " share one place in memory (an expanded tensor?); it cannot be updated in place. Pass a contiguous one");
}

// The low part of a parameter that is split. Empty: a float32 parameter, which is not.
inline std::optional<View> low_of(const Tensor& low, const Tensor& param, bool stochastic, const Device& device,
                                  const char* op) {
  LOMO_CHECK(!stochastic, op, ": low was given, and rounding is stochastic, expected one of the two");
  const DType dtype = dtype_of(param, op, "param");
  LOMO_CHECK(dtype != kFloat16, op,
             ": a parameter is float16, and rounding=\"split\" is for bfloat16; make the parameter bfloat16, or use "
             "rounding=\"stochastic\"");
  check_device(low, device, op, "low");
  if (dtype == kFloat32) {
    LOMO_CHECK(!low.numel() && low.scalar_type() == ScalarType::Short, op,
               ": a float32 parameter has a low part, expected it of bfloat16 parameters only");
    return std::nullopt;
  }
  LOMO_CHECK(low.scalar_type() == ScalarType::Short && same_shape(low, param), op, ": low has shape ", shape_of(low),
             " and dtype ", toString(low.scalar_type()), ", expected Short (int16) and the parameter's shape ",
             shape_of(param));
  const View view = view_of(low, low.mutable_data_ptr(), kBFloat16, device, op, "low");  // as wide as bfloat16
  check_writable(view, op, "low");
  return view;
}

// `sq_norm` and `low` may be null.
inline Update update_of(const Tensor& param, const Tensor& grad, const Tensor* sq_norm, int64_t parameter_id,
                        const Shard& shard, const Tensor* low, bool stochastic, const Device& device, const char* op) {
  LOMO_CHECK(same_shape(param, grad), op, ": grad has shape ", shape_of(grad), ", param has shape ", shape_of(param));
  Update update;
  update.grad = view_of(grad, const_cast<void*>(grad.const_data_ptr()), device, op, "grad");
  update.param = view_of(param, param.mutable_data_ptr(), device, op, "param");
  check_writable(update.param, op, "param");
  if (low) update.low = low_of(*low, param, stochastic, device, op);
  update.parameter_id = parameter_id;
  if (sq_norm) update.slot = slot_of(*sq_norm, device, op, "sq_norm");
  update.shard = shard;
  return update;
}

// What one update reads and writes, for check_no_overlap().
inline void add_regions(const Update& update, std::vector<Region>& regions) {
  if (update.param.numel) {
    regions.push_back(region_of(update.param, Access::kWritten, "param"));
    regions.push_back(region_of(update.grad, Access::kRead, "grad"));
    if (update.low) regions.push_back(region_of(*update.low, Access::kWritten, "low"));
  }
  if (update.slot) regions.push_back(region_of(update.slot, "sq_norm"));
}

// The arguments of update_. `sq_norm` is empty or has one slot per parameter; `shard` is empty or has three numbers
// per parameter; `low` is empty or has one part per parameter.
inline std::vector<Update> updates_of(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                      const std::vector<Tensor>& sq_norm, const std::vector<int64_t>& parameter_id,
                                      const std::vector<int64_t>& shard, const std::vector<Tensor>& low,
                                      bool stochastic, const Device& device, const char* op) {
  const size_t n = params.size();
  LOMO_CHECK(grads.size() == n, op, ": ", n, " params, ", grads.size(), " grads");
  LOMO_CHECK(sq_norm.empty() || sq_norm.size() == n, op, ": ", n, " params, ", sq_norm.size(), " sq_norm slots");
  LOMO_CHECK(parameter_id.size() == n, op, ": ", n, " params, ", parameter_id.size(), " parameter_id");
  LOMO_CHECK(shard.empty() || shard.size() == 3 * n, op, ": ", n, " params, ", shard.size(), " numbers in shard");
  LOMO_CHECK(low.empty() || low.size() == n, op, ": ", n, " params, ", low.size(), " low parts");
  std::vector<Update> updates;
  updates.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    updates.push_back(update_of(params[i], grads[i], sq_norm.empty() ? nullptr : &sq_norm[i], parameter_id[i],
                                shard.empty() ? Shard{} : shard_of(shard.data() + 3 * i, 3, params[i].numel(), op),
                                low.empty() ? nullptr : &low[i], stochastic, device, op));
  }
  std::vector<Region> regions;
  regions.reserve(4 * n);
  for (const Update& update : updates) add_regions(update, regions);
  check_no_overlap(std::move(regions), op);
  return updates;
}

}  // namespace lomo
