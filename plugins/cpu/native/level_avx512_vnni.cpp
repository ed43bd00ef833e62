#define QUASAR_LEVEL avx512_vnni
#define QUASAR_LEVEL_NAME "avx512-vnni"
#define QUASAR_AVX512
#include "level.hpp"
