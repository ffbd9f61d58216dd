// The CUDA kernels of csrc/cuda on the host, by the emulation, with their own launch planning.
#include "cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/kernels.h"
#include "emulated_workspace.h"
#include "emulation.h"

namespace py = pybind11;

namespace lomo {
namespace cuda {
namespace {

// (value, address or 0, whether float32 stands there).
using NumberTuple = std::tuple<double, uintptr_t, bool>;
// (address, dtype, elements, slot's address or 0).
using GradientTuple = std::tuple<uintptr_t, int, int64_t, uintptr_t>;
// (address, dtype, gradient, parameter id, offset, row_length, row_stride).
using ParameterTuple = std::tuple<uintptr_t, int, GradientTuple, int64_t, int64_t, int64_t, int64_t>;

Number number(const NumberTuple& t) {
  return {std::get<0>(t), reinterpret_cast<const void*>(std::get<1>(t)), std::get<2>(t)};
}

Gradient gradient(const GradientTuple& t) {
  return {reinterpret_cast<const void*>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t),
          reinterpret_cast<double*>(std::get<3>(t))};
}

// scalars: the numbers, with the step's bits, or scalars_address: of the vector on the "device".
void emulated_update(const std::vector<ParameterTuple>& parameters, const std::vector<double>& scalars,
                     uintptr_t scalars_address, int rule, bool stochastic, int64_t seed) {
  if (rule < 0 || rule >= Rules::kCount) {
    throw std::invalid_argument("rule is " + std::to_string(rule) + ", expected a number below " +
                                std::to_string(Rules::kCount) +
                                ", which is how many rules csrc/numerics.h had when this module was built");
  }
  std::vector<Parameter> list;
  for (const auto& [data, dtype, grad, id, offset, row_length, row_stride] : parameters) {
    list.push_back({reinterpret_cast<void*>(data), static_cast<DType>(dtype), gradient(grad), id,
                    Shard{offset, row_length, row_stride}});
  }
  Step step{{{}, reinterpret_cast<const double*>(scalars_address)}, rule, stochastic, seed};
  for (int i = 0; i < kScalars; ++i) step.scalars.values[i] = scalars.at(i);
  update(list, step, emulated_workspace, nullptr);
}

void emulated_sq_norm(const std::vector<GradientTuple>& gradients, const NumberTuple& inv_scale) {
  std::vector<Gradient> list;
  for (const auto& t : gradients) list.push_back(gradient(t));
  sq_norm(list, number(inv_scale), emulated_workspace, nullptr);
}

// (address, dtype, matrices, rows of each, columns).
using MatricesTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;
// Addresses of the rows' and of the columns', or 0.
using FactorsTuple = std::tuple<uintptr_t, uintptr_t>;

Matrices matrices(const MatricesTuple& t) {
  const auto& [data, dtype, count, rows, columns] = t;
  return {reinterpret_cast<const void*>(data), static_cast<DType>(dtype), count, rows, columns};
}

Factors factors(const FactorsTuple& t) {
  return {reinterpret_cast<const float*>(std::get<0>(t)), reinterpret_cast<const float*>(std::get<1>(t))};
}

// low: the address of the low parts, or 0. scalars: the address of the vector, which the kernels read.
void emulated_factored_update(const ParameterTuple& parameter, uintptr_t low, const MatricesTuple& grad,
                              const FactorsTuple& of, uintptr_t scalars, int rule, bool stochastic, int64_t seed) {
  const auto& [data, dtype, gradient_of, id, offset, row_length, row_stride] = parameter;
  const Parameter updated{reinterpret_cast<void*>(data),         static_cast<DType>(dtype),   gradient(gradient_of), id,
                          Shard{offset, row_length, row_stride}, reinterpret_cast<void*>(low)};
  factored_update(updated, matrices(grad), factors(of),
                  {{{}, reinterpret_cast<const double*>(scalars)}, rule, stochastic, seed}, nullptr);
}

void emulated_factored_sq_norm(uintptr_t slot, const MatricesTuple& grad, const FactorsTuple& of, uintptr_t scalars) {
  factored_sq_norm(reinterpret_cast<double*>(slot), matrices(grad), factors(of),
                   {{}, reinterpret_cast<const double*>(scalars)}, emulated_workspace, nullptr);
}

void emulated_factor_sums(uintptr_t row_sums, uintptr_t column_sums, const MatricesTuple& grad, uintptr_t scalars) {
  factor_sums(reinterpret_cast<double*>(row_sums), reinterpret_cast<double*>(column_sums), matrices(grad),
              {{}, reinterpret_cast<const double*>(scalars)}, emulated_scratch, nullptr);
}

}  // namespace
}  // namespace cuda

void define_cuda(py::module_& m) {
  py::module_ sub = m.def_submodule("cuda", "csrc/cuda on the host. Arrays are addresses.");
  sub.def("update", &cuda::emulated_update, py::arg("parameters"), py::arg("scalars"), py::arg("scalars_address"),
          py::arg("rule"), py::arg("stochastic"), py::arg("seed"));
  sub.def("sq_norm", &cuda::emulated_sq_norm, py::arg("gradients"), py::arg("inv_scale"));
  sub.def("factored_update", &cuda::emulated_factored_update);
  sub.def("factored_sq_norm", &cuda::emulated_factored_sq_norm);
  sub.def("factor_sums", &cuda::emulated_factor_sums);
  sub.def("set_block_order", [](uint64_t order) { emulation::block_order = order; });
  sub.def("launches", [] { return emulation::launches; }, "How many there were so far.");
  sub.attr("TILE") = cuda::kTile;
  sub.attr("SUM_BLOCKS") = cuda::kSumBlocks;
  sub.attr("NORM_BLOCKS") = cuda::kNormBlocks;
  sub.attr("TENSOR_BLOCKS") = cuda::kTensorBlocks;
  sub.attr("LAUNCH_BLOCKS") = cuda::kLaunchBlocks;
  sub.attr("SOME_ENTRIES") = cuda::kSomeEntries;
  sub.attr("TABLE_ENTRIES") = cuda::kTableEntries;
}

}  // namespace lomo
