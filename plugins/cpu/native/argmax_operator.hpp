// ArgMax: the token of each row of logits.
#pragma once

#include "operator.hpp"
#include "team.hpp"

namespace quasar {

// The first of the largest of each row: logits [..., V] → int64 [...].
struct ArgMax {
  static constexpr const char* kName = "ArgMax";
  static constexpr Input kInputs[] = {{ort::kFloat, ort::kRequired}};
  static constexpr int kOutputs[] = {ort::kInt64};

  Api api;
  const Level* level;

  void read_attributes(Checks&, const KernelInfo*) {}

  void compute(Checks& checks, KernelContext* context) const {
    Tensor x;
    if (!read(api, checks, context, 0, "logits", &x)) return;
    checks.expect(x.rank >= 1 && x.last() >= 1, "%s: no logits came", kName);
    struct Work {
      const Level* level;
      const float* logits;
      int64_t columns;
      int64_t* tokens;
    } work{level, x.as<float>(), x.last(), nullptr};
    if (!checks.ok() || !write(api, checks, context, 0, x.extents, x.rank - 1, &work.tokens) || x.rows() == 0) return;
    Phase phase{[](void* state, int row) {
                  const Work& work = *static_cast<Work*>(state);
                  work.level->argmax_row(work.logits + row * work.columns, work.columns, work.tokens + row);
                },
                &work, static_cast<int>(x.rows())};
    checks.add(quasar::run(api, context, &phase, 1));
  }
};

}  // namespace quasar
