#define QUASAR_LEVEL portable
#define QUASAR_LEVEL_NAME "portable"

#include "level.hpp"
