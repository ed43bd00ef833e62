// The functions that Python calls by name: the level, a read for bandwidth, the sampler, the suffix automaton.
#include <cstdlib>

#include "export.hpp"
#include "kernels.hpp"
#include "suffix_automaton.hpp"

// The instruction level that operators use, or an empty string where none can be used.
QUASAR_EXPORT const char* quasar_level() {
  const quasar::Level* level = quasar::choose_level();
  return level == nullptr ? "" : level->name;
}

// Reads memory once, for measuring bandwidth; the result depends on all of it.
QUASAR_EXPORT uint64_t quasar_read(const void* memory, size_t bytes) {
  const quasar::Level* level = quasar::choose_level();
  return level == nullptr ? 0 : static_cast<uint64_t>(level->read(static_cast<const float*>(memory), bytes / 4));
}

// The instruction level for `quasar_sample`; null where none can be used.
QUASAR_EXPORT const void* quasar_choose_level() { return quasar::choose_level(); }

// Draws a token: 0, or why there is none (sampler.hpp).
QUASAR_EXPORT int quasar_sample(const void* level, const quasar::Sampling* sampling, int64_t* token) {
  return static_cast<const quasar::Level*>(level)->sample_row(*sampling, token);
}

// A suffix automaton, or null where there is no memory; the others give its results (suffix_automaton.hpp).
QUASAR_EXPORT void* quasar_automaton_new() {
  auto* automaton = static_cast<quasar::SuffixAutomaton*>(std::malloc(sizeof(quasar::SuffixAutomaton)));
  if (automaton == nullptr) return nullptr;
  *automaton = quasar::SuffixAutomaton{};
  if (automaton->start()) return automaton;
  automaton->free();
  std::free(automaton);
  return nullptr;
}

QUASAR_EXPORT void quasar_automaton_free(quasar::SuffixAutomaton* automaton) {
  automaton->free();
  std::free(automaton);
}

QUASAR_EXPORT void quasar_automaton_clear(quasar::SuffixAutomaton* automaton) { automaton->clear(); }

QUASAR_EXPORT size_t quasar_automaton_bytes(const quasar::SuffixAutomaton* automaton) { return automaton->held(); }

QUASAR_EXPORT int quasar_automaton_extend(quasar::SuffixAutomaton* automaton, const int64_t* tokens, int64_t count) {
  return automaton->extend(tokens, count);
}

QUASAR_EXPORT int quasar_automaton_shorter(const quasar::SuffixAutomaton* automaton, int64_t state, int64_t place[2]) {
  return automaton->shorter(state, place);
}

QUASAR_EXPORT int quasar_automaton_count(const quasar::SuffixAutomaton* automaton, int64_t state, int64_t* count) {
  return automaton->count(state, count);
}

QUASAR_EXPORT int quasar_automaton_advance(const quasar::SuffixAutomaton* automaton, const int64_t* tokens,
                                           int64_t count, int64_t place[2]) {
  return automaton->advance(tokens, count, place);
}

QUASAR_EXPORT int quasar_automaton_most_successors(const quasar::SuffixAutomaton* automaton, int64_t state,
                                                   int64_t* most) {
  return automaton->most_successors(state, most);
}

QUASAR_EXPORT int quasar_automaton_successors(const quasar::SuffixAutomaton* automaton, int64_t state, int64_t limit,
                                              int64_t* arrays, int64_t* found) {
  return automaton->successors(state, limit, arrays, arrays + limit, arrays + 2 * limit, arrays + 3 * limit, found);
}

QUASAR_EXPORT int quasar_abi() { return 4; }
