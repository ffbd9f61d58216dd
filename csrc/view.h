// A tensor as plain numbers: where its elements lie. For every backend.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"

namespace lomo {

// Bytes of an element.
inline int64_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// A strided tensor as the kernels see it. Elements are numbered in row-major order of the shape, whatever the strides.
struct View {
  char* data;
  DType dtype;
  int64_t numel;
  bool contiguous;
  std::vector<int64_t> sizes, strides;  // only where not contiguous

  int64_t element_size() const { return size_of(dtype); }
  char* at(int64_t element) const { return data + element * element_size(); }

  // First and one past the last byte that the elements lie in.
  std::pair<const char*, const char*> range() const {
    int64_t low = 0, high = contiguous ? numel - 1 : 0;
    for (size_t d = 0; d < sizes.size(); ++d) (strides[d] < 0 ? low : high) += (sizes[d] - 1) * strides[d];
    return {at(low), at(high + 1)};
  }
};

inline View view_of(const Tensor& tensor, void* data, DType dtype, const Device& device, const char* op,
                    const char* name) {
  check_device(tensor, device, op, name);
  check_storage(tensor, op, name);
  View view{static_cast<char*>(data), dtype, tensor.numel(), tensor.is_contiguous(), {}, {}};
  if (!view.contiguous) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    view.sizes.assign(sizes.begin(), sizes.end());
    view.strides.assign(strides.begin(), strides.end());
  }
  return view;
}

inline View view_of(const Tensor& tensor, void* data, const Device& device, const char* op, const char* name) {
  return view_of(tensor, data, dtype_of(tensor, op, name), device, op, name);
}

// Whether two elements may lie in the same place (an expanded tensor, say): such a tensor cannot be updated in place.
inline bool overlaps_itself(const View& view) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), smallest stride first
  for (size_t d = 0; d < view.sizes.size(); ++d) {
    if (view.sizes[d] > 1) dims.emplace_back(view.strides[d], view.sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// Whether the elements fill the memory between the first and the last of them, each place once.
inline bool is_dense(const View& view) {
  if (view.contiguous || view.numel <= 1) return true;
  const auto [begin, end] = view.range();
  return !overlaps_itself(view) && end - begin == view.numel * view.element_size();
}

}  // namespace lomo
