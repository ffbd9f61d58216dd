// For the loader: which GPUs this library has code for.
#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#define LOMO_EXPORT extern "C" __attribute__((visibility("default")))

// As compiled in, for example "sm_80 sm_90 compute_90": machine code for a GPU, and PTX for those that came after it.
LOMO_EXPORT const char* lomo_kernels_cuda_targets(void) { return LOMO_CUDA_TARGETS; }

namespace {

// Machine code runs within its major version, PTX on everything after.
bool has_code_for(int major, int minor) {
  std::istringstream targets(lomo_kernels_cuda_targets());
  for (std::string target; targets >> target;) {
    const int have = std::stoi(target.substr(target.find('_') + 1));
    if (have <= 10 * major + minor && (target[0] == 'c' || have / 10 == major)) return true;
  }
  return false;
}

}  // namespace

// Null where this library has code for every visible GPU and the driver can run it, else why not. Makes no CUDA
// context, which would take hundreds of megabytes on the GPU.
LOMO_EXPORT const char* lomo_kernels_cuda_refusal(void) {
  static thread_local std::string reason;
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  for (int device = 0; device < count && !error; ++device) {
    int major = 0, minor = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error || has_code_for(major, minor)) continue;
    reason = "GPU " + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
             std::to_string(minor) + " and the library has code for " + lomo_kernels_cuda_targets();
    return reason.c_str();
  }
  if (!error) return nullptr;
  cudaGetLastError();  // not to be found by whoever asks for the last error next
  reason = std::string("CUDA says: ") + cudaGetErrorString(error);
  return reason.c_str();
}

namespace lomo {
namespace cuda {

bool serves_every_gpu() { return !lomo_kernels_cuda_refusal(); }

}  // namespace cuda
}  // namespace lomo
