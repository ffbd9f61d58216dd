// Gradients as matrices with factors or sums for their rows and columns, checked. For every backend.
#pragma once

#include "overlap.h"

namespace lomo {

// A gradient's rows and columns, and the matrices that lie below each other in it.
struct Shape {
  int64_t rows, columns, matrices;
  int64_t rows_of_matrix() const { return rows / matrices; }
};

inline void check_vector(const Tensor& tensor, ScalarType dtype, const Device& device, const char* op,
                         const char* name) {
  check_device(tensor, device, op, name);
  LOMO_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), op, ": ", name, " has dtype ",
             toString(tensor.scalar_type()), tensor.is_contiguous() ? "" : " and is not contiguous",
             ", expected a contiguous tensor of dtype ", toString(dtype));
  check_storage(tensor, op, name);
}

// `rows`: [rows]; `columns`: [matrices, columns]. An empty tensor of factors stands for ones.
inline Shape matrices_of(const Tensor& grad, const Tensor& rows, const Tensor& columns, ScalarType dtype,
                         const Device& device, const char* op) {
  LOMO_CHECK(grad.dim() == 2, op, ": grad has shape ", shape_of(grad), ", expected a matrix");
  check_vector(rows, dtype, device, op, "rows");
  check_vector(columns, dtype, device, op, "columns");
  Shape shape{grad.size(0), grad.size(1), 1};
  const bool factors = dtype == ScalarType::Float;
  LOMO_CHECK((factors && rows.numel() == 0) || (rows.dim() == 1 && rows.size(0) == shape.rows), op, ": rows has shape ",
             shape_of(rows), ", grad has shape ", shape_of(grad));
  if (factors && columns.numel() == 0) return shape;
  LOMO_CHECK(columns.dim() == 2 && columns.size(1) == shape.columns, op, ": columns has shape ", shape_of(columns),
             ", grad has shape ", shape_of(grad));
  shape.matrices = columns.size(0);
  LOMO_CHECK(shape.matrices > 0 && shape.rows % shape.matrices == 0, op, ": ", shape.matrices, " matrices in ",
             shape.rows, " rows, expected a divisor");
  return shape;
}

template <class T>
T* data_of(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(const_cast<void*>(tensor.const_data_ptr())) : nullptr;
}

template <class T>
Region vector_region(const Tensor& tensor, Access access, const char* name) {
  const char* begin = data_of<const char>(tensor);
  return {begin, begin + tensor.numel() * int64_t{sizeof(T)}, sizeof(T), nullptr, access, name};
}

inline void add_factor_regions(const Tensor& rows, const Tensor& columns, std::vector<Region>& regions) {
  regions.push_back(vector_region<float>(rows, Access::kRead, "row_factors"));
  regions.push_back(vector_region<float>(columns, Access::kRead, "column_factors"));
}

}  // namespace lomo
