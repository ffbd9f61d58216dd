#pragma once

#include <stdexcept>
#include <vector>

#include "../cuda/kernels.h"

namespace lomo {
namespace cuda {

// As on a device: one workspace for all launches, whose tickets are zero after each of them.
inline Workspace emulated_workspace() {
  static std::vector<double> partials(kNormLaunchBlocks);
  static std::vector<uint32_t> tickets(kTableEntries);
  for (const uint32_t ticket : tickets) {
    if (ticket) throw std::logic_error("a launch left a ticket that is not zero");
  }
  for (double& partial : partials) partial = __builtin_nan("");  // so that none is read that was not written
  return {partials.data(), tickets.data()};
}

inline double* emulated_scratch(int64_t count) {
  static std::vector<double> partials;
  partials.assign(count, __builtin_nan(""));
  return partials.data();
}

}  // namespace cuda
}  // namespace lomo
