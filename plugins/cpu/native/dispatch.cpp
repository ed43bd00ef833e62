// Which instruction level this process uses.
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace quasar {

#if defined(__x86_64__)
namespace avx512_vnni {
extern const Level kLevel;
}
namespace avx_vnni {
extern const Level kLevel;
}
namespace avx2 {
extern const Level kLevel;
}
#elif defined(__aarch64__)
namespace neon_dot {
extern const Level kLevel;
}
#endif
namespace portable {
extern const Level kLevel;
}

namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

struct Choice {
  const Level* level;
  bool usable;
};

}  // namespace

const Level* choose_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  const Choice choices[] = {{&avx512_vnni::kLevel, avx512},
                            {&avx_vnni::kLevel, avx2 && has_avx_vnni()},
                            {&avx2::kLevel, avx2},
                            {&portable::kLevel, true}};
#elif defined(__aarch64__)
#if defined(__linux__)
  const bool dot = (getauxval(AT_HWCAP) & (1ul << 20)) != 0;
#else
  const bool dot = true;
#endif
  const Choice choices[] = {{&neon_dot::kLevel, dot}, {&portable::kLevel, true}};
#else
  const Choice choices[] = {{&portable::kLevel, true}};
#endif
  const char* forced = std::getenv("QUASAR_CPU_LEVEL");
  const bool any = forced == nullptr || *forced == '\0';
  for (const Choice& choice : choices) {
    if (!choice.usable || choice.level->name == nullptr) continue;
    if (any || std::strcmp(forced, choice.level->name) == 0) return choice.level;
  }
  return nullptr;
}

}  // namespace quasar
