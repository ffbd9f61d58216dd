// Chooses the instruction set once, at load.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lomo {

namespace baseline {
void install_sgd(Kernels&);
void install_sq_norm(Kernels&);
}  // namespace baseline
#if LOMO_HAVE_X86_ISAS
namespace avx2 {
void install_sgd(Kernels&);
void install_sq_norm(Kernels&);
}  // namespace avx2
namespace avx512 {
void install_sgd(Kernels&);
void install_sq_norm(Kernels&);
}  // namespace avx512
#endif

namespace {

#define LOMO_INSTALL(ISA)    \
  [](Kernels& k) {           \
    k.isa = #ISA;            \
    ISA::install_sgd(k);     \
    ISA::install_sq_norm(k); \
  }

struct Isa {
  std::string name;
  bool supported;
  void (*install)(Kernels&);
};

Kernels choose() {
  const Isa isas[] = {
  // best first
#if LOMO_HAVE_X86_ISAS
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       LOMO_INSTALL(avx512)},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"), LOMO_INSTALL(avx2)},
#endif
      {"baseline", true, LOMO_INSTALL(baseline)},
  };
  const char* variable = std::getenv("LOMO_KERNELS_ISA");
  const std::string forced = variable ? variable : "";
  std::string available;
  for (const Isa& isa : isas) {
    if (!isa.supported) continue;
    available += (available.empty() ? "" : ", ") + isa.name;
    if (forced.empty() || forced == isa.name) {
      Kernels k{};
      isa.install(k);
      return k;
    }
  }
  throw std::runtime_error("LOMO_KERNELS_ISA=" + forced + ": this processor and build offer " + available);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace lomo

// For the loader: the name of the instruction set in force, or nullptr and the reason in `error`.
extern "C" __attribute__((visibility("default"))) const char* lomo_kernels_isa(const char** error) {
  static std::string reason;
  try {
    return lomo::kernels().isa;
  } catch (const std::exception& e) {
    reason = e.what();
    *error = reason.c_str();
    return nullptr;
  }
}
