// In place of a level that the compiler has no instructions for; `dispatch.cpp` passes over it. QUASAR_LEVEL is its name.
#include "kernels.hpp"

namespace quasar::QUASAR_LEVEL {

extern const Level kLevel;
const Level kLevel = {};

}  // namespace quasar::QUASAR_LEVEL
