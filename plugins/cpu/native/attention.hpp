// VerifyAttention: softmax over blocks of 64 logical positions, merged in order.
//
// A token's result is a function of its own logical sequence alone: the committed positions, then its ancestors among
// the new ones, then itself. A dot product sums over the head's values in order, a block sums over its positions in order, and
// blocks are merged in order. Where positions lie, how many there are, and who computes what does not enter.
// Included once per level, after softmax.hpp.

constexpr int kMostSize = 256;  // the largest head

inline int row_length(const Attention& op, int row) { return op.cached + op.depth[row] + 1; }
inline int first_position(const Attention& op, int row) {
  const int length = row_length(op, row);
  return op.window > 0 && length > op.window ? length - op.window : 0;
}

inline void rotate(const float* x, const float* cos, const float* sin, int rotary, int size, float* y) {
  const int half = rotary / 2;
  for (int i = 0; i < half; i += 16) {
    const int count = half - i;
    const Lanes a = load_first(x + i, count), b = load_first(x + half + i, count);
    const Lanes c = load_first(cos + i, count), s = load_first(sin + i, count);
    store_first(y + i, sub(mul(a, c), mul(b, s)), count);
    store_first(y + half + i, add(mul(b, c), mul(a, s)), count);
  }
  for (int i = rotary; i < size; ++i) y[i] = x[i];
}

// Keys or values of one kv head.
template <typename Cache>
inline typename RowsOf<Cache>::Written head_rows(const Attention& op, void* cache, int kv_head) {
  return RowsOf<Cache>::of_head(cache, kv_head, static_cast<size_t>(op.capacity) * op.size);
}

template <typename Cache>
constexpr bool kIsInt8 = false;
template <>
constexpr bool kIsInt8<int8_t> = true;
template <>
constexpr bool kIsInt8<BothTiers> = true;
template <>
constexpr bool kIsInt8<UpperTier> = true;

// Of the channels of one kv head.
inline const float* channels(const Attention& op, const float* scale, int kv_head) {
  return scale + static_cast<size_t>(kv_head) * op.size;
}

// A head's values after the norm: over them alone, or with the factor of all heads together.
inline void normalize_head(const Attention& op, const float* x, const float* weight, int head, float row_factor,
                           float* y) {
  if (op.row_norms) {
    scale_by(row_factor, x, weight + static_cast<size_t>(head) * op.size, op.size, y);
  } else {
    scale_by(rms_factor(x, op.epsilon, op.size), x, weight, op.size, y);
  }
}

// Norms, rotation, and the new token's keys and values into the cache.
template <typename Cache>
inline void append_row_to(const Attention& op, int row) {
  const int size = op.size, group = op.heads / op.kv_heads, half = op.rotary / 2;
  const float* x = op.qkv + static_cast<size_t>(row) * (op.heads + 2 * op.kv_heads) * size;
  const float* cos = op.cos + op.positions[row] * half;
  const float* sin = op.sin + op.positions[row] * half;
  alignas(64) float normed[kMostSize], rotated[kMostSize];
  float q_factor = 0.0f, k_factor = 0.0f;
  if (op.row_norms) {
    q_factor = rms_factor(x, op.epsilon, op.heads * size);
    k_factor = rms_factor(x + static_cast<size_t>(op.heads) * size, op.epsilon, op.kv_heads * size);
  }
  for (int head = 0; head < op.heads; ++head) {
    const float* q = x + static_cast<size_t>(head) * size;
    if (op.q_norm != nullptr) {
      normalize_head(op, q, op.q_norm, head, q_factor, normed);
      q = normed;
    }
    float* y = op.queries + ((static_cast<size_t>(head / group) * op.rows + row) * group + head % group) * size;
    rotate(q, cos, sin, op.rotary, size, rotated);
    for (int i = 0; i < size; i += 16) {
      Lanes scaled = mul(load_first(rotated + i, size - i), splat(op.scale * kLog2E));
      // What a key's integers are multiplied by is multiplied into the query, channel by channel.
      if (kIsInt8<Cache>) scaled = mul(scaled, load_first(channels(op, op.key_scale, head / group) + i, size - i));
      store_first(y + i, scaled, size - i);
    }
  }
  for (int head = 0; head < op.kv_heads; ++head) {
    const float* k = x + static_cast<size_t>(op.heads + head) * size;
    const float* v = k + static_cast<size_t>(op.kv_heads) * size;
    if (op.k_norm != nullptr) {
      normalize_head(op, k, op.k_norm, head, k_factor, normed);
      k = normed;
    }
    rotate(k, cos, sin, op.rotary, size, rotated);
    const size_t at = static_cast<size_t>(op.cached + row) * size;
    const auto key = head_rows<Cache>(op, op.key, head) + at;
    const auto value = head_rows<Cache>(op, op.value, head) + at;
    for (int i = 0; i < size; i += 16) {
      Lanes k_lanes = load_first(rotated + i, size - i), v_lanes = load_first(v + i, size - i);
      if (kIsInt8<Cache>) {
        k_lanes = div(k_lanes, load_first(channels(op, op.key_scale, head) + i, size - i));
        v_lanes = div(v_lanes, load_first(channels(op, op.value_scale, head) + i, size - i));
      }
      store_first(key + i, k_lanes, size - i);
      store_first(value + i, v_lanes, size - i);
    }
  }
}

