#define QUASAR_LEVEL avx_vnni
#define QUASAR_LEVEL_NAME "avx-vnni"
#define QUASAR_AVX2
#define QUASAR_AVXVNNI
#include "level.hpp"
