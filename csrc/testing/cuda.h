#pragma once

#include <pybind11/pybind11.h>

namespace lomo {

// The CUDA kernels, on the host, as a submodule.
void define_cuda(pybind11::module_& m);

}  // namespace lomo