inline void finish(const Attention& op, int head, int row, const State& state) {
  float* out = op.out + (static_cast<size_t>(row) * op.heads + head) * op.size;
  const Lanes total = splat(state.l);
  for (int i = 0; i < op.size; i += 16) {
    Lanes mean = div(load_first(state.o + i, op.size - i), total);
    if (op.value_scale != nullptr) {
      mean = mul(mean, load_first(channels(op, op.value_scale, head / (op.heads / op.kv_heads)) + i, op.size - i));
    }
    store_first(out + i, mean, op.size - i);
  }
}

inline size_t state_floats(const Attention& op) { return (static_cast<size_t>(op.size) + 15) / 16 * 16 + 16; }

inline State partial_state(const Attention& op, int kv_head, int query, int block) {
  const int group = op.heads / op.kv_heads;
  const size_t row = static_cast<size_t>(kv_head) * op.rows * group + query;
  const size_t index = row * (op.blocks - op.first_block) + (block - op.first_block);
  float* o = op.partial + index * state_floats(op);
  return {o, o[state_floats(op) - 16], o[state_floats(op) - 15]};
}

inline void keep(const Attention& op, const State& state) {
  state.o[state_floats(op) - 16] = state.m;
  state.o[state_floats(op) - 15] = state.l;
}

// What one token sees of a block: positions [from, to) of its 64.
struct Span {
  int from, to;
};
inline Span row_span(const Attention& op, int row, int block) {
  const int base = block * kPositions;
  const int from = first_position(op, row) - base, to = row_length(op, row) - base;
  return {from < 0 ? 0 : from, to > kPositions ? kPositions : to};
}

// R queries at most that see the same of a block.
template <int R, typename Rows>
inline void attend_queries(const Attention& op, const float* queries, const float* t, Rows values, Span span, int count,
                           AheadRows next_keys, AheadRows next_values, float* s, State* states) {
  if constexpr (R > 0) {
    if (count < R) {
      return attend_queries<R - 1>(op, queries, t, values, span, count, next_keys, next_values, s, states);
    }
    scores_up_to<R>(queries, t, op.size, span.to, next_keys, s);
    for (int r = 0; r < R; ++r) soften(op, s + r * kPositions, span.from, span.to, states + r);
    weigh_all<R>(s, values, span.from, span.to, op.size, next_values, states);
  }
}

