// Attention's softmax over a block of 64 logical positions, and two such softmaxes merged: what the kernels in
// attention.hpp are made of.
//
// Scores are in units of ln 2, so that weights are powers of two.
// Included once per level, after linear.hpp.

constexpr float kLog2E = 1.44269504f;

inline void clear_lanes(int from, int size, float* t) {
  for (int group = from / 16 * 16; group < kPositions; group += 16) {
    for (int i = 0; i < size; ++i) store(t + i * kPositions + group, splat(0.0f));
  }
}

// The next block's keys or values, of which every group of queries fetches its part from memory: of those positions
// that there are, since what lies after them takes as long to come.
struct AheadRows {
  const char* next;
  int step;      // bytes
  size_t apart;  // as many more that far away, or 0
};
// `steps`: how often a group calls `fetch_row`.
template <typename Rows>
inline AheadRows ahead_rows(Rows block, int positions, int size, int steps, int query, int queries) {
  positions = positions < 0 ? 0 : positions > kPositions ? kPositions : positions;
  const Stretch all = stretch(block, positions * size);
  const int groups = (queries + kQueryRows - 1) / kQueryRows;
  return {all.begin + query / kQueryRows * (all.bytes / groups), (all.bytes + groups * steps - 1) / (groups * steps),
          all.apart};
}
// Those of `weigh_all` over a whole block; heads of less than 16 values fetch nothing.
inline int weighing_steps(int size) { return kPositions * (size < 16 ? 1 : size / 64 + size % 64 / 16); }
inline void fetch_row(AheadRows* ahead) {
  for (int i = 0; i < ahead->step; i += 64) __builtin_prefetch(ahead->next + i, 0, 2);
  for (int i = 0; ahead->apart != 0 && i < ahead->step; i += 64)
    __builtin_prefetch(ahead->next + ahead->apart + i, 0, 2);
  ahead->next += ahead->step;
}

inline void transpose_cache(const float* from, size_t stride, float* to) {
  transpose_tile(from, stride, to, kPositions);
}
template <typename Rows>
inline void transpose_cache(Rows from, size_t stride, float* to) {
  alignas(64) float tile[256];
  for (int row = 0; row < 16; ++row) store(tile + 16 * row, load(from + row * stride));
  transpose_tile(tile, 16, to, kPositions);
}
// One key as a column.
template <typename Rows>
inline void scatter_key(Rows key, int size, float* column) {
  for (int i = 0; i < size; i += 16) {
    float lanes[16];
    store(lanes, load_first(key + i, size - i));
    for (int n = 0; n < 16 && i + n < size; ++n) column[(i + n) * kPositions] = lanes[n];
  }
}

// The first `count` of 64 keys as [size, 64]; lanes after them are zero.
template <typename Rows>
inline void transpose(Rows keys, int count, int size, float* t) {
  clear_lanes(count, size, t);
  int j = 0;
  for (; j + 16 <= count && size % 16 == 0; j += 16) {
    for (int i = 0; i < size; i += 16) {
      transpose_cache(keys + (static_cast<size_t>(j) * size + i), static_cast<size_t>(size), t + i * kPositions + j);
    }
  }
  for (; j < count; ++j) scatter_key(keys + static_cast<size_t>(j) * size, size, t + j);
}

// Scores of R queries over the first 16 G of 64 transposed keys: s [R, 64].
template <int R, int G>
inline void scores(const float* queries, const float* t, int size, AheadRows ahead, float* s) {
  Lanes sums[R][G];
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int j = 0; j < G; ++j) sums[r][j] = splat(0.0f);
  }
  for (int i = 0; i < size; ++i, t += kPositions) {
    fetch_row(&ahead);
    Lanes k[G];
    QUASAR_UNROLL
    for (int j = 0; j < G; ++j) k[j] = load(t + 16 * j);
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes q = splat(queries[static_cast<size_t>(r) * size + i]);
      QUASAR_UNROLL
      for (int j = 0; j < G; ++j) sums[r][j] = fma(q, k[j], sums[r][j]);
    }
  }
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int j = 0; j < G; ++j) store(s + r * kPositions + 16 * j, sums[r][j]);
  }
}

// Only as many lanes as `to` positions need.
template <int R>
inline void scores_up_to(const float* queries, const float* t, int size, int to, AheadRows ahead, float* s) {
  if (to <= 16) return scores<R, 1>(queries, t, size, ahead, s);
  if (to <= 32) return scores<R, 2>(queries, t, size, ahead, s);
  return scores<R, 4>(queries, t, size, ahead, s);
}

// A softmax over some positions that is not divided yet.
struct State {
  float* o;
  float m, l;
};

