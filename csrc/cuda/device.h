// What the operators on CUDA tensors share: arguments that may be on the device, and where their work runs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../view.h"
#include "kernels.h"
#if defined(LOMO_EMULATION)
#include "../testing/emulated_stream.h"
#else
#include "stream.h"
#endif

namespace lomo {
namespace cuda {

inline Device device_of(const Tensor& tensor, const char* op, const char* name) {
  LOMO_CHECK(tensor.device().type() == kDeviceType, op, ": ", name, " is on ", name_of(tensor.device()),
             ", another argument on a GPU");
  return tensor.device();
}

// A number that the host knows is a tensor on the CPU; one on the GPU is left there for the kernel to read.
inline Number number_on(const std::optional<Tensor>& tensor, const Device& device, const char* op, const char* name,
                        double missing) {
  if (!tensor || tensor->is_cpu()) return {number_of(tensor, op, name, missing)};
  check_device(*tensor, device, op, name);
  check_number(*tensor, op, name);
  return {missing, tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Float};
}

inline Integer step_on(const std::optional<Tensor>& step, const Device& device, const char* op) {
  if (!step || step->is_cpu()) return {step_of(step, op)};
  check_device(*step, device, op, "step");
  check_step(*step, op);
  return {0, static_cast<const int64_t*>(step->const_data_ptr())};
}

// A tensor that shares the memory of a view and knows nothing of autograd.
inline Tensor tensor_of(const View& view, const Device& device) {
  constexpr ScalarType types[kDTypes] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return torch::stable::from_blob(view.data, {view.sizes.data(), view.sizes.size()},
                                  {view.strides.data(), view.strides.size()}, device, types[view.dtype]);
}

}  // namespace cuda
}  // namespace lomo
