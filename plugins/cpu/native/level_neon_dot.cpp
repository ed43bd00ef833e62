#define QUASAR_LEVEL neon_dot
#define QUASAR_LEVEL_NAME "neon-dot"
#define QUASAR_NEON
#include "level.hpp"
