// lomo_kernels_testing: the numerics and the CUDA kernels on the host, and the bandwidth probes, for tests and benches.
// Arrays are addresses and lengths, so neither torch nor numpy is needed to build it.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "../numerics.h"
#include "cuda.h"
#include "probes.h"
#include "steps.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Format>
void define_format(py::module_& m, const char* name) {
  py::module_ sub = m.def_submodule(name);
  sub.def("widen", [](uintptr_t bits, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) at<float>(out)[i] = Format::widen(at<uint16_t>(bits)[i]);
  });
  sub.def("nearest", [](uintptr_t x, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) at<uint16_t>(out)[i] = static_cast<uint16_t>(Format::nearest(at<float>(x)[i]));
  });
  sub.def("stochastic", [](uintptr_t x, uintptr_t random, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      at<uint16_t>(out)[i] = static_cast<uint16_t>(Format::stochastic(at<float>(x)[i], at<uint32_t>(random)[i]));
    }
  });
}

}  // namespace

PYBIND11_MODULE(lomo_kernels_testing, m) {
  m.doc() =
      "csrc/numerics.h and the CUDA kernels on the host, and memory-bandwidth probes. Arrays are (address, number of "
      "elements).";
  m.def("mix64", &lomo::mix64);
  m.def("stream_key", &lomo::stream_key, py::arg("seed"), py::arg("parameter_id"), py::arg("step"));
  m.def(
      "random_bits",
      [](uint64_t stream, uint64_t counter) {
        return lomo::random_bits(lomo::block_key(stream, counter), static_cast<uint32_t>(counter));
      },
      py::arg("stream"), py::arg("counter"));
  define_format<lomo::BFloat16>(m, "bfloat16");
  define_format<lomo::Float16>(m, "float16");
  lomo::define_cuda(m);
  m.attr("READ_2_WRITE_1") = lomo::read_2_write_1().size();
  m.def(
      "read_2_write_1",
      [](uintptr_t p, uintptr_t g, int64_t bytes, size_t way) {
        lomo::read_2_write_1().at(way)(at<uint64_t>(p), at<const uint64_t>(g), bytes / 8);
      },
      py::arg("p"), py::arg("g"), py::arg("bytes"), py::arg("way") = 0, py::call_guard<py::gil_scoped_release>(),
      "Reads p and g, writes p with the values it has; 64-bit words, in one thread, in one of READ_2_WRITE_1 ways.");
  m.def(
      "read_1", [](uintptr_t p, int64_t bytes) { return lomo::read_1(at<void>(p), bytes); },
      py::call_guard<py::gil_scoped_release>(), "Reads 64-bit words, in one thread.");
  m.def("count_instructions", &lomo::count_instructions, py::arg("call"),
        "Instructions that this thread runs in call(), with some of Python's around it: compare two calls.");
}
