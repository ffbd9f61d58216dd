// factored_update_, factored_sq_norm_ and factor_sums_ on CUDA tensors. What they do is documented in
// lomo_kernels/ops/factored.py.
#include <torch/csrc/stable/library.h>

#include "../matrices.h"
#include "../update.h"
#include "device.h"

namespace lomo {
namespace cuda {
namespace {

// A gradient, or the contiguous copy of it that `copy` keeps.
Matrices matrices_from(const View& view, const Shape& shape, const Device& device, std::optional<Tensor>& copy) {
  const void* data = view.data;
  if (!view.contiguous) {
    copy = torch::stable::contiguous(tensor_of(view, device));
    data = copy->const_data_ptr();
  }
  return {data, view.dtype, shape.matrices, shape.rows_of_matrix(), shape.columns};
}

View grad_of(const Tensor& grad, const Device& device, const char* op) {
  return view_of(grad, const_cast<void*>(grad.const_data_ptr()), device, op, "grad");
}

void factor_sums_(const Tensor& row_sums, const Tensor& column_sums, const Tensor& grad, const Tensor& scalars) {
  const char* op = "factor_sums_";
  const Device device = device_of(grad, op, "grad");
  const ScalarVector vector = scalars_on(scalars, device, op);
  const Shape shape = matrices_of(grad, row_sums, column_sums, ScalarType::Double, device, op);
  const View view = grad_of(grad, device, op);
  if (!view.numel) return;
  check_no_overlap({vector_region<double>(row_sums, Access::kWritten, "row_sums"),
                    vector_region<double>(column_sums, Access::kWritten, "column_sums"),
                    vector_region<double>(scalars, Access::kRead, "scalars"), region_of(view, Access::kRead, "grad")},
                   op);
  Stream stream(device);
  std::optional<Tensor> copy;
  factor_sums(
      data_of<double>(row_sums), data_of<double>(column_sums), matrices_from(view, shape, device, copy), vector,
      [&](int64_t count) { return stream.scratch(count); }, stream.get());
}

void factored_sq_norm_(const Tensor& slot, const Tensor& grad, const Tensor& row_factors, const Tensor& column_factors,
                       const Tensor& scalars) {
  const char* op = "factored_sq_norm_";
  const Device device = device_of(grad, op, "grad");
  const ScalarVector vector = scalars_on(scalars, device, op);
  const Shape shape = matrices_of(grad, row_factors, column_factors, ScalarType::Float, device, op);
  const View view = grad_of(grad, device, op);
  double* sum = slot_of(slot, device, op, "slot");
  std::vector<Region> regions{region_of(sum, "slot")};
  add_factor_regions(row_factors, column_factors, regions);
  if (view.numel) regions.push_back(region_of(view, Access::kRead, "grad"));
  check_no_overlap(std::move(regions), op);
  Stream stream(device);
  std::optional<Tensor> copy;
  factored_sq_norm(
      sum, matrices_from(view, shape, device, copy),
      {data_of<const float>(row_factors), data_of<const float>(column_factors)}, vector,
      [&] { return stream.workspace(); }, stream.get());
}

void factored_update_(const Tensor& param, const Tensor& grad, const Tensor& row_factors, const Tensor& column_factors,
                      const Tensor& scalars, int64_t rule, bool stochastic, int64_t seed, int64_t parameter_id,
                      const std::vector<int64_t>& shard, const std::optional<Tensor>& low) {
  const char* op = "factored_update_";
  const Device device = device_of(param, op, "param");
  const Step step{scalars_on(scalars, device, op), checked_rule(rule, op), stochastic, seed};
  const Shape shape = matrices_of(grad, row_factors, column_factors, ScalarType::Float, device, op);
  const Update update =
      update_of(param, grad, nullptr, parameter_id, shard_of(shard.data(), shard.size(), param.numel(), op),
                low ? &*low : nullptr, stochastic, device, op);
  std::vector<Region> regions;
  add_factor_regions(row_factors, column_factors, regions);
  add_regions(update, regions);
  check_no_overlap(std::move(regions), op);
  if (!update.param.numel) return;
  Stream stream(device);
  std::optional<Tensor> copy;
  const Matrices matrices = matrices_from(update.grad, shape, device, copy);
  CopiesInOrder written(device);
  Parameter parameter{written.of(update.param),
                      update.param.dtype,
                      {matrices.data, matrices.dtype, matrices.numel()},
                      parameter_id,
                      update.shard};
  if (update.low) parameter.low = written.of(*update.low);
  factored_update(parameter, matrices, {data_of<const float>(row_factors), data_of<const float>(column_factors)}, step,
                  stream.get());
  written.bring_back();
}

}  // namespace
}  // namespace cuda
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, LOMO_DISPATCH_KEY, m) {
  if (!lomo::cuda::serves_every_gpu()) return;
  m.impl("factor_sums_", TORCH_BOX(&lomo::cuda::factor_sums_));
  m.impl("factored_sq_norm_", TORCH_BOX(&lomo::cuda::factored_sq_norm_));
  m.impl("factored_update_", TORCH_BOX(&lomo::cuda::factored_update_));
}
