// Walks a CPU tensor tile by tile, over torch's own threads, in an order that does not depend on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../view.h"
#include "kernels.h"

namespace lomo {

// Calls run(begin, n, index) for the longest runs of consecutive indices in elements [begin, begin + n) of a shard.
template <class Run>
void for_each_run(const Shard& shard, int64_t begin, int64_t n, const Run& run) {
  for (const int64_t end = begin + n; begin < end;) {
    const int64_t row = begin / shard.row_length, column = begin % shard.row_length;
    const int64_t length = std::min(end - begin, shard.row_length - column);
    run(begin, length, static_cast<uint64_t>(shard.offset + row * shard.row_stride + column));
    begin += length;
  }
}

// Calls visit(element's address) for elements [begin, begin + n), in row-major order.
template <class Visit>
void visit_strided(const View& view, int64_t begin, int64_t n, const Visit& visit) {
  const int64_t dims = static_cast<int64_t>(view.sizes.size());
  std::vector<int64_t> index(dims);
  int64_t offset = 0, rest = begin;
  for (int64_t d = dims - 1; d >= 0; --d) {
    index[d] = rest % view.sizes[d];
    rest /= view.sizes[d];
    offset += index[d] * view.strides[d];
  }
  for (int64_t i = 0; i < n; ++i) {
    visit(view.at(offset));
    for (int64_t d = dims - 1; d >= 0; --d) {  // the next index, carrying into the dimension before
      offset += view.strides[d];
      if (++index[d] < view.sizes[d]) break;
      offset -= index[d] * view.strides[d];
      index[d] = 0;
    }
  }
}

// One tile of a view as consecutive elements: the tensor's own memory where it is contiguous, else a copy of the tile.
class Tile {
 public:
  Tile(const View& view, int64_t begin, int64_t n) : view_(view), begin_(begin), n_(n) {
    if (view.contiguous) {
      data_ = view.at(begin);
      return;
    }
    data_ = buffer_;
    char* to = buffer_;
    visit_strided(view, begin, n, [&](const char* element) { to = copy(element, to); });
  }

  void* data() { return data_; }

  // Brings a copied tile's elements back to the tensor.
  void store() {
    if (view_.contiguous) return;
    const char* from = buffer_;
    visit_strided(view_, begin_, n_, [&](char* element) {
      copy(from, element);
      from += view_.element_size();
    });
  }

 private:
  char* copy(const char* from, char* to) const { return std::copy(from, from + view_.element_size(), to); }

  const View& view_;
  int64_t begin_, n_;
  char* data_;
  alignas(64) char buffer_[kTile * 4];
};

// Calls tile(begin, n) -> double for consecutive tiles of `numel` elements and returns the sum of the results. Partial
// sums belong to fixed chunks of tiles, so the sum has the same bits for any number of threads.
template <class F>
double sum_over_tiles(int64_t numel, const F& tile) {
  constexpr int64_t kChunk = 16 * kTile;  // 65536 elements, some 5 us of work: what a thread is worth waking for
  const auto chunk_sum = [&](int64_t chunk) {
    double sum = 0.0;
    const int64_t end = std::min(numel, (chunk + 1) * kChunk);
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) sum += tile(begin, std::min(kTile, end - begin));
    return sum;
  };
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  if (chunks <= 1) return chunks ? chunk_sum(0) : 0.0;
  std::vector<double> partial(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) partial[chunk] = chunk_sum(chunk);
  });
  double sum = 0.0;
  for (const double p : partial) sum += p;
  return sum;
}

}  // namespace lomo
