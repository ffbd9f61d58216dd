// The arguments of the operators of lomo_kernels/ops/rule_factors.py, checked, and the tensors that they make. For
// every backend.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "matrices.h"
#include "rule_factors.h"

namespace lomo {

inline double elements_of(int64_t elements) { return static_cast<double>(std::max<int64_t>(elements, 1)); }

inline Tensor made(const Tensor& like, ScalarType dtype) {
  const auto sizes = like.sizes();
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, like.device());
}

inline Tensor made_one(ScalarType dtype, const Device& device) {
  return torch::stable::empty({}, dtype, std::nullopt, device);
}

// The total of sums of rows, whose own memory and that of `is_finite` the caller adds.
inline Total total_of(const Tensor& row_sums, const std::optional<Tensor>& slot, const Tensor& found_inf,
                      const Device& device, const char* op) {
  check_vector(row_sums, ScalarType::Double, device, op, "row_sums");
  Total total{};
  total.row_sums = data_of<const double>(row_sums);
  total.count = row_sums.numel();
  total.slot = slot ? slot_of(*slot, device, op, "slot") : nullptr;
  total.found_inf = slot_of(found_inf, device, op, "found_inf");
  std::vector<Region> regions{vector_region<double>(row_sums, Access::kRead, "row_sums"),
                              vector_region<double>(found_inf, Access::kWritten, "found_inf")};
  if (slot) regions.push_back(region_of(total.slot, "slot"));
  check_no_overlap(std::move(regions), op);
  return total;
}

inline InverseRMS inverse_rms_into(const Tensor& out, const Tensor& squares, int64_t elements) {
  const bool is_wide = out.scalar_type() == ScalarType::Double;
  return {data_of<const double>(squares), squares.numel(), elements_of(elements),
          is_wide ? data_of<double>(out) : nullptr, is_wide ? nullptr : data_of<float>(out)};
}

inline AdaLomoScale scale_of(const Tensor& coef, const Tensor& u_squares, const Tensor& param_squares, int64_t elements,
                             double clip_threshold, double eps, const Device& device, const char* op) {
  const AdaLomoScale scale{slot_of(coef, device, op, "coef"),
                           slot_of(u_squares, device, op, "u_squares"),
                           slot_of(param_squares, device, op, "param_squares"),
                           elements_of(elements),
                           clip_threshold,
                           eps};
  check_no_overlap({vector_region<double>(coef, Access::kWritten, "coef"),
                    vector_region<double>(u_squares, Access::kRead, "u_squares"),
                    vector_region<double>(param_squares, Access::kRead, "param_squares")},
                   op);
  return scale;
}

inline std::vector<State> states_of(const std::vector<Tensor>& states, const std::vector<Tensor>& changed,
                                    const Tensor& is_finite, const Device& device, const char* op) {
  LOMO_CHECK(states.size() == changed.size(), op, ": ", changed.size(), " new for ", states.size(),
             " states, expected one each");
  check_vector(is_finite, ScalarType::Bool, device, op, "is_finite");
  LOMO_CHECK(is_finite.numel() == 1, op, ": is_finite has shape ", shape_of(is_finite), ", expected one element");
  std::vector<State> list;
  std::vector<Region> regions;
  for (size_t i = 0; i < states.size(); ++i) {
    check_vector(states[i], ScalarType::Float, device, op, "states");
    check_vector(changed[i], ScalarType::Float, device, op, "new");
    LOMO_CHECK(same_shape(states[i], changed[i]), op, ": new has shape ", shape_of(changed[i]), ", states has shape ",
               shape_of(states[i]));
    list.push_back({data_of<float>(states[i]), data_of<const float>(changed[i]), states[i].numel()});
    regions.push_back(vector_region<float>(states[i], Access::kWritten, "states"));
    regions.push_back(vector_region<float>(changed[i], Access::kRead, "new"));
  }
  check_no_overlap(std::move(regions), op);
  return list;
}

}  // namespace lomo
