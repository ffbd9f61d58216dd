// What rules with factors make of sums, on CUDA tensors. It is documented in lomo_kernels/ops/rule_factors.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../rule_arguments.h"
#include "device.h"

namespace lomo {
namespace cuda {
namespace {

std::tuple<Tensor, Tensor> factor_sums_total_(const Tensor& row_sums, const std::optional<Tensor>& slot,
                                              const Tensor& found_inf) {
  const char* op = "factor_sums_total_";
  const Device device = device_of(row_sums, op, "row_sums");
  Total arguments = total_of(row_sums, slot, found_inf, device, op);
  const Tensor total = made_one(ScalarType::Double, device), is_finite = made_one(ScalarType::Bool, device);
  arguments.total = data_of<double>(total);
  arguments.is_finite = data_of<bool>(is_finite);
  factor_sums_total(arguments, Stream(device).get());
  return {total, is_finite};
}

Tensor make_inverse_rms(const Tensor& squares, int64_t elements, bool wide) {
  const char* op = "inverse_rms";
  const Device device = device_of(squares, op, "squares");
  check_vector(squares, ScalarType::Double, device, op, "squares");
  const Tensor out = made(squares, wide ? ScalarType::Double : ScalarType::Float);
  inverse_rms(inverse_rms_into(out, squares, elements), Stream(device).get());
  return out;
}

// `row` is empty if the parameter is a vector.
std::tuple<Tensor, Tensor, Tensor, Tensor> make_adalomo_factors(const Tensor& row_sums, const Tensor& column_sums,
                                                                const Tensor& row, const Tensor& column,
                                                                const Tensor& beta, double eps) {
  const char* op = "adalomo_factors";
  const Device device = device_of(column, op, "column");
  check_vector(row_sums, ScalarType::Double, device, op, "row_sums");
  check_vector(column_sums, ScalarType::Double, device, op, "column_sums");
  check_vector(row, ScalarType::Float, device, op, "row");
  check_vector(column, ScalarType::Float, device, op, "column");
  check_vector(beta, ScalarType::Float, device, op, "beta");
  LOMO_CHECK(column.dim() == 2 && same_shape(column, column_sums) && column.size(0) && beta.numel() == 1, op,
             ": column has shape ", shape_of(column), ", column_sums ", shape_of(column_sums), ", beta ",
             shape_of(beta), ", expected [matrices, columns] twice and one element");
  const int64_t matrices = column.size(0);
  LOMO_CHECK(!row.numel() || (row.dim() == 2 && row.size(0) == matrices && row.numel() == row_sums.numel()), op,
             ": row has shape ", shape_of(row), ", row_sums ", shape_of(row_sums),
             ", expected [matrices, rows] and [matrices * rows] of ", matrices, " matrices");
  const int64_t rows = row.numel();
  const Tensor row_factors = torch::stable::empty({&rows, 1}, ScalarType::Float, std::nullopt, device);
  const Tensor column_factors = made(column, ScalarType::Float), new_row = made(row, ScalarType::Float);
  const Tensor new_column = made(column, ScalarType::Float);
  adalomo_factors({data_of<const double>(row_sums), data_of<const double>(column_sums), data_of<const float>(row),
                   data_of<const float>(column), data_of<const float>(beta), matrices, row_sums.numel() / matrices,
                   column.size(1), eps, data_of<float>(row_factors), data_of<float>(column_factors),
                   data_of<float>(new_row), data_of<float>(new_column)},
                  Stream(device).get());
  return {row_factors, column_factors, new_row, new_column};
}

void adalomo_scale_(const Tensor& coef, const Tensor& u_squares, const Tensor& param_squares, int64_t elements,
                    double clip_threshold, double eps) {
  const char* op = "adalomo_scale_";
  const Device device = device_of(coef, op, "coef");
  adalomo_scale(scale_of(coef, u_squares, param_squares, elements, clip_threshold, eps, device, op),
                Stream(device).get());
}

void replace_states_(const std::vector<Tensor>& states, const std::vector<Tensor>& changed, const Tensor& is_finite) {
  const char* op = "replace_states_";
  const Device device = device_of(is_finite, op, "is_finite");
  replace_states(states_of(states, changed, is_finite, device, op), data_of<const bool>(is_finite),
                 Stream(device).get());
}

}  // namespace
}  // namespace cuda
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, LOMO_DISPATCH_KEY, m) {
  if (!lomo::cuda::serves_every_gpu()) return;
  m.impl("factor_sums_total_", TORCH_BOX(&lomo::cuda::factor_sums_total_));
  m.impl("inverse_rms", TORCH_BOX(&lomo::cuda::make_inverse_rms));
  m.impl("adalomo_factors", TORCH_BOX(&lomo::cuda::make_adalomo_factors));
  m.impl("adalomo_scale_", TORCH_BOX(&lomo::cuda::adalomo_scale_));
  m.impl("replace_states_", TORCH_BOX(&lomo::cuda::replace_states_));
}
