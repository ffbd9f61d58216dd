// The emulated CUDA backend stands in for _cpu.so, so the operators' own tests can run on it.

extern "C" __attribute__((visibility("default"))) const char* lomo_kernels_isa(const char** /*error*/) {
  return "the CUDA kernels, emulated";
}
