// One instruction level: every kernel, compiled for it. Its name is QUASAR_LEVEL, and the file that includes this one
// says what vector.hpp may use.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

#if defined(QUASAR_AVX512) || defined(QUASAR_AVX2)
#include <immintrin.h>
#elif defined(QUASAR_NEON)
#include <arm_neon.h>
#endif

namespace quasar::QUASAR_LEVEL {

#include "vector.hpp"
#include "linear.hpp"
#include "tiers.hpp"
#include "softmax.hpp"
#include "attention.hpp"
#include "sampler.hpp"

extern const Level kLevel;
const Level kLevel = {QUASAR_LEVEL_NAME, prepare_row, multiply_tiles, append_row, attention_tasks, attend,
                      merge_blocks,      argmax_row,  read_all,       sample_row};

}  // namespace quasar::QUASAR_LEVEL
