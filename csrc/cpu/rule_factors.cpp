// What rules with factors make of sums, on CPU tensors. It is documented in lomo_kernels/ops/rule_factors.py. The
// numbers are few, so one thread is enough. adalomo_factors is made of torch's operators on CPUs.
#include "../rule_factors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../rule_arguments.h"

namespace lomo {
namespace {

std::tuple<Tensor, Tensor> factor_sums_total_(const Tensor& row_sums, const std::optional<Tensor>& slot,
                                              const Tensor& found_inf) {
  Total arguments = total_of(row_sums, slot, found_inf, kCPU, "factor_sums_total_");
  const Tensor total = torch::stable::sum(row_sums), is_finite = made_one(ScalarType::Bool, kCPU);
  arguments.total = data_of<double>(total);
  arguments.is_finite = data_of<bool>(is_finite);
  add_total(arguments, *arguments.total);
  return {total, is_finite};
}

Tensor make_inverse_rms(const Tensor& squares, int64_t elements, bool wide) {
  check_vector(squares, ScalarType::Double, kCPU, "inverse_rms", "squares");
  const Tensor out = made(squares, wide ? ScalarType::Double : ScalarType::Float);
  const InverseRMS a = inverse_rms_into(out, squares, elements);
  for (int64_t i = 0; i < a.count; ++i) {
    const double root = inverse_rms_of(a.squares[i], a.elements);
    wide ? void(a.wide[i] = root) : void(a.narrow[i] = static_cast<float>(root));
  }
  return out;
}

void adalomo_scale_(const Tensor& coef, const Tensor& u_squares, const Tensor& param_squares, int64_t elements,
                    double clip_threshold, double eps) {
  scale(scale_of(coef, u_squares, param_squares, elements, clip_threshold, eps, kCPU, "adalomo_scale_"));
}

void replace_states_(const std::vector<Tensor>& states, const std::vector<Tensor>& changed, const Tensor& is_finite) {
  const auto list = states_of(states, changed, is_finite, kCPU, "replace_states_");
  if (!*data_of<const bool>(is_finite)) return;
  for (const State& state : list) std::copy_n(state.from, state.count, state.state);
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) {
  m.impl("factor_sums_total_", TORCH_BOX(&lomo::factor_sums_total_));
  m.impl("inverse_rms", TORCH_BOX(&lomo::make_inverse_rms));
  m.impl("adalomo_scale_", TORCH_BOX(&lomo::adalomo_scale_));
  m.impl("replace_states_", TORCH_BOX(&lomo::replace_states_));
}
