// embedding_update_ and embedding_sq_norm_ on CPU tensors. What they do is documented in lomo_kernels/ops/embedding.py.
//
// Tokens are sorted by the row they looked up. Then one row's gradient after the other is summed, a tile at a time, and
// is used up: nothing is as large as the weight, or as all tokens' gradients.
#include <torch/csrc/stable/library.h>

#include <numeric>

#include "step.h"

namespace lomo {
namespace {

// ---- The gradient ----

// One use of the embedding, as far as a token's gradient needs it.
struct Use {
  DType dtype;
  int64_t column_stride;
};

struct Token {
  int64_t row;         // it looked up
  const char* values;  // its gradient's first
  size_t use;
};

struct Gradient {
  int64_t columns = 0;
  std::vector<Use> uses;
  std::vector<View> grad_outputs;
  std::vector<Token> tokens;  // by row; those of one row in the order they were given
};

// Where each token's first element lies in a tensor of which the first `dims` dimensions number the tokens.
class Places {
 public:
  Places(const Tensor& tensor, int64_t dims) : contiguous_(tensor.is_contiguous()) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    if (static_cast<int64_t>(sizes.size()) > dims) length_ = sizes[dims];
    sizes_.assign(sizes.begin(), sizes.begin() + dims);
    strides_.assign(strides.begin(), strides.begin() + dims);
  }

  int64_t operator[](int64_t token) const {
    if (contiguous_) return token * length_;
    int64_t offset = 0;
    for (size_t d = sizes_.size(); d-- > 0; token /= sizes_[d]) offset += token % sizes_[d] * strides_[d];
    return offset;
  }

 private:
  bool contiguous_;
  int64_t length_ = 1;
  std::vector<int64_t> sizes_, strides_;
};

// Eleven bits at a time, with counters that stay in the first-level cache.
void sort_by_row(std::vector<Token>& tokens) {
  constexpr int kBits = 11, kDigits = 1 << kBits;
  int64_t largest = 0;
  for (const Token& token : tokens) largest = std::max(largest, token.row);
  std::vector<Token> sorted(tokens.size());
  for (int shift = 0; shift < 63 && largest >> shift; shift += kBits) {
    const auto digit = [&](const Token& token) { return (token.row >> shift) & (kDigits - 1); };
    int64_t next[kDigits + 1] = {};
    for (const Token& token : tokens) ++next[digit(token) + 1];
    std::partial_sum(next, next + kDigits, next);
    for (const Token& token : tokens) sorted[next[digit(token)]++] = token;
    tokens.swap(sorted);
  }
}

// The pairs' tokens, checked. `rows`: num_embeddings, or INT64_MAX where it is not known.
Gradient gradient_of(const std::vector<Tensor>& indices, const std::vector<Tensor>& grad_outputs,
                     const std::vector<int64_t>& padding_idx, int64_t rows, const char* op) {
  const size_t pairs = indices.size();
  LOMO_CHECK(grad_outputs.size() == pairs && padding_idx.size() == pairs, op, ": ", pairs, " indices, ",
             grad_outputs.size(), " grad_output, ", padding_idx.size(), " padding_idx, expected one each");
  LOMO_CHECK(pairs > 0, op, ": indices is an empty list, expected one tensor per use of the embedding");
  Gradient g;
  for (size_t pair = 0; pair < pairs; ++pair) {
    const Tensor &index = indices[pair], &grad = grad_outputs[pair];
    const int64_t dims = index.dim();
    check_device(index, kCPU, op, "indices");
    const bool wide = index.scalar_type() == ScalarType::Long;
    LOMO_CHECK(wide || index.scalar_type() == ScalarType::Int, op, ": indices has dtype ",
               toString(index.scalar_type()), ", expected Long (int64) or Int (int32)");
    const auto sizes = index.sizes(), grad_sizes = grad.sizes();
    LOMO_CHECK(grad.dim() == dims + 1 && std::equal(sizes.begin(), sizes.end(), grad_sizes.begin()), op,
               ": indices has shape ", shape_of(index), ", grad_output has shape ", shape_of(grad),
               ", expected [...] and [..., embedding_dim]");
    if (pair == 0) g.columns = grad.size(dims);
    LOMO_CHECK(grad.size(dims) == g.columns, op, ": the pairs differ in embedding_dim (", g.columns, " and ",
               grad.size(dims), "), expected uses of one embedding");
    const View view = view_of(grad, const_cast<void*>(grad.const_data_ptr()), kCPU, op, "grad_output");
    const Places index_places(index, dims), grad_places(grad, dims);
    const int64_t count = index.numel();
    g.uses.push_back({view.dtype, view.contiguous ? 1 : view.strides[dims]});
    g.tokens.reserve(g.tokens.size() + count);
    check_storage(index, op, "indices");
    const void* data = index.const_data_ptr();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = index_places[i];
      const int64_t row = wide ? static_cast<const int64_t*>(data)[place] : static_cast<const int32_t*>(data)[place];
      LOMO_CHECK(row >= 0 && row < rows, op, ": indices has ", row, " as element ", i, " of pair ", pair,
                 ", expected an index >= 0", rows == INT64_MAX ? "" : " and < " + std::to_string(rows),
                 rows == INT64_MAX ? "" : ", the rows of weight; nothing was changed");
      if (row == padding_idx[pair]) continue;
      g.tokens.push_back({row, view.at(grad_places[i]), pair});
    }
    g.grad_outputs.push_back(view);
  }
  sort_by_row(g.tokens);
  return g;
}