// One block for the queries [first, end) of a kv head; `states` takes their results, unseen blocks are left out
// (`seen`). Nothing is read of a block that none of them sees.
template <typename Cache>
inline void attend_block(const Attention& op, int kv_head, int block, int first, int end, float* t, State* states,
                         bool* seen) {
  const int size = op.size, group = op.heads / op.kv_heads, base = block * kPositions;
  using Rows = typename RowsOf<Cache>::Read;
  const Rows all_keys = head_rows<Cache>(op, op.key, kv_head), all_values = head_rows<Cache>(op, op.value, kv_head);
  const float* queries = op.queries + static_cast<size_t>(kv_head) * op.rows * group * size;
  const Rows values = all_values + static_cast<size_t>(base) * size;
  const int slots = op.cached + op.rows - base;
  const bool shared = op.chain || base + kPositions <= op.cached;
  alignas(64) float s[kQueryRows * kPositions];
  bool any = false;
  for (int query = first; query < end; ++query) {
    const Span span = row_span(op, query / group, block);
    seen[query - first] = span.from < span.to;
    any = any || seen[query - first];
  }
  if (!any) return;
  if (shared) {
    const Rows keys = all_keys + static_cast<size_t>(base) * size;
    const size_t next = static_cast<size_t>(kPositions) * size;
    const int after = slots - kPositions, weighing = weighing_steps(size);
    transpose(keys, slots < kPositions ? slots : kPositions, size, t);
    for (int query = first; query < end;) {
      if (!seen[query - first]) {
        ++query;
        continue;
      }
      const Span span = row_span(op, query / group, block);
      int same = 1;
      while (same < kQueryRows && query + same < end) {
        const Span other = row_span(op, (query + same) / group, block);
        if (other.from != span.from || other.to != span.to) break;
        ++same;
      }
      attend_queries<kQueryRows>(op, queries + static_cast<size_t>(query) * size, t, values, span, same,
                                 ahead_rows(keys + next, after, size, size, query - first, end - first),
                                 ahead_rows(values + next, after, size, weighing, query - first, end - first), s,
                                 states + (query - first));
      query += same;
    }
    return;
  }
  // Each token's own path: its keys side by side, whatever lies between them.
  int slot[kPositions];
  for (int row = first / group; row * group < end; ++row) {
    const Span span = row_span(op, row, block);
    const int low = row * group > first ? row * group : first;
    const int high = (row + 1) * group < end ? (row + 1) * group : end;
    if (span.from >= span.to) continue;
    clear_lanes(span.to, size, t);
    for (int j = 0; j < span.to; ++j) {
      const int position = base + j;
      slot[j] = position < op.cached ? position
                                     : op.cached + op.path[static_cast<size_t>(row) * op.rows + position - op.cached];
      scatter_key(all_keys + static_cast<size_t>(slot[j]) * size, size, t + j);
    }
    for (int query = low; query < high; ++query) {
      scores_up_to<1>(queries + static_cast<size_t>(query) * size, t, size, span.to,
                      {reinterpret_cast<const char*>(t), 0, 0}, s);
      soften(op, s, span.from, span.to, states + (query - first));
      weigh_path(s, all_values, slot, span.from, span.to, size, states + (query - first));
    }
  }
}

int attention_tasks(const Attention& op) {
  const int blocks = op.blocks - op.first_block;
  return op.kv_heads * (op.streamed ? (op.rows + kStreamRows - 1) / kStreamRows : (blocks + op.run - 1) / op.run);
}

template <typename Cache>
inline void attend_to(const Attention& op, int task) {
  alignas(64) float t[kMostSize * kPositions];
  const int group = op.heads / op.kv_heads, parts = attention_tasks(op) / op.kv_heads;
  const int kv_head = task / parts, part = task % parts;
  constexpr int kQueries = 32;
  State states[kQueries];
  bool seen[kQueries];
  if (!op.streamed) {
    const int start = op.first_block + part * op.run;
    const int last = start + op.run < op.blocks ? start + op.run : op.blocks;
    for (int block = start; block < last; ++block) {
      for (int first = 0; first < op.rows * group; first += kQueries) {
        const int end = first + kQueries < op.rows * group ? first + kQueries : op.rows * group;
        for (int query = first; query < end; ++query) states[query - first] = partial_state(op, kv_head, query, block);
        attend_block<Cache>(op, kv_head, block, first, end, t, states, seen);
        for (int query = first; query < end; ++query) {
          if (seen[query - first]) keep(op, states[query - first]);
        }
      }
    }
    return;
  }
  alignas(64) float now[kQueries * kMostSize], all[kQueries * kMostSize];
  const int last_row = (part + 1) * kStreamRows < op.rows ? (part + 1) * kStreamRows : op.rows;
  for (int first = part * kStreamRows * group; first < last_row * group; first += kQueries) {
    const int end = first + kQueries < last_row * group ? first + kQueries : last_row * group;
    State merged[kQueries];
    bool begun[kQueries] = {};
    for (int block = op.first_block; block < op.blocks; ++block) {
      for (int i = 0; i < end - first; ++i) states[i] = {now + i * kMostSize, 0.0f, 0.0f};
      attend_block<Cache>(op, kv_head, block, first, end, t, states, seen);
      for (int i = 0; i < end - first; ++i) {
        if (!seen[i]) continue;
        if (begun[i]) {
          merge(&merged[i], states[i], op.size);
        } else {
          merged[i] = {all + i * kMostSize, states[i].m, states[i].l};
          for (int j = 0; j < op.size; ++j) merged[i].o[j] = states[i].o[j];
          begun[i] = true;
        }
      }
    }
    for (int i = 0; i < end - first; ++i) {
      finish(op, kv_head * group + (first + i) % group, (first + i) / group, merged[i]);
    }
  }
}

