// What rules with factors make of sums, on a GPU: one launch each. A sum has a fixed order: a thread adds every 256th
// number, then a warp adds its threads as a tree, then the block its warps in order.
#include "common.cuh"

namespace lomo {
namespace cuda {
namespace {

// All threads of a block must call this, once.
LOMO_DEVICE double block_sum(double x) {
  __shared__ double warps[kThreads / kWarp];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0.0;
  for (double w : warps) total += w;
  return total;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const __grid_constant__ Total arguments) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < arguments.count; i += kThreads) sum += arguments.row_sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) add_total(arguments, sum);
}

__global__ void __launch_bounds__(kThreads) inverse_rms_kernel(const __grid_constant__ InverseRMS arguments) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= arguments.count) return;
  const double root = inverse_rms_of(arguments.squares[i], arguments.elements);
  if (arguments.wide) {
    arguments.wide[i] = root;
  } else {
    arguments.narrow[i] = static_cast<float>(root);
  }
}

// A block has the rows of a matrix, because all of them are divided by their mean. The blocks after these have 256
// columns each, of all matrices.
__global__ void __launch_bounds__(kThreads) adalomo_factors_kernel(const __grid_constant__ AdaLomoFactors arguments) {
  const int64_t of_rows = arguments.row ? arguments.matrices : 0;
  const double rows = arguments.rows > 0 ? arguments.rows : 1, columns = arguments.columns > 0 ? arguments.columns : 1;
  const float beta = *arguments.beta;
  if (blockIdx.x >= of_rows) {
    const int64_t at = (blockIdx.x - of_rows) * kThreads + threadIdx.x;
    if (at >= arguments.matrices * arguments.columns) return;
    const float mean = moved(arguments.column[at], arguments.column_sums[at], rows, arguments.eps, beta);
    arguments.new_column[at] = mean;
    arguments.column_factors[at] = inverse_root(mean);
    return;
  }
  const int64_t first = blockIdx.x * arguments.rows, end = first + arguments.rows;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t at = first + threadIdx.x; at < end; at += kThreads) {
    const float mean = moved(arguments.row[at], arguments.row_sums[at], columns, arguments.eps, beta);
    arguments.new_row[at] = mean;
    sum += mean;
  }
  const double of_all = block_sum(sum) / rows;
  for (int64_t at = first + threadIdx.x; at < end; at += kThreads) {  // each thread reads what it has written
    arguments.row_factors[at] = inverse_root(arguments.new_row[at] / of_all);
  }
}

__global__ void __launch_bounds__(kThreads) adalomo_scale_kernel(const __grid_constant__ AdaLomoScale arguments) {
  if (threadIdx.x == 0) scale(arguments);
}

// States of one launch: a rule has few.
constexpr int kStates = 4;

struct States {
  State of[kStates];
  const bool* is_finite;
};

int64_t blocks_of(int64_t count) { return (count + kThreads - 1) / kThreads; }

__global__ void __launch_bounds__(kThreads) replace_states_kernel(const __grid_constant__ States arguments) {
  if (!*arguments.is_finite) return;
  int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (const State& state : arguments.of) {
    if (at < state.count) {
      state.state[at] = state.from[at];
      return;
    }
    at -= state.count;
  }
}

}  // namespace

void factor_sums_total(const Total& total, void* stream) { launch(total_kernel, 1, total, stream); }

void inverse_rms(const InverseRMS& roots, void* stream) {
  if (roots.count) launch(inverse_rms_kernel, static_cast<uint32_t>(blocks_of(roots.count)), roots, stream);
}

void adalomo_factors(const AdaLomoFactors& factors, void* stream) {
  const int64_t blocks = (factors.row ? factors.matrices : 0) + blocks_of(factors.matrices * factors.columns);
  if (blocks) launch(adalomo_factors_kernel, static_cast<uint32_t>(blocks), factors, stream);
}

void adalomo_scale(const AdaLomoScale& scale, void* stream) { launch(adalomo_scale_kernel, 1, scale, stream); }

void replace_states(const std::vector<State>& states, const bool* is_finite, void* stream) {
  for (size_t i = 0; i < states.size(); i += kStates) {
    States some{{}, is_finite};
    int64_t count = 0;
    for (size_t k = 0; k < kStates && i + k < states.size(); ++k) count += (some.of[k] = states[i + k]).count;
    if (count) launch(replace_states_kernel, static_cast<uint32_t>(blocks_of(count)), some, stream);
  }
}

}  // namespace cuda
}  // namespace lomo
