// Chooses the instruction set once, at load.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if LOMO_HAVE_X86_ISAS
#include <cpuid.h>
#endif
#if LOMO_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lomo {

// Element by element, and products, which use fused multiply-adds and may have an instruction set of their own.
#define LOMO_DECLARE(ELEMENTS, PRODUCTS) \
  namespace ELEMENTS {                   \
  void install_embedding(Kernels&);      \
  void install_factored(Kernels&);       \
  void install_update(Kernels&);         \
  void install_sq_norm(Kernels&);        \
  }                                      \
  namespace PRODUCTS {                   \
  void install_gram(Kernels&);           \
  void install_product(Kernels&);        \
  }
LOMO_DECLARE(baseline, baseline)
#if LOMO_HAVE_X86_ISAS
LOMO_DECLARE(avx2, avx2)
LOMO_DECLARE(avx512, avx512)
#endif
#if LOMO_HAVE_AVX512BF16
LOMO_DECLARE(avx512, avx512bf16)
#endif
#if LOMO_HAVE_AMX
LOMO_DECLARE(avx512, amx)
#endif
#undef LOMO_DECLARE

namespace {

#define LOMO_INSTALL(ELEMENTS, PRODUCTS) \
  [](Kernels& k) {                       \
    k.isa = #PRODUCTS;                   \
    ELEMENTS::install_embedding(k);      \
    ELEMENTS::install_factored(k);       \
    ELEMENTS::install_update(k);         \
    ELEMENTS::install_sq_norm(k);        \
    PRODUCTS::install_gram(k);           \
    PRODUCTS::install_product(k);        \
  }

#if LOMO_HAVE_X86_ISAS
// __builtin_cpu_supports of clang 14 does not know the names of these two. Whether the operating system saves their
// registers is checked with AVX2 and AVX-512.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}
[[maybe_unused]] bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}
#endif

#if LOMO_HAVE_AMX
// Linux keeps tile registers only for a process that asked for them. Threads made later have them too.
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTilesAndBFloat16 = 1u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTilesAndBFloat16) != kTilesAndBFloat16) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h in newer kernels
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Isa {
  std::string name;
  bool supported;
  void (*install)(Kernels&);
};

Kernels choose() {
#if LOMO_HAVE_X86_ISAS
  const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c() && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  const Isa isas[] = {
  // best first
#if LOMO_HAVE_AMX
      {"amx", avx512 && has_avx512bf16() && has_amx(), LOMO_INSTALL(avx512, amx)},
#endif
#if LOMO_HAVE_AVX512BF16
      {"avx512bf16", avx512 && has_avx512bf16(), LOMO_INSTALL(avx512, avx512bf16)},
#endif
#if LOMO_HAVE_X86_ISAS
      {"avx512", avx512, LOMO_INSTALL(avx512, avx512)},
      {"avx2", avx2, LOMO_INSTALL(avx2, avx2)},
#endif
      {"baseline", true, LOMO_INSTALL(baseline, baseline)},
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
