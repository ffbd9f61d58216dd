// _product_ on CPU tensors: a matrix product of 16-bit factors with a float32 result. Documented in
// lomo_kernels/tiled.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../checks.h"
#include "kernels.h"
#include "rows.h"

namespace lomo {
namespace {

// A multiple of every register tile's columns.
constexpr int64_t kWholeTiles = 48;

// This thread's memory for packed factors, aligned to cache lines.
uint32_t* scratch() {
  thread_local const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(64, kProductScratch * sizeof(uint32_t)), &std::free);
  LOMO_CHECK(memory, "_product_: no memory for ", kProductScratch * sizeof(uint32_t), " bytes");
  return static_cast<uint32_t*>(memory.get());
}

void product_(const Tensor& out, const Tensor& grad_output, const Tensor& input, bool accumulate) {
  const char* op = "_product_";
  const DType dtype = dtype_of(input, op, "input");
  LOMO_CHECK(dtype != kFloat32, op, ": input has dtype Float, expected BFloat16 or Half (float16)");
  const Rows a = rows_of(grad_output, dtype, op, "grad_output"), b = rows_of(input, dtype, op, "input");
  LOMO_CHECK(a.rows == b.rows, op, ": input has ", b.rows, " rows, grad_output has ", a.rows);
  check_device(out, kCPU, op, "out");
  LOMO_CHECK(out.scalar_type() == ScalarType::Float && out.dim() == 2 && out.is_contiguous() &&
                 out.size(0) == a.columns && out.size(1) == b.columns,
             op, ": out has shape ", shape_of(out), " and dtype ", toString(out.scalar_type()),
             ", expected a contiguous Float (float32) matrix [", a.columns, ", ", b.columns, "]");
  check_storage(out, op, "out");
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const auto* begin = reinterpret_cast<const char*>(to);
  const auto* end = begin + 4 * a.columns * b.columns;
  for (const Rows& m : {a, b}) {
    if (!m.rows || !m.columns) continue;
    const auto* first = static_cast<const char*>(m.data);
    LOMO_CHECK(end <= first || first + 2 * ((m.rows - 1) * m.stride + m.columns) <= begin, op,
               ": out and a factor share memory: the factor would change before it is read. Nothing was changed");
  }
  // An element's sum has the same order in whatever task it stands, so the result does not depend on the threads.
  const int64_t blocks = (a.columns + kProductRows - 1) / kProductRows;
  const int64_t strips = (b.columns + kProductColumns - 1) / kProductColumns;
  if (!blocks || !strips) return;
  const int64_t width = ((b.columns + strips - 1) / strips + kWholeTiles - 1) / kWholeTiles * kWholeTiles;
  const auto kernel = kernels().product[dtype];
  torch::stable::parallel_for(0, blocks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / strips * kProductRows, column = task % strips * width;
      if (column >= b.columns) continue;
      kernel(to, b.columns, a, b, row, std::min(kProductRows, a.columns - row), column,
             std::min(width, b.columns - column), accumulate, scratch());
    }
  });
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) { m.impl("_product_", TORCH_BOX(&lomo::product_)); }
