// Argument checks that say what was expected and what came, and the plain view of a tensor that the kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace lomo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The message's parts are only evaluated where the condition does not hold.
#define LOMO_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::lomo::fail(__VA_ARGS__); \
  } while (0)

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes(), sizes_b = b.sizes();
  return sizes_a.size() == sizes_b.size() && std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin());
}

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      fail(op, ": ", name, " has dtype ", toString(tensor.scalar_type()),
           ", expected Float (float32), BFloat16 or Half (float16)");
  }
}

inline void check_cpu(const Tensor& tensor, const char* op, const char* name) {
  LOMO_CHECK(tensor.is_cpu(), op, ": ", name, " is not on the CPU, where the parameter or slot is");
}

// A number in a one-element float64 or float32 tensor; `missing` where none was given.
inline double number_of(const std::optional<Tensor>& tensor, const char* op, const char* name, double missing) {
  if (!tensor) return missing;
  check_cpu(*tensor, op, name);
  LOMO_CHECK(tensor->numel() == 1, op, ": ", name, " has shape ", shape_of(*tensor), ", expected one element");
  switch (tensor->scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(tensor->const_data_ptr());
    case ScalarType::Float:
      return *static_cast<const float*>(tensor->const_data_ptr());
    default:
      fail(op, ": ", name, " has dtype ", toString(tensor->scalar_type()), ", expected Double or Float");
  }
}

inline int64_t step_of(const std::optional<Tensor>& step, const char* op) {
  if (!step) return 0;
  check_cpu(*step, op, "step");
  LOMO_CHECK(step->numel() == 1 && step->scalar_type() == ScalarType::Long, op, ": step has shape ", shape_of(*step),
             " and dtype ", toString(step->scalar_type()), ", expected one element of dtype Long (int64)");
  return *static_cast<const int64_t*>(step->const_data_ptr());
}

inline double* slot_of(const Tensor& slot, const char* op, const char* name) {
  check_cpu(slot, op, name);
  LOMO_CHECK(slot.numel() == 1 && slot.scalar_type() == ScalarType::Double, op, ": ", name, " has shape ",
             shape_of(slot), " and dtype ", toString(slot.scalar_type()),
             ", expected one element of dtype Double (float64)");
  return static_cast<double*>(slot.mutable_data_ptr());
}

}  // namespace lomo
