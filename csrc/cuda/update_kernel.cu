// The update of lists of parameters on a GPU.
#include "update.cuh"

namespace lomo {
namespace cuda {
namespace {

template <int kCapacity>
struct Arguments : Table<UpdateEntry, kCapacity> {
  Step step;
};
static_assert(sizeof(Arguments<kTableEntries>) <= 32764, "what a launch can take");

// Blocks that a multiprocessor must have room for, which bounds their registers to 64 or 80: 1024 threads with 64 bytes
// each under way, or 768 with 96 or 128. Nothing may spill, with no nvcc.
template <class P, class G, bool kStochastic>
constexpr int kResident =
    sizeof(typename P::Storage) + sizeof(typename G::Storage) == 4 && !kStochastic && !kSplits<P> ? 4 : 3;

template <class P, class G, class R, bool kStochastic, int kCapacity>
__global__ void __launch_bounds__(kThreads, kResident<P, G, kStochastic>)
    update_kernel(const __grid_constant__ Arguments<kCapacity> arguments) {
  const int index = entry_of_block(arguments);
  update_tiles<P, G, R, kStochastic>(arguments.entries[index], index, NoFactors{}, arguments.step, arguments.workspace);
}

template <class P, class G, class R>
void run(std::vector<UpdateEntry>& entries, const Step& step, const WorkspaceSource& workspace, void* stream) {
  with_capacity(entries, [&](auto capacity) {
    Arguments<capacity()> arguments{};
    arguments.step = step;
    launch_all(arguments, entries, workspace, [&](uint32_t blocks) {
      constexpr bool kRounds = sizeof(typename P::Storage) < 4 && !kSplits<P>;
      launch(kRounds && step.stochastic ? update_kernel<P, G, R, kRounds, capacity()>
                                        : update_kernel<P, G, R, false, capacity()>,
             blocks, arguments, stream);
    });
  });
}

// Updates the parameters of one type, by the dtypes of their gradients.
template <class P, class Chosen>
void update_those(P, const Chosen& chosen, const std::vector<Parameter>& parameters, const Step& step,
                  const WorkspaceSource& workspace, void* stream) {
  for (int g = 0; g < kDTypes; ++g) {
    std::vector<UpdateEntry> entries;
    for (const Parameter& parameter : parameters) {
      if (chosen(parameter) && parameter.grad.dtype == g && parameter.grad.numel) {
        entries.push_back(entry_for(parameter, step.seed));
      }
    }
    if (entries.empty()) continue;
    with_format(static_cast<DType>(g), [&](auto grad) {
      Rules::with(step.rule,
                  [&](auto rule) { run<P, decltype(grad), decltype(rule)>(entries, step, workspace, stream); });
    });
  }
}

}  // namespace

void update(const std::vector<Parameter>& parameters, const Step& step, const WorkspaceSource& workspace,
            void* stream) {
  for (int p = 0; p < kDTypes; ++p) {
    with_format(static_cast<DType>(p), [&](auto param) {
      const auto chosen = [&](const Parameter& parameter) { return parameter.dtype == p && !parameter.low; };
      update_those(param, chosen, parameters, step, workspace, stream);
    });
  }
  const auto split = [](const Parameter& parameter) { return parameter.low != nullptr; };
  update_those(SplitBFloat16{}, split, parameters, step, workspace, stream);
}

}  // namespace cuda
}  // namespace lomo
