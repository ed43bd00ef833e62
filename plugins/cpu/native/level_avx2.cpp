#define QUASAR_LEVEL avx2
#define QUASAR_LEVEL_NAME "avx2"
#define QUASAR_AVX2
#include "level.hpp"
