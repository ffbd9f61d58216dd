// The device and stream that kernels run on, and memory for their sums.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../checks.h"
#include "kernels.h"

#define LOMO_DISPATCH_KEY CUDA

namespace lomo {
namespace cuda {

constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;

// Whether no visible GPU lacks code in this library, see targets.cpp. Registration takes place when the library is
// loaded, and cannot be taken back.
bool serves_every_gpu();

// The device, and torch's stream on it, for as long as this lives.
class Stream {
 public:
  explicit Stream(const Device& device) : device_(device), guard_(device.index()) {
    // The macro that checks such calls has another name in torch 2.11 than in 2.13.
    if (aoti_torch_get_current_cuda_stream(device.index(), &stream_)) {
      fail("lomo_kernels: torch does not say what its current stream on ", name_of(device), " is");
    }
  }

  void* get() const { return stream_; }

  // Made once per device and stream: what runs on one stream never runs at the same time. A CUDA graph is the
  // exception, it may be replayed on any stream beside eager work on the one that it was captured on. So what is
  // captured gets memory of its own, from the graph's pool, which torch gives to nothing that may run beside it.
  Workspace workspace() {
    static auto& workspaces = *new Kept;
    return parts_of(kept(workspaces, kWorkspaceBytes, [&] { return made(); }));
  }

  // Memory for partial sums: as workspace(), but it grows.
  double* scratch(int64_t count) {
    static auto& scratches = *new Kept;
    int64_t size = 4096 * sizeof(double);
    while (size < count * int64_t{sizeof(double)}) size *= 2;  // an eighth more each time would allocate in many steps
    return static_cast<double*>(kept(scratches, size, [&] { return bytes(size); }).mutable_data_ptr());
  }

 private:
  using Kept = std::map<std::pair<int32_t, void*>, Tensor>;  // torch may be gone before our statics: none is destroyed

  // The memory of this stream, made anew if it is smaller than `size` bytes. torch gives what is dropped to others on
  // this stream only, whose work comes after all that was queued here.
  template <class Make>
  Tensor kept(Kept& tensors, int64_t size, const Make& make) {
    static std::mutex mutex;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream_), &status)) {
      fail("lomo_kernels: CUDA cannot tell whether it is capturing: ", cudaGetErrorString(error));
    }
    if (status != cudaStreamCaptureStatusNone) return captured_.emplace_back(make());
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_pair(device_.index(), stream_);
    auto found = tensors.find(key);
    if (found == tensors.end()) {
      found = tensors.emplace(key, make()).first;
    } else if (found->second.numel() < size) {
      found->second = make();
    }
    return found->second;
  }

  Tensor bytes(int64_t size) const { return torch::stable::empty({&size, 1}, ScalarType::Byte, std::nullopt, device_); }

  // Only the tickets need to be zero.
  Tensor made() const {
    Tensor tensor = bytes(kWorkspaceBytes);
    if (const cudaError_t error =
            cudaMemsetAsync(parts_of(tensor).tickets, 0, kTicketBytes, static_cast<cudaStream_t>(stream_))) {
      fail("lomo_kernels: CUDA cannot set memory to zero: ", cudaGetErrorString(error));
    }
    return tensor;
  }

  static Workspace parts_of(const Tensor& tensor) {
    auto* partials = static_cast<double*>(tensor.mutable_data_ptr());
    return {partials, reinterpret_cast<uint32_t*>(partials + kNormLaunchBlocks)};
  }

  Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> captured_;
};

}  // namespace cuda
}  // namespace lomo
