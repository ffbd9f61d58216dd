// What the CUDA kernels offer to the operators, and to the tests, which run the same sources on the host
// (csrc/testing/emulation.h). No torch header and none of CUDA: nvcc compiles the kernels once per target.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../rule_factors.h"

namespace lomo {
namespace cuda {

// A scalar argument: a number, or one that the device reads.
struct Number {
  double value;
  const void* device = nullptr;  // float64 or float32; null: `value`
  bool is_float32 = false;
};

// The vector of scalars: the numbers, or where the device finds them.
struct ScalarVector {
  double values[kScalars];
  const double* device = nullptr;  // null: `values`
};

// What all parameters of a call have in common.
struct Step {
  ScalarVector scalars;
  int rule = 0;
  bool stochastic = false;
  int64_t seed = 0;
};

// One contiguous gradient; its sum of squares is added to `slot`, where there is one.
struct Gradient {
  const void* data;
  DType dtype;
  int64_t numel;
  double* slot = nullptr;
};

// One contiguous parameter and what updates it.
struct Parameter {
  void* data;
  DType dtype;
  Gradient grad;
  int64_t parameter_id = 0;
  Shard shard;
  void* low = nullptr;  // low parts, if it is split: bfloat16 then
};

// Elements are dealt out in tiles of this many, by their number in the tensor and by nothing else: not by the GPU, the
// alignment or the other tensors of the call. So a norm has the same bits wherever it is computed.
constexpr int kThreads = 256;  // of a block
constexpr int kShare = 16;     // elements of a tile that a thread takes, all loaded before any is used
constexpr int64_t kTile = int64_t{kThreads} * kShare;
// Blocks of one tensor, and of one launch. More tiles than that: several to a block.
//
// With a norm: 8 blocks for each of an H100's 132 multiprocessors, which has room for 4, so two waves. It is a
// constant, since the order of a sum depends on it. It is small: then several tiles share the cost of a block's end (a
// fence, a ticket), and the last block adds few partial sums. Without a norm a block has one tile: blocks that run
// together then work on neighbouring memory. On an H100, updates of 2^28 elements with several neighbouring tiles to a
// block reached 0.85 of a copy (this one with 8; torch's foreach SGD 0.86), and torch's add_ 1.02. On an H200, this
// update with one tile to a block reached 0.97 of add_.
//
// kSumBlocks, of sums of rows and columns: one
// wave of 4, because each block writes partial sums for its rows and its columns.
#if defined(LOMO_EMULATION)
// So that small tests reach all bounds.
constexpr int64_t kNormBlocks = 12, kTensorBlocks = 16, kLaunchBlocks = 448, kNormLaunchBlocks = 448;
constexpr int64_t kSumBlocks = 6;
#else
constexpr int64_t kNormBlocks = 1056, kTensorBlocks = 1048576, kLaunchBlocks = kTensorBlocks, kNormLaunchBlocks = 16384;
constexpr int64_t kSumBlocks = 528;
#endif
// Tensors in one launch: one, up to kSomeEntries, or as many as 32764 bytes of kernel arguments hold. Every launch
// copies the whole table.
constexpr int kSomeEntries = 40, kTableEntries = 368;

// Memory for the sums of tensors with several blocks. `tickets` must be zero before the first launch; every launch
// leaves them zero. Two launches that may run at the same time need two workspaces.
struct Workspace {
  double* partials;   // [kNormLaunchBlocks]
  uint32_t* tickets;  // [kTableEntries]
};
constexpr int64_t kTicketBytes = kTableEntries * sizeof(uint32_t);
constexpr int64_t kWorkspaceBytes = kNormLaunchBlocks * sizeof(double) + kTicketBytes;

// Called at most once, where a tensor's sum needs it.
using WorkspaceSource = std::function<Workspace()>;

// A contiguous gradient as matrices [rows, columns] that lie below each other.
struct Matrices {
  const void* data;
  DType dtype;
  int64_t matrices, rows, columns;
  int64_t numel() const { return matrices * rows * columns; }
};

// A factor for each row of all matrices, and for each column of each matrix; null: ones.
struct Factors {
  const float *rows, *columns;
};

// Memory for so many partial sums, which is used until the launches that follow have ended.
using ScratchSource = std::function<double*(int64_t)>;

// All queue their work on `stream` (a cudaStream_t) of the current device and return at once, and throw
// std::runtime_error where CUDA refuses. Work of a list is done in few launches.
void update(const std::vector<Parameter>& parameters, const Step& step, const WorkspaceSource& workspace, void* stream);
void sq_norm(const std::vector<Gradient>& gradients, const Number& inv_scale, const WorkspaceSource& workspace,
             void* stream);

// The operators of lomo_kernels/ops/factored.py. `parameter.grad` is the gradient's; its slot is not used.
void factored_update(const Parameter& parameter, const Matrices& grad, const Factors& factors, const Step& step,
                     void* stream);
void factored_sq_norm(double* slot, const Matrices& grad, const Factors& factors, const ScalarVector& scalars,
                      const WorkspaceSource& workspace, void* stream);
void factor_sums(double* row_sums, double* column_sums, const Matrices& grad, const ScalarVector& scalars,
                 const ScratchSource& scratch, void* stream);

// The operators of lomo_kernels/ops/rule_factors.py, a launch each.
void factor_sums_total(const Total& total, void* stream);
void inverse_rms(const InverseRMS& roots, void* stream);
void adalomo_factors(const AdaLomoFactors& factors, void* stream);
void adalomo_scale(const AdaLomoScale& scale, void* stream);
void replace_states(const std::vector<State>& states, const bool* is_finite, void* stream);

}  // namespace cuda
}  // namespace lomo
