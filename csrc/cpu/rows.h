// A matrix tensor as the kernels of products see it, checked.
#pragma once

#include "../checks.h"
#include "kernels.h"

namespace lomo {

inline Rows rows_of(const Tensor& tensor, DType dtype, const char* op, const char* name) {
  check_device(tensor, kCPU, op, name);
  LOMO_CHECK(dtype_of(tensor, op, name) == dtype, op, ": ", name, " has dtype ", toString(tensor.scalar_type()),
             ", another than the first tensor's");
  LOMO_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), op, ": ", name, " has shape ",
             shape_of(tensor), ", expected a matrix whose rows are contiguous");
  check_storage(tensor, op, name);
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

}  // namespace lomo
