// What the operators on CUDA tensors share: arguments that may be on the device, and where their work runs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

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

inline ScalarVector scalars_on(const Tensor& scalars, const Device& device, const char* op) {
  ScalarVector vector;
  if (scalars.is_cpu()) {
    std::copy_n(scalars_of(scalars, op), int{kScalars}, vector.values);
  } else {
    check_device(scalars, device, op, "scalars");
    check_scalars(scalars, op);
    vector.device = static_cast<const double*>(scalars.const_data_ptr());
  }
  return vector;
}

// A tensor that shares the memory of a view and knows nothing of autograd.
inline Tensor tensor_of(const View& view, const Device& device) {
  constexpr ScalarType types[kDTypes] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return torch::stable::from_blob(view.data, {view.sizes.data(), view.sizes.size()},
                                  {view.strides.data(), view.strides.size()}, device, types[view.dtype]);
}

// Contiguous copies of what a kernel writes, for the kernels take contiguous tensors.
class CopiesInOrder {
 public:
  explicit CopiesInOrder(const Device& device) : device_(device) {}

  // The view's memory, or that of its copy.
  void* of(const View& view) {
    if (view.contiguous) return view.data;
    const Tensor original = tensor_of(view, device_);
    copies_.emplace_back(original, torch::stable::contiguous(original));
    return copies_.back().second.mutable_data_ptr();
  }

  void bring_back() {
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
  }

 private:
  Device device_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

}  // namespace cuda
}  // namespace lomo
