// For the loader: which GPUs this library has code for.
#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#define LOMO_EXPORT extern "C" __attribute__((visibility("default")))

// As compiled in, for example "sm_80 sm_90 compute_90": machine code for a GPU, and PTX for those that came after it.
LOMO_EXPORT const char* lomo_kernels_cuda_targets(void) { return LOMO_CUDA_TARGETS; }

// 1 where this library has code for the GPU with this index and the driver can run it; else 0 and the reason. Makes no
// CUDA context: that takes hundreds of megabytes on the GPU, and forbids a later fork.
LOMO_EXPORT int lomo_kernels_cuda_usable(int device, const char** reason) {
  static thread_local std::string text;
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) {
    cudaGetLastError();  // not to be found by whoever asks for the last error next
    text = std::string("CUDA says: ") + cudaGetErrorString(error);
    *reason = text.c_str();
    return 0;
  }
  std::istringstream targets(lomo_kernels_cuda_targets());
  for (std::string target; targets >> target;) {
    const size_t number = target.find('_') + 1;
    const int have = std::stoi(target.substr(number)), want = 10 * major + minor;
    // Machine code runs within its major version, PTX on everything after.
    if (have <= want && (target[0] == 'c' || have / 10 == major)) return 1;
  }
  text = "the GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         " and the library has code for " + lomo_kernels_cuda_targets();
  *reason = text.c_str();
  return 0;
}

namespace lomo {
namespace cuda {

bool serves_every_gpu() {
  int count = 0;
  if (cudaGetDeviceCount(&count)) cudaGetLastError(), count = 0;
  const char* reason = nullptr;
  for (int device = 0; device < count; ++device) {
    if (!lomo_kernels_cuda_usable(device, &reason)) return false;
  }
  return true;
}

}  // namespace cuda
}  // namespace lomo
