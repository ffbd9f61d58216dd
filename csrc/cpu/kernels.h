// What the kernels of one instruction set offer, and which set is in force. No torch header: the kernel sources are
// compiled once per instruction set and must not share inline functions with anything compiled otherwise.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace lomo {

// Elements are handled in tiles that stay in the first-level cache, so a second look at a gradient is free, and float64
// sums are formed tile by tile, in the same order whatever calls for them.
constexpr int64_t kTile = 4096;

// A run of elements whose indices in the whole parameter are consecutive, for stochastic rounding.
struct Stream {
  uint64_t key;          // of (seed, parameter id, step), see numerics.h
  uint64_t first_index;  // index of element 0 of the run in the whole, unsharded parameter
};

struct Kernels {
  const char* isa;

  // Sum of float32(grad * inv_scale)^2 over n elements, within 1e-6 of float64; not finite exactly when a term is not.
  double (*sum_squares[kDTypes])(const void* grad, int64_t n, float inv_scale);

  // The update of numerics.h on n elements: [parameter dtype][gradient dtype][0 nearest, 1 stochastic].
  void (*update[kDTypes][kDTypes][2])(void* param, const void* grad, int64_t n, const Scalars& scalars, Stream stream);
};

// The kernels in force: of LOMO_KERNELS_ISA, else the best the processor has. Throws std::runtime_error where that
// names no instruction set or one the processor lacks.
const Kernels& kernels();

}  // namespace lomo
