// Chooses the instruction set, once for a process.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.hpp"

namespace batchnorm {

extern const Kernels kernels_baseline;
#ifdef BATCHNORM_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#ifdef BATCHNORM_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif
#endif

namespace {

#ifdef BATCHNORM_X86
bool known(const char* name) {
  for (const char* set : {"avx512bf16", "avx512", "avx2", "baseline"})
    if (!std::strcmp(name, set)) return true;
  return false;
}
#endif

// Best first. What is asked for is the first of those that may be taken; asking for what nobody knows is not asking.
const Kernels& choose() {
#ifdef BATCHNORM_X86
  const char* asked = std::getenv("BATCHNORM_ISA");
  bool reached = asked == nullptr || !known(asked);
  auto taken = [&](const Kernels& candidate, bool runs) {
    reached = reached || !std::strcmp(asked, candidate.name);
    return reached && runs;
  };
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // then there is F16C, too
#ifdef BATCHNORM_AVX512BF16
  if (taken(kernels_avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16"))) return kernels_avx512bf16;
#endif
  if (taken(kernels_avx512, avx512)) return kernels_avx512;
  if (taken(kernels_avx2, avx2)) return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace batchnorm