// As `merge`, block after block, with the factors of 16 blocks at a time and 64 values in registers.
inline void merge_run(const Attention& op, int kv_head, int query, int begin, int end, State* all) {
  const size_t stride = state_floats(op);
  for (int block = begin; block < end; block += 16) {
    const int count = end - block < 16 ? end - block : 16;
    const State next = partial_state(op, kv_head, query, block);
    alignas(64) float before[16] = {}, now[16] = {};
    float m = all->m;
    for (int b = 0; b < count; ++b) {
      const float here = next.o[b * stride + stride - 16];
      const float most = m > here ? m : here;
      before[b] = m - most;
      now[b] = here - most;
      m = most;
    }
    all->m = m;
    store(before, power_of_two_up_to_one(load(before)));
    store(now, power_of_two_up_to_one(load(now)));
    for (int b = 0; b < count; ++b) {
      all->l = merge_sums(all->l, next.o[b * stride + stride - 15], {before[b], now[b]});
    }
    int at = 0;
    for (; at + 64 <= op.size; at += 64) {
      Lanes o[4];
      QUASAR_UNROLL
      for (int n = 0; n < 4; ++n) o[n] = load(all->o + at + 16 * n);
      for (int b = 0; b < count; ++b) {
        const float* values = next.o + b * stride + at;
        const Lanes old = splat(before[b]), fresh = splat(now[b]);
        QUASAR_UNROLL
        for (int n = 0; n < 4; ++n) o[n] = fma(o[n], old, mul(load(values + 16 * n), fresh));
      }
      QUASAR_UNROLL
      for (int n = 0; n < 4; ++n) store(all->o + at + 16 * n, o[n]);
    }
    for (int b = 0; at < op.size && b < count; ++b) {
      merge_values(all->o + at, next.o + b * stride + at, {before[b], now[b]}, op.size - at);
    }
  }
}

// Blocks of one token and kv head that were computed one by one, merged in order.
void merge_blocks(const Attention& op, int piece) {
  const int group = op.heads / op.kv_heads, row = piece / op.kv_heads, kv_head = piece % op.kv_heads;
  const int begin = first_position(op, row) / kPositions;
  const int end = (row_length(op, row) + kPositions - 1) / kPositions;
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int query = row * group + head % group;
    State all = partial_state(op, kv_head, query, begin);
    merge_run(op, kv_head, query, begin + 1, end, &all);
    finish(op, head, row, all);
  }
}

template <typename Function>
inline void with_cache(const Attention& op, Function function) {
  switch (op.cache_type) {
    case CacheType::kFloat:
      return function(static_cast<float*>(nullptr));
    case CacheType::kHalf:
      return function(static_cast<Half*>(nullptr));
    case CacheType::kBfloat:
      return function(static_cast<Bfloat*>(nullptr));
    case CacheType::kInt8:
      return function(static_cast<int8_t*>(nullptr));
    case CacheType::kBothTiers:
      return function(static_cast<BothTiers*>(nullptr));
    case CacheType::kUpperTier:
      return function(static_cast<UpperTier*>(nullptr));
  }
}
template <typename Cache>
struct Element;
template <typename Cache>
struct Element<Cache*> {
  using Type = Cache;
};

void append_row(const Attention& op, int row) {
  with_cache(op, [&](auto kind) { append_row_to<typename Element<decltype(kind)>::Type>(op, row); });
}

void attend(const Attention& op, int task) {
  with_cache(op, [&](auto kind) { attend_to<typename Element<decltype(kind)>::Type>(op, task); });
}
