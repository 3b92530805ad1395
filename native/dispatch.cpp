// Chooses the instruction set, once for a process.
#include <cstdlib>
#include <cstring>

#include "normalize.hpp"

namespace batchnorm {

extern const Kernels kernels_baseline;
#ifdef BATCHNORM_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const Kernels& choose() {
  const char* asked = std::getenv("BATCHNORM_ISA");
  auto allowed = [&](const Kernels& one) { return asked == nullptr || *asked == 0 || !std::strcmp(asked, one.name); };
#ifdef BATCHNORM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && allowed(kernels_avx512))
    return kernels_avx512;
  bool lesser = asked != nullptr && !std::strcmp(asked, "avx512");  // asked for, and not to be had
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      (lesser || allowed(kernels_avx2)))
    return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace batchnorm
