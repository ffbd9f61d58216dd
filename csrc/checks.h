// Argument checks that say what was expected and what came. For every backend.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "numerics.h"

namespace lomo {

using torch::headeronly::ScalarType;
using torch::stable::Device;
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

const Device kCPU(torch::headeronly::DeviceType::CPU);

inline std::string name_of(const Device& device) {
  if (device == kCPU) return "the CPU";
  return device.is_cuda() ? "cuda:" + std::to_string(device.index()) : "a device of another kind";
}

inline void check_device(const Tensor& tensor, const Device& device, const char* op, const char* name) {
  LOMO_CHECK(tensor.device() == device, op, ": ", name, " is on ", name_of(tensor.device()), ", expected ",
             name_of(device), ", where the parameter or slot is");
}

// Elements of a tensor, at most: 1.1e12. An expanded tensor of a few bytes may have more. Up to here no count of bytes
// overflows, nor any of the GPU kernels' numbers of 32 bits: a block of a norm has 2^30 elements.
constexpr int64_t kMostElements = int64_t{1} << 40;

// Throws if a tensor's memory does not hold all its elements. Its storage may have been freed or made smaller
// (`untyped_storage().resize_(0)`, as FSDP does), and the tensor keeps its sizes.
inline void check_storage(const Tensor& tensor, const char* op, const char* name) {
  if (tensor.numel() == 0) return;
  LOMO_CHECK(tensor.numel() <= kMostElements, op, ": ", name, " has ", tensor.numel(), " elements, expected at most ",
             kMostElements, ". Nothing was changed");
  int64_t begin = 0, bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &begin));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t end = begin + 1;
  for (size_t d = 0; d < sizes.size(); ++d) end += (sizes[d] - 1) * strides[d];
  LOMO_CHECK(end * static_cast<int64_t>(tensor.element_size()) <= bytes, op, ": ", name, " has shape ",
             shape_of(tensor), " and a storage of ", bytes, " bytes, expected ",
             end * static_cast<int64_t>(tensor.element_size()), "; its memory was freed. Nothing was changed");
}

inline void check_number(const Tensor& tensor, const char* op, const char* name) {
  LOMO_CHECK(tensor.numel() == 1, op, ": ", name, " has shape ", shape_of(tensor), ", expected one element");
  LOMO_CHECK(tensor.scalar_type() == ScalarType::Double || tensor.scalar_type() == ScalarType::Float, op, ": ", name,
             " has dtype ", toString(tensor.scalar_type()), ", expected Double or Float");
  check_storage(tensor, op, name);
}

inline void check_scalars(const Tensor& scalars, const char* op) {
  LOMO_CHECK(scalars.scalar_type() == ScalarType::Double && scalars.dim() == 1 && scalars.numel() == kScalars &&
                 scalars.is_contiguous(),
             op, ": scalars has shape ", shape_of(scalars), " and dtype ", toString(scalars.scalar_type()),
             ", expected ", int{kScalars},
             " contiguous elements of dtype Double (float64): lr, weight_decay, inv_scale, clip_value, clip_coef, "
             "found_inf, step");
  check_storage(scalars, op, "scalars");
}

// The vector of scalars of a tensor on the CPU.
inline const double* scalars_of(const Tensor& scalars, const char* op) {
  check_device(scalars, kCPU, op, "scalars");
  check_scalars(scalars, op);
  return static_cast<const double*>(scalars.const_data_ptr());
}

inline int checked_rule(int64_t rule, const char* op) {
  LOMO_CHECK(rule >= 0 && rule < Rules::kCount, op, ": rule is ", rule, ", expected a number below ",
             int{Rules::kCount}, ", which is how many rules csrc/numerics.h had when this library was built");
  return static_cast<int>(rule);
}

// A number in a one-element float64 or float32 tensor on the CPU; `missing` where none was given.
inline double number_of(const std::optional<Tensor>& tensor, const char* op, const char* name, double missing) {
  if (!tensor) return missing;
  check_device(*tensor, kCPU, op, name);
  check_number(*tensor, op, name);
  const void* data = tensor->const_data_ptr();
  return tensor->scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                     : *static_cast<const float*>(data);
}

inline double* slot_of(const Tensor& slot, const Device& device, const char* op, const char* name) {
  check_device(slot, device, op, name);
  LOMO_CHECK(slot.numel() == 1 && slot.scalar_type() == ScalarType::Double, op, ": ", name, " has shape ",
             shape_of(slot), " and dtype ", toString(slot.scalar_type()),
             ", expected one element of dtype Double (float64)");
  check_storage(slot, op, name);
  return static_cast<double*>(slot.mutable_data_ptr());
}

}  // namespace lomo
