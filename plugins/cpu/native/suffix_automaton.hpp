// An online suffix automaton over token ids (plugins/suffix_automaton.py says what it answers, and is the reference).
//
// State 2p, of the first p tokens, takes 20 bytes, with its first transition: the token after them leads to state
// 2p + 2. State 2k + 1, the k-th that was split off, keeps its length and where its first transition leads to: 28 bytes.
// Other transitions are edges of 8 bytes, in a block for each state. n tokens have at most n states of either kind and n
// such edges: 56 bytes a token, and what blocks have to spare. Memory grows by chunks, so that nothing large is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "largest.hpp"
#include "slab.hpp"

namespace quasar {

class SuffixAutomaton {
 public:
  enum Result : int { kDone = 0, kNoMemory = 1, kTooLong = 2, kNoToken = 3, kNoState = 4, kNoPlace = 5 };

  // False where there is no memory.
  bool start() {
    prefixes_.start(sizeof(State), kStateChunk);
    splits_.start(sizeof(Split), kStateChunk);
    for (uint32_t size = 1; size < kSizes; ++size) blocks_[size].start(capacity(size) * sizeof(Edge), kEdgeChunk);
    uint32_t root;
    if (!prefixes_.take(&root)) return false;
    make_root();
    return true;
  }

  void clear() {
    release(true);
    uint32_t root;
    // The chunk that stays has room.
    prefixes_.take(&root);
    make_root();
  }

  void free() { release(false); }

  size_t held() const {
    size_t bytes = sizeof *this + prefixes_.held() + splits_.held();
    for (uint32_t size = 1; size < kSizes; ++size) bytes += blocks_[size].held();
    return bytes;
  }

  // Without memory the automaton is empty afterwards; with tokens that are refused it is what it was.
  Result extend(const int64_t* tokens, int64_t count) {
    if (count > kMostTokens - tokens_) return kTooLong;
    if (!are_tokens(tokens, count)) return kNoToken;
    for (int64_t i = 0; i < count; ++i) {
      if (!append(static_cast<uint32_t>(tokens[i]))) {
        clear();
        return kNoMemory;
      }
    }
    return kDone;
  }

  Result shorter(int64_t id, int64_t place[2]) const {
    if (!is_state(id)) return kNoState;
    place[0] = id == 0 ? 0 : state(static_cast<uint32_t>(id)).link;
    place[1] = length(static_cast<uint32_t>(place[0]));
    return kDone;
  }

  Result count(int64_t id, int64_t* result) const {
    if (!is_state(id)) return kNoState;
    *result = id == 0 ? tokens_ : state(static_cast<uint32_t>(id)).count;
    return kDone;
  }

  Result advance(const int64_t* tokens, int64_t count, int64_t place[2]) const {
    if (!are_tokens(tokens, count)) return kNoToken;
    if (!is_state(place[0])) return kNoState;
    uint32_t at = static_cast<uint32_t>(place[0]);
    int64_t matched = place[1];
    if (matched < (at == 0 ? 0 : 1) || matched > length(at)) return kNoPlace;
    while (at != 0 && matched <= length(state(at).link)) at = state(at).link;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t next;
      while ((next = step(at, static_cast<uint32_t>(tokens[i]))) == kNoIndex && at != 0) {
        at = state(at).link;
        matched = length(at);
      }
      if (next != kNoIndex) {
        at = next;
        ++matched;
      }
    }
    place[0] = at;
    place[1] = matched;
    return kDone;
  }

  // No fewer than the successors of a state.
  Result most_successors(int64_t id, int64_t* result) const {
    if (!is_state(id)) return kNoState;
    *result = int64_t{1} + capacity(state(static_cast<uint32_t>(id)).size);
    return kDone;
  }