// `n` elements, `stride` elements apart, as consecutive ones: where they lie, or copied to `buffer`.
const void* gathered(const char* from, int64_t stride, int64_t n, int64_t size, char* buffer) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < n; ++i) std::copy_n(from + i * stride * size, size, buffer + i * size);
  return buffer;
}

// Elements of some 5 us of work: what a thread is worth waking for.
constexpr int64_t kChunk = 16 * kTile;

int64_t rows_of_chunk(int64_t columns) { return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, columns)); }

// Calls tile(row, column, n, gradient) -> double for all tiles of the gradient's rows that have a token, over torch's
// threads, and returns the sum of the results, whose bits do not depend on the number of threads.
template <class F>
double sum_over_rows(const Gradient& g, const F& tile) {
  const auto add_row = kernels().add_row;
  const std::vector<Token>& tokens = g.tokens;
  const int64_t count = static_cast<int64_t>(tokens.size());
  std::vector<double> partial(count);  // a row's sum stands at its first token
  // Threads share out the tokens, not the rows: most tokens look up few rows.
  torch::stable::parallel_for(0, count, rows_of_chunk(g.columns), [&](int64_t first, int64_t last) {
    alignas(64) float sums[kTile] = {};
    alignas(64) char buffer[kTile * 4];
    while (first < last && first > 0 && tokens[first].row == tokens[first - 1].row) ++first;  // another thread's row
    for (int64_t end; first < last; first = end) {
      const int64_t row = tokens[first].row;
      for (end = first + 1; end < count && tokens[end].row == row;) ++end;
      for (int64_t column = 0; column < g.columns; column += kTile) {
        const int64_t n = std::min(kTile, g.columns - column);
        std::fill_n(sums, n, 0.0f);  // and never a copy of the first token's: 0 + -0 is 0
        for (int64_t i = first; i < end; ++i) {
          const Use& use = g.uses[tokens[i].use];
          const int64_t size = size_of(use.dtype);
          const char* values = tokens[i].values + column * use.column_stride * size;
          add_row[use.dtype](sums, gathered(values, use.column_stride, n, size, buffer), n);
        }
        partial[first] += tile(row, column, n, sums);
      }
    }
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// ---- The update ----

// Where the elements of a matrix lie.
struct Layout {
  int64_t row_stride, column_stride;
};

Layout layout_of(const View& view, int64_t columns) {
  return view.contiguous ? Layout{columns, 1} : Layout{view.strides[0], view.strides[1]};
}

struct Weight {
  View view;
  std::optional<View> low;
  int64_t rows, columns;
  Layout layout, low_layout;
};

// What a call reads and writes, for check_no_overlap(). Indices have been read. `slot` may be null.
std::vector<Region> regions_of(const Gradient& g, const double* slot, const char* slot_name) {
  std::vector<Region> regions;
  for (const View& grad : g.grad_outputs) {
    if (grad.numel) regions.push_back(region_of(grad, Access::kRead, "grad_output"));
  }
  if (slot) regions.push_back(region_of(slot, slot_name));
  return regions;
}

Weight weight_of(const Tensor& weight, const Tensor* low, const Gradient& g, const double* slot, bool stochastic,
                 const char* op) {
  LOMO_CHECK(weight.dim() == 2 && weight.size(1) == g.columns, op, ": weight has shape ", shape_of(weight),
             ", expected [num_embeddings, ", g.columns, "]");
  const View view = view_of(weight, weight.mutable_data_ptr(), kCPU, op, "weight");
  const auto low_view = low ? low_of(*low, weight, stochastic, kCPU, op) : std::nullopt;
  auto regions = regions_of(g, slot, "sq_norm");
  if (view.numel) {
    check_writable(view, op, "weight");
    regions.push_back(region_of(view, Access::kWritten, "weight"));
    if (low_view) regions.push_back(region_of(*low_view, Access::kWritten, "low"));
  }
  check_no_overlap(std::move(regions), op);
  return {view,
          low_view,
          weight.size(0),
          g.columns,
          layout_of(view, g.columns),
          low_view ? layout_of(*low_view, g.columns) : Layout{}};
}

// n elements of a matrix that follow one another in a row, as consecutive ones: where they lie, or a copy.
class Run {
 public:
  Run(const View& view, const Layout& layout, int64_t row, int64_t column, int64_t n)
      : place_(view.at(row * layout.row_stride + column * layout.column_stride)),
        stride_(layout.column_stride),
        size_(view.element_size()),
        n_(n) {
    elements_ = const_cast<void*>(gathered(place_, stride_, n, size_, buffer_));
  }

  void* data() { return elements_; }

  // Brings copied elements back.
  void store() {
    if (elements_ != buffer_) return;
    for (int64_t i = 0; i < n_; ++i) std::copy_n(buffer_ + i * size_, size_, place_ + i * stride_ * size_);
  }

 private:
  char* place_;
  int64_t stride_, size_, n_;
  void* elements_;
  alignas(64) char buffer_[kTile * 4];
};

// Updates n elements that follow one another, the first of them in this row and column.
struct Updater {
  const Weight& weight;
  const Step& step;
  const Shard& shard;
  uint64_t key;

  void operator()(int64_t row, int64_t column, int64_t n, DType grad_dtype, const void* grad) const {
    Run p(weight.view, weight.layout, row, column, n);
    const auto run = [&](void* low) {
      update_elements(step, step.scalars, key, shard, weight.view.dtype, p.data(), low, grad_dtype, grad,
                      row * weight.columns + column, n);
    };
    if (weight.low) {
      Run low(*weight.low, weight.low_layout, row, column, n);
      run(low.data());
      low.store();
    } else {
      run(nullptr);
    }
    p.store();
  }
};

// Whether an update with a zero gradient may change an element. p * 1 - (+0) is p, -0 and NaN included (but for a
// signalling NaN, which arithmetic would make quiet), and rounding changes nothing as no bits are cut. What could come
// instead of +0 shows on -0: -0 (of lr = -0, say) makes it +0, and a NaN or another number is none.
bool reaches_every_row(const Scalars& s, int rule) {
  uint32_t bits = 0;
  Rules::with(rule, [&](auto r) { bits = bits_of(updated<decltype(r)>(-0.0f, 0.0f * s.inv_scale, s)); });
  return s.decay != 1.0f || bits != bits_of(-0.0f);
}

// The rows that no token looked up: a zero gradient.
void update_others(const Weight& weight, const std::vector<Token>& tokens, const Updater& update) {
  static const char zeros[kTile * 4] = {};
  torch::stable::parallel_for(0, weight.rows, rows_of_chunk(weight.columns), [&](int64_t first, int64_t last) {
    auto token = std::lower_bound(tokens.begin(), tokens.end(), first,
                                  [](const Token& token, int64_t row) { return token.row < row; });
    while (first < last) {
      const int64_t end = token == tokens.end() ? last : std::min(last, token->row);
      // Rows without gaps between them are one long row.
      const bool gapless = weight.view.contiguous && (!weight.low || weight.low->contiguous);
      const int64_t step = gapless ? end - first : 1, length = step * weight.columns;
      for (; first < end; first += step) {
        for (int64_t column = 0; column < length; column += kTile) {
          update(first, column, std::min(kTile, length - column), weight.view.dtype, zeros);
        }
      }
      while (token != tokens.end() && token->row == first) ++token;
      ++first;
    }
  });
}

// ---- The operators ----

void embedding_sq_norm_(const Tensor& slot, const std::vector<Tensor>& indices, const std::vector<Tensor>& grad_outputs,
                        const std::vector<int64_t>& padding_idx, const std::optional<Tensor>& inv_scale) {
  const char* op = "embedding_sq_norm_";
  const float scale = static_cast<float>(number_of(inv_scale, op, "inv_scale", 1.0));
  double* sum = slot_of(slot, kCPU, op, "slot");
  const Gradient g = gradient_of(indices, grad_outputs, padding_idx, INT64_MAX, op);
  check_no_overlap(regions_of(g, sum, "slot"), op);
  const auto sum_squares = kernels().sum_squares[kFloat32];
  *sum += sum_over_rows(g, [&](int64_t, int64_t, int64_t n, const float* grad) { return sum_squares(grad, n, scale); });
}

void embedding_update_(const Tensor& weight_tensor, const std::vector<Tensor>& indices,
                       const std::vector<Tensor>& grad_outputs, const std::vector<int64_t>& padding_idx,
                       const Tensor& scalars, const std::optional<Tensor>& sq_norm, int64_t rule, bool stochastic,
                       int64_t seed, int64_t parameter_id, const std::vector<int64_t>& shard_numbers,
                       const std::optional<Tensor>& low) {
  const char* op = "embedding_update_";
  const Step step = step_from(scalars, rule, stochastic, seed, op);
  const Shard shard = shard_of(shard_numbers.data(), shard_numbers.size(), weight_tensor.numel(), op);
  LOMO_CHECK(weight_tensor.dim() == 2, op, ": weight has shape ", shape_of(weight_tensor),
             ", expected [num_embeddings, embedding_dim]");
  const Gradient g = gradient_of(indices, grad_outputs, padding_idx, weight_tensor.size(0), op);
  double* slot = sq_norm ? slot_of(*sq_norm, kCPU, op, "sq_norm") : nullptr;
  const Weight weight = weight_of(weight_tensor, low ? &*low : nullptr, g, slot, stochastic, op);
  if (step.found_inf && !slot) return;
  const Updater update{weight, step, shard, stochastic ? stream_key(seed, parameter_id, step.step) : 0};
  const auto sum_squares = kernels().sum_squares[kFloat32];
  const double sum = sum_over_rows(g, [&](int64_t row, int64_t column, int64_t n, const float* grad) {
    const double squares = slot ? sum_squares(grad, n, step.scalars.inv_scale) : 0.0;
    if (!step.found_inf) update(row, column, n, kFloat32, grad);
    return squares;
  });
  if (slot) *slot += sum;
  if (!step.found_inf && reaches_every_row(step.scalars, step.rule)) update_others(weight, g.tokens, update);
}

}  // namespace
}  // namespace lomo

STABLE_TORCH_LIBRARY_IMPL(lomo_kernels, CPU, m) {
  m.impl("embedding_update_", TORCH_BOX(&lomo::embedding_update_));
  m.impl("embedding_sq_norm_", TORCH_BOX(&lomo::embedding_sq_norm_));
}
