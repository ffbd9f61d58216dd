// Whether a tensor that a call writes shares memory with another tensor of the call. lomo_kernels/ops/_overlap.py has
// the same for backends in Python.
#pragma once

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>
#include <vector>

#include "view.h"

namespace lomo {

// What a call does with a tensor. kAdded: a slot. Several gradients may have the same slot.
enum class Access { kRead, kAdded, kWritten };

// Where a tensor's elements, of `element_size` bytes, lie: from `begin` to before `end`. `view` is null if they are
// contiguous by their kind, as slots and factors are, and must outlive the region.
struct Region {
  const char *begin, *end;
  int64_t element_size;
  const View* view;
  Access access;
  const char* name;

  bool dense() const { return !view || is_dense(*view); }  // every byte in between belongs to an element
};

inline Region region_of(const View& view, Access access, const char* name) {
  const auto [begin, end] = view.range();
  return {begin, end, view.element_size(), &view, access, name};
}

inline Region region_of(const double* slot, const char* name) {
  const auto* begin = reinterpret_cast<const char*>(slot);
  return {begin, begin + sizeof *slot, sizeof *slot, nullptr, Access::kAdded, name};
}

// Whether some element of `dims` has an offset in [low, high]. `dims`: (stride, elements), largest stride first. Most
// strides are larger than what the smaller strides span. Then only one or two multiples have to be tried. After
// `budget` tries the answer is yes.
inline bool reaches(const std::pair<int64_t, int64_t>* dims, size_t n, int64_t low, int64_t high, int& budget) {
  int64_t most = 0;
  for (size_t d = 0; d < n; ++d) most += dims[d].first * (dims[d].second - 1);
  if (high < 0 || low > most) return false;
  if (low <= 0 || high >= most) return true;  // the first element, or the last
  if (--budget < 0) return true;
  const auto [stride, elements] = dims[0];
  const int64_t rest = most - stride * (elements - 1);
  const int64_t first = low > rest ? (low - rest + stride - 1) / stride : 0;
  const int64_t last = std::min(high / stride, elements - 1);
  if (n == 1) return first <= last;
  for (int64_t i = first; i <= last; ++i) {
    if (reaches(dims + 1, n - 1, low - i * stride, high - i * stride, budget)) return true;
  }
  return false;
}

// Exact, with one exception: strided views that take too long to compare count as sharing memory.
inline bool share_memory(const Region& a, const Region& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  if (a.dense() && b.dense()) return true;
  // An element of a and one of b share a byte if their addresses differ by less than an element's size. b's elements
  // are counted from its end: then the difference is a sum.
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride in bytes, elements)
  for (const Region* region : {&a, &b}) {
    const int64_t size = region->element_size;
    if (region->dense()) {
      dims.emplace_back(size, (region->end - region->begin) / size);
      continue;
    }
    const View& view = *region->view;
    for (size_t d = 0; d < view.sizes.size(); ++d) dims.emplace_back(view.strides[d] * size, view.sizes[d]);
  }
  std::sort(dims.rbegin(), dims.rend());
  std::vector<std::pair<int64_t, int64_t>> merged;
  for (const auto& [stride, elements] : dims) {
    if (!merged.empty() && merged.back().first == stride) {
      merged.back().second += elements - 1;
    } else if (stride && elements > 1) {
      merged.emplace_back(stride, elements);
    }
  }
  const int64_t distance = (b.end - b.element_size) - a.begin;
  const int64_t low = distance - (a.element_size - 1), high = distance + (b.element_size - 1);
  int budget = 10000;
  return reaches(merged.data(), merged.size(), low, high, budget);
}

// A fast check that is enough for most lists: whether no ranges overlap. Written ranges are sorted, and the others are
// searched for among them. Slots count as one range, because they mostly follow one another.
inline bool lie_apart(const std::vector<Region>& regions) {
  using Range = std::pair<const char*, const char*>;
  std::vector<Range> written;
  written.reserve(regions.size());
  Range added{nullptr, nullptr};
  for (const Region& region : regions) {
    if (region.access == Access::kWritten) written.emplace_back(region.begin, region.end);
    if (region.access != Access::kAdded) continue;
    added.first = added.first ? std::min(added.first, region.begin) : region.begin;
    added.second = std::max(added.second, region.end);
  }
  if (!std::is_sorted(written.begin(), written.end())) std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].first < written[i - 1].second) return false;
  }
  for (const Region& region : regions) {
    if (region.access == Access::kWritten) continue;
    const auto next = std::lower_bound(written.begin(), written.end(), Range{region.end, nullptr});
    if (next != written.begin() && std::prev(next)->second > region.begin) return false;
    if (region.access == Access::kRead && region.begin < added.second && added.first < region.end) return false;
  }
  return true;
}

// Throws if two regions share memory and the order of reading and writing would change the result.
inline void check_no_overlap(std::vector<Region> regions, const char* op) {
  if (lie_apart(regions)) return;
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  std::vector<const Region*> open;  // regions that end after the next one begins
  for (const Region& region : regions) {
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Region* r) { return r->end <= region.begin; }),
               open.end());
    for (const Region* other : open) {
      const bool harmless = region.access == other->access && region.access != Access::kWritten;
      if (harmless || !share_memory(*other, region)) continue;
      const bool alike = region.name == std::string_view(other->name);
      LOMO_CHECK(region.access != other->access, op, ": ", alike ? "two " : other->name, alike ? region.name : " and ",
                 alike ? "s" : region.name, " share memory; it would be updated twice. Nothing was changed");
      const auto [read, written] = std::minmax(*other, region, [](auto& a, auto& b) { return a.access < b.access; });
      fail(op, ": ", written.name, " and ", read.name, " share memory: ", read.name,
           " would change before it is read. Nothing was changed. Pass a copy of ", read.name);
    }
    open.push_back(&region);
  }
}

}  // namespace lomo