  // The first `limit` successors, in arrays of that many; how many there are.
  Result successors(int64_t id, int64_t limit, int64_t* tokens, int64_t* states, int64_t* counts, int64_t* ends,
                    int64_t* found) const {
    if (!is_state(id)) return kNoState;
    // Count and end, and token and state, are one number while they are sorted.
    Largest largest{counts, states, limit};
    const auto offer = [this, &largest](uint32_t token, uint32_t target) {
      const State& to = state(target);
      largest.offer(join(to.count, to.end), join(token, target));
    };
    const State& from = state(static_cast<uint32_t>(id));
    if (from.token != kNone) offer(from.token, first_target(static_cast<uint32_t>(id)));
    if (from.size != 0) {
      const Edge* edges = block(from);
      for (uint32_t i = first_of(from.size); i < capacity(from.size); ++i)
        if (edges[i].token != kNone) offer(edges[i].token, edges[i].target);
    }
    largest.sort();
    *found = largest.count;
    for (int64_t i = 0; i < largest.count; ++i) {
      tokens[i] = states[i] >> 32;
      states[i] &= kLower;
      ends[i] = counts[i] & kLower;
      counts[i] >>= 32;
    }
    return kDone;
  }

 private:
  static constexpr int64_t kMostTokens = int64_t{1} << 26;
  static constexpr int kCountedLinks = 64;
  // Bytes. Small, so that a short sequence takes little memory, and blocks that were outgrown are freed.
  static constexpr uint32_t kStateChunk = 1u << 14, kEdgeChunk = 1u << 12;
  static constexpr uint32_t kNone = kNoIndex;
  // Blocks of that capacity or less are scanned; larger ones are hash tables, at most three quarters full.
  static constexpr uint32_t kScanned = 16;
  // The last one has room for 2^26 edges.
  static constexpr uint32_t kSizes = 54;
  static constexpr int64_t kLower = 0xffffffff;

  struct Edge {
    uint32_t token, target;
  };

  struct State {
    uint32_t token;  // of the first transition, or kNone: at the sequence's end
    uint32_t link;
    uint32_t count;
    uint32_t block;  // the other ones: an index among the blocks of their size
    uint32_t end : 26, size : 6;
  };
  struct Split : State {
    uint32_t target;  // of the first transition
    uint32_t length;
  };
  static_assert(sizeof(State) == 20 && sizeof(Split) == 28 && sizeof(Edge) == 8, "memory is counted");

  static int64_t join(uint32_t upper, uint32_t lower) {
    return static_cast<int64_t>(static_cast<uint64_t>(upper) << 32 | lower);
  }

  // Of a size of blocks: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, …
  static uint32_t capacity(uint32_t size) {
    return size == 0 ? 0 : size % 2 == 0 ? 1u << (size / 2) : (3u << (size / 2)) >> 1;
  }
  // The first place of a hash table holds the number of its edges.
  static uint32_t first_of(uint32_t size) { return capacity(size) > kScanned ? 1 : 0; }