// Lanes of positions outside [from, to) become x.
inline void mask(Lanes* v, int from, int to, float x) {
  for (int j = 0; j < 4; ++j) v[j] = keep_first(v[j], to - 16 * j, x);
  if (from == 0) return;
  alignas(64) float lanes[kPositions];
  for (int j = 0; j < 4; ++j) store(lanes + 16 * j, v[j]);
  for (int j = 0; j < from; ++j) lanes[j] = x;
  for (int j = 0; j < 4; ++j) v[j] = load(lanes + 16 * j);
}

// Scores of positions [from, to) of a block, in place, to weights; lanes outside become 0.
inline void soften(const Attention& op, float* s, int from, int to, State* state) {
  Lanes v[4];
  for (int j = 0; j < 4; ++j) {
    v[j] = load(s + 16 * j);
    if (op.softcap > 0.0f) {
      // cap * tanh(s / cap), with tanh(x) = 1 - 2 / (e^2x + 1)
      const Lanes e = exponential(mul(v[j], splat(2.0f / (op.softcap * kLog2E))));
      v[j] = mul(splat(op.softcap * kLog2E), sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f)))));
    }
  }
  const bool whole = from == 0 && to == kPositions;
  if (!whole) mask(v, from, to, -__builtin_inff());
  state->m = largest(larger(larger(v[0], v[1]), larger(v[2], v[3])));
  for (int j = 0; j < 4; ++j) v[j] = power_of_two_up_to_one(sub(v[j], splat(state->m)));
  if (!whole) mask(v, from, to, 0.0f);
  for (int j = 0; j < 4; ++j) store(s + 16 * j, v[j]);
  state->l = sum(add(add(v[0], v[1]), add(v[2], v[3])));
}

// o = Σ weight · value over positions [from, to) in order; R rows share what they see.
template <int R, int N, typename Rows>
inline void weigh(const float* s, Rows values, int from, int to, int size, int at, AheadRows* ahead, State* states) {
  Lanes o[R][N];
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int n = 0; n < N; ++n) o[r][n] = splat(0.0f);
  }
  for (int j = from; j < to; ++j) {
    fetch_row(ahead);
    const Rows value = values + (static_cast<size_t>(j) * size + at);
    Lanes v[N];
    QUASAR_UNROLL
    for (int n = 0; n < N; ++n) v[n] = load(value + 16 * n);
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes p = splat(s[r * kPositions + j]);
      QUASAR_UNROLL
      for (int n = 0; n < N; ++n) o[r][n] = fma(p, v[n], o[r][n]);
    }
  }
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int n = 0; n < N; ++n) store(states[r].o + at + 16 * n, o[r][n]);
  }
}

template <int R, typename Rows>
inline void weigh_all(const float* s, Rows values, int from, int to, int size, AheadRows ahead, State* states) {
  int at = 0;
  for (; at + 64 <= size; at += 64) weigh<R, 4>(s, values, from, to, size, at, &ahead, states);
  for (; at + 16 <= size; at += 16) weigh<R, 1>(s, values, from, to, size, at, &ahead, states);
  for (; at < size; at += 16) {
    for (int r = 0; r < R; ++r) {
      Lanes o = splat(0.0f);
      for (int j = from; j < to; ++j) {
        o = fma(splat(s[r * kPositions + j]), load_first(values + (static_cast<size_t>(j) * size + at), size - at), o);
      }
      store_first(states[r].o + at, o, size - at);
    }
  }
}

// The same over slots that a path names.
template <typename Rows>
inline void weigh_path(const float* s, Rows values, const int* slots, int from, int to, int size, State* state) {
  for (int at = 0; at < size; at += 16) {
    const int count = size - at;
    Lanes o = splat(0.0f);
    for (int j = from; j < to; ++j) {
      o = fma(splat(s[j]), load_first(values + (static_cast<size_t>(slots[j]) * size + at), count), o);
    }
    store_first(state->o + at, o, count);
  }
}

// Two softmaxes become one: the factors of either's sums and outputs.
struct Factors {
  float before, now;
};
inline void merge_values(float* o, const float* next, Factors factors, int size) {
  const Lanes before = splat(factors.before), now = splat(factors.now);
  for (int i = 0; i < size; i += 16) {
    const int count = size - i;
    store_first(o + i, fma(load_first(o + i, count), before, mul(load_first(next + i, count), now)), count);
  }
}
inline float merge_sums(float l, float next, Factors factors) {
  return __builtin_fmaf(l, factors.before, next * factors.now);
}
inline void merge(State* all, const State& next, int size) {
  const float m = all->m > next.m ? all->m : next.m;
  alignas(64) float exponents[16] = {all->m - m, next.m - m};
  store(exponents, power_of_two_up_to_one(load(exponents)));
  const Factors factors{exponents[0], exponents[1]};
  all->l = merge_sums(all->l, next.l, factors);
  merge_values(all->o, next.o, factors, size);
  all->m = m;
}
