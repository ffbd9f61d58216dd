// In place of csrc/cuda/stream.h: tensors on the CPU, on which the emulation runs the CUDA kernels.
#pragma once

#include "../checks.h"
#include "emulated_workspace.h"

#define LOMO_DISPATCH_KEY CPU

namespace lomo {
namespace cuda {

constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;

inline bool serves_every_gpu() { return true; }

class Stream {
 public:
  explicit Stream(const Device&) {}

  void* get() const { return nullptr; }
  Workspace workspace() const { return emulated_workspace(); }
  double* scratch(int64_t count) const { return emulated_scratch(count); }
};

}  // namespace cuda
}  // namespace lomo