  static bool are_tokens(const int64_t* tokens, int64_t count) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) all |= tokens[i];
    return all >> 31 == 0;
  }

  bool is_state(int64_t id) const {
    return id >= 0 && (id % 2 == 0 ? id / 2 <= tokens_ : id / 2 < static_cast<int64_t>(num_splits_));
  }

  State& state(uint32_t id) const { return *reinterpret_cast<State*>((id % 2 == 0 ? prefixes_ : splits_).at(id / 2)); }
  Split& split(uint32_t id) const { return *reinterpret_cast<Split*>(splits_.at(id / 2)); }
  int64_t length(uint32_t id) const { return id % 2 == 0 ? id / 2 : split(id).length; }
  uint32_t first_target(uint32_t id) const { return id % 2 == 0 ? id + 2 : split(id).target; }
  Edge* block(const State& of) const { return reinterpret_cast<Edge*>(blocks_[of.size].at(of.block)); }

  // Where a token is in a block, or the place where it would be; null where that is full.
  static Edge* place_of(Edge* edges, uint32_t size, uint32_t token) {
    const uint32_t room = capacity(size);
    if (room <= kScanned) {
      for (Edge* edge = edges; edge < edges + room; ++edge)
        if (edge->token == token || edge->token == kNone) return edge;
      return nullptr;
    }
    uint32_t i = 1 + static_cast<uint32_t>(uint64_t{token * 0x9E3779B1u} * (room - 1) >> 32);
    for (; edges[i].token != token && edges[i].token != kNone; i = i + 1 == room ? 1 : i + 1) {
    }
    return edges + i;
  }

  // The edge of a token other than the first, or null.
  Edge* edge(const State& from, uint32_t token) const {
    if (from.size == 0) return nullptr;
    Edge* found = place_of(block(from), from.size, token);
    return found == nullptr || found->token == kNone ? nullptr : found;
  }

  // Where a token leads to, or kNoIndex.
  uint32_t step(uint32_t id, uint32_t token) const {
    const State& from = state(id);
    if (from.token == token) return first_target(id);
    const Edge* found = edge(from, token);
    return found == nullptr ? kNoIndex : found->target;
  }

  // False where there is no memory. There is no edge of that token.
  bool add_edge(State& from, uint32_t token, uint32_t target) {
    Edge* edges = from.size == 0 ? nullptr : block(from);
    Edge* place = edges == nullptr ? nullptr : place_of(edges, from.size, token);
    const uint32_t first = first_of(from.size);
    if (place == nullptr || (first == 1 && edges[0].target == capacity(from.size) / 4 * 3)) {
      const uint32_t size = from.size + 1;
      uint32_t index;
      if (!blocks_[size].take(&index)) return false;
      Edge* larger = reinterpret_cast<Edge*>(blocks_[size].at(index));
      std::memset(larger, 0xff, capacity(size) * sizeof(Edge));
      if (first_of(size) == 1) larger[0] = {0, 0};
      for (uint32_t i = first; i < capacity(from.size); ++i)
        if (edges[i].token != kNone) put(larger, size, edges[i]);
      if (from.size != 0) blocks_[from.size].give(from.block);
      from.size = size;
      from.block = index;
      edges = larger;
    }
    put(edges, from.size, {token, target});
    return true;
  }

  static void put(Edge* edges, uint32_t size, Edge one) {
    *place_of(edges, size, one.token) = one;
    if (first_of(size) == 1) ++edges[0].target;
  }

  bool append(uint32_t token) {
    const uint32_t last = 2 * static_cast<uint32_t>(tokens_), made = last + 2;
    uint32_t index;
    if (!prefixes_.take(&index)) return false;
    const uint32_t place = static_cast<uint32_t>(tokens_++);
    state(made) = {kNone, 0, 1, 0, place, 0};
    state(last).token = token;
    uint32_t at = state(last).link, target = kNoIndex;
    for (; at != kNoIndex && (target = step(at, token)) == kNoIndex; at = state(at).link)
      if (!add_edge(state(at), token, made)) return false;
    if (at == kNoIndex) return true;
    if (length(target) > length(at) + 1 && !split_off(at, token, &target)) return false;
    state(made).link = target;
    for (int i = 0; i < kCountedLinks && target != 0; ++i) {
      State& suffix = state(target);
      ++suffix.count;
      suffix.end = place;
      target = suffix.link;
    }
    return true;
  }

  // Moves the strings of `target` that are at most one longer than those of `at` to a state of their own.
  bool split_off(uint32_t at, uint32_t token, uint32_t* target) {
    uint32_t index;
    if (!splits_.take(&index)) return false;
    const uint32_t old = *target, made = 2 * num_splits_++ + 1;
    State& from = state(old);
    Split& to = split(made);
    static_cast<State&>(to) = from;
    to.target = first_target(old);
    to.length = static_cast<uint32_t>(length(at)) + 1;
    if (from.size != 0) {
      if (!blocks_[from.size].take(&index)) return false;
      to.block = index;
      std::memcpy(block(to), block(from), capacity(to.size) * sizeof(Edge));
    }
    from.link = made;
    for (; at != kNoIndex; at = state(at).link) {
      State& shorter = state(at);
      if (shorter.token == token) {
        // Along the sequence there is nothing to redirect.
        if (first_target(at) != old) break;
        split(at).target = made;
      } else {
        Edge* found = edge(shorter, token);
        if (found == nullptr || found->target != old) break;
        found->target = made;
      }
    }
    *target = made;
    return true;
  }

  void make_root() { state(0) = {kNone, kNoIndex, 0, 0, 0, 0}; }

  void release(bool keep_chunk) {
    prefixes_.clear(keep_chunk);
    splits_.clear(false);
    for (uint32_t size = 1; size < kSizes; ++size) blocks_[size].clear(false);
    tokens_ = 0;
    num_splits_ = 0;
  }

  Slab prefixes_, splits_;
  Slab blocks_[kSizes];
  int64_t tokens_ = 0;
  uint32_t num_splits_ = 0;
};

}  // namespace quasar
