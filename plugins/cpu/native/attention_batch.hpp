// The sequences of one attention call, and phases that go over the pieces of all of them.
#pragma once

#include "kernels.hpp"
#include "team.hpp"

namespace quasar {

// Where each sequence's tokens and cache are.
struct Sequences {
  int64_t count;
  const int64_t* starts;   // [count + 1]: its first row; then how many there are
  const int64_t* slots;    // [count]: which cache is its own
  const int64_t* lengths;  // [count]: committed positions

  int64_t rows(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
};

// Logical blocks that any token of a sequence sees.
struct Blocks {
  int64_t first, end;
  int64_t count() const { return end - first; }
};

inline Blocks find_blocks(const Attention& op, const Sequences& sequences, int64_t sequence) {
  const int64_t cached = sequences.lengths[sequence];
  // The first token has no ancestor among the new ones, so that none sees further back.
  const int64_t first = op.window > 0 && cached + 1 > op.window ? (cached + 1 - op.window) / kPositions : 0;
  return {first, (cached + sequences.rows(sequence) + kPositions - 1) / kPositions};
}

// One `Attention` a sequence. A phase's pieces are those of the first sequence, then those of the second, and so on.
class AttentionBatch {
 public:
  static size_t table_bytes(int64_t count) {
    return Scratch::size<Attention>(count) + kPhases * Scratch::size<int>(count);
  }

  AttentionBatch(Scratch& scratch, int64_t count) : sequences_(scratch.take<Attention>(count)) {
    for (int*& first : first_) first = scratch.take<int>(count);
  }

  void add(const Attention& op) {
    const int pieces[kPhases] = {op.rows, op.level->attention_tasks(op), op.streamed ? 0 : op.rows * op.kv_heads};
    sequences_[count_] = op;
    for (int phase = 0; phase < kPhases; ++phase) {
      first_[phase][count_] = total_[phase];
      total_[phase] += pieces[phase];
    }
    ++count_;
  }

  ort::Status* run(const ort::Api& api, const ort::KernelContext* context) {
    Phase phases[kPhases] = {{&run_piece<0, &Level::append_row>, this, total_[0]},
                             {&run_piece<1, &Level::attend>, this, total_[1]},
                             {&run_piece<2, &Level::merge_blocks>, this, total_[2]}};
    return quasar::run(api, context, phases, total_[2] == 0 ? 2 : 3);
  }

 private:
  static constexpr int kPhases = 3;  // append, attend, merge what was not streamed

  template <int phase, void (*Level::*Function)(const Attention&, int)>
  static void run_piece(void* state, int piece) {
    const auto& batch = *static_cast<const AttentionBatch*>(state);
    const int* first = batch.first_[phase];
    // The last sequence that begins at this piece or before it: one without pieces begins where the next one does.
    int low = 0, high = batch.count_;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= piece ? low : high) = middle;
    }
    const Attention& op = batch.sequences_[low];
    (op.level->*Function)(op, piece - first[low]);
  }

  Attention* sequences_;
  int* first_[kPhases];  // [count]: the sequence's first piece
  int total_[kPhases] = {};
  int count_ = 0;
};

}  // namespace quasar
