// VerifyAttention for each type of cache: checks of everything that comes in, and the phases of a call.
#pragma once

#include <cstring>

#include "attention_batch.hpp"
#include "operator.hpp"

namespace quasar {

constexpr int64_t kMostHeadSize = 256;
// Floats of a call for the states of blocks; sequences that have no room any more are streamed. A sequence that is
// streamed is few tasks: where those of all leave cores idle, there is more room, though more memory is written.
constexpr size_t kPartialFloats = 1u << 20, kMostPartialFloats = 1u << 24;

inline size_t partial_room(int64_t streamed_tasks, int cores) {
  return streamed_tasks < cores ? kMostPartialFloats : kPartialFloats;
}

struct FloatCache {
  static constexpr CacheType kType = CacheType::kFloat;
  static constexpr bool kScaled = false, kTiers = false;
  static constexpr int kElement = ort::kFloat;
  static constexpr size_t kBytes = 4;
  static constexpr const char* kName = "VerifyAttention";
};
struct HalfCache {
  static constexpr CacheType kType = CacheType::kHalf;
  static constexpr bool kScaled = false, kTiers = false;
  static constexpr int kElement = ort::kFloat16;
  static constexpr size_t kBytes = 2;
  static constexpr const char* kName = "VerifyAttentionFloat16";
};
struct BfloatCache {
  static constexpr CacheType kType = CacheType::kBfloat;
  static constexpr bool kScaled = false, kTiers = false;
  static constexpr int kElement = ort::kBfloat16;
  static constexpr size_t kBytes = 2;
  static constexpr const char* kName = "VerifyAttentionBfloat16";
};

// With a scale of each channel of a kv head, which two further inputs bring.
struct Int8Cache {
  static constexpr CacheType kType = CacheType::kInt8;
  static constexpr bool kScaled = true, kTiers = false;
  static constexpr int kElement = ort::kInt8;
  static constexpr size_t kBytes = 1;
  static constexpr const char* kName = "VerifyAttentionInt8";
};
// The same integers in two tiers, [slots, 2 kv heads, capacity, size / 2]: both are read, or the upper one.
struct BothTiersCache {
  static constexpr CacheType kType = CacheType::kBothTiers;
  static constexpr bool kScaled = true, kTiers = true;
  static constexpr int kElement = ort::kInt8;
  static constexpr size_t kBytes = 1;
  static constexpr const char* kName = "VerifyAttentionTiers";
};
struct UpperTierCache {
  static constexpr CacheType kType = CacheType::kUpperTier;
  static constexpr bool kScaled = true, kTiers = true;
  static constexpr int kElement = ort::kInt8;
  static constexpr size_t kBytes = 1;
  static constexpr const char* kName = "VerifyAttentionUpperTier";
};

// Packed q/k/v of new tokens and a cache → context; keys and values are appended in place. With the last two inputs, the
// tokens are those of several sequences, one after the other; without them, of one whose cache is the only one.
template <typename Cache>
struct VerifyAttention {
  static constexpr const char* kName = Cache::kName;
  // Parts of a head, one after the other, with so much of its values each.
  static constexpr int64_t kPlanes = Cache::kTiers ? 2 : 1;
  // qkv, past key, past value, cache lengths, positions, cos, sin, tree mask, q norm, k norm, sequence starts, cache
  // slots, key scales, value scales
  static constexpr Input kInputs[] = {
      {ort::kFloat, ort::kRequired}, {Cache::kElement, ort::kRequired}, {Cache::kElement, ort::kRequired},
      {ort::kInt64, ort::kRequired}, {ort::kInt64, ort::kRequired},     {ort::kFloat, ort::kRequired},
      {ort::kFloat, ort::kRequired}, {ort::kBool, ort::kOptional},      {ort::kFloat, ort::kOptional},
      {ort::kFloat, ort::kOptional}, {ort::kInt64, ort::kOptional},     {ort::kInt64, ort::kOptional},
      {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  static constexpr int kOutputs[] = {ort::kFloat, Cache::kElement, Cache::kElement};

  Api api;
  const Level* level;
  int64_t heads = 0, kv_heads = 0, window = 0;
  float scale = 0.0f, softcap = 0.0f, epsilon = 0.0f;

  void read_attributes(Checks& checks, const KernelInfo* info) {
    checks.add(api.attribute(info, "num_heads", &heads));
    checks.add(api.attribute(info, "kv_num_heads", &kv_heads));
    checks.add(api.attribute(info, "local_window_size", &window));
    checks.add(api.attribute(info, "scale", &scale));
    checks.add(api.attribute(info, "softcap", &softcap));
    checks.add(api.attribute(info, "epsilon", &epsilon));
    checks.expect(heads > 0 && kv_heads > 0 && heads <= 4096 && heads % kv_heads == 0,
                  "%s: %lld heads over %lld came; a multiple was expected", kName, static_cast<long long>(heads),
                  static_cast<long long>(kv_heads));
    expect_finite(api, checks, info, 8, kName, "q_norm");
    expect_finite(api, checks, info, 9, kName, "k_norm");
    expect_finite(api, checks, info, 12, kName, "key_scale");
    expect_finite(api, checks, info, 13, kName, "value_scale");
  }

  void compute(Checks& checks, KernelContext* context) const {
    Tensor qkv, key, value, lengths, positions, cos, sin, tree, q_norm, k_norm, starts, slots, key_scale, value_scale;
    if (!read(api, checks, context, 0, "qkv", &qkv) || !read(api, checks, context, 1, "key", &key) ||
        !read(api, checks, context, 2, "value", &value) || !read(api, checks, context, 3, "cache_lengths", &lengths) ||
        !read(api, checks, context, 4, "position_ids", &positions) || !read(api, checks, context, 5, "cos", &cos) ||
        !read(api, checks, context, 6, "sin", &sin) || !read(api, checks, context, 7, "tree_mask", &tree) ||
        !read(api, checks, context, 8, "q_norm", &q_norm) || !read(api, checks, context, 9, "k_norm", &k_norm) ||
        !read(api, checks, context, 10, "sequence_starts", &starts) ||
        !read(api, checks, context, 11, "cache_slots", &slots) ||
        !read(api, checks, context, 12, "key_scale", &key_scale) ||
        !read(api, checks, context, 13, "value_scale", &value_scale)) {
      return;
    }
    const bool ragged = starts.data != nullptr;
    const int64_t size = kPlanes * key.extents[3], capacity = key.extents[2];
    checks.expect(qkv.rank == 3 && key.rank == 4 && value.rank == 4 && cos.rank == 2 && sin.rank == 2,
                  "%s: inputs have other axes than were expected", kName);
    checks.expect(ragged == (slots.data != nullptr), "%s: %s came alone; sequence_starts and cache_slots go together",
                  kName, ragged ? "sequence_starts" : "cache_slots");
    checks.expect(qkv.extents[0] == 1 && (ragged || key.extents[0] == 1), "%s: a batch of %lld came; 1 was expected",
                  kName, static_cast<long long>(qkv.extents[0] == 1 ? key.extents[0] : qkv.extents[0]));
    checks.expect(size >= 1 && size <= kMostHeadSize, "%s: a head size of %lld came; 1 to %lld expected", kName,
                  static_cast<long long>(size), static_cast<long long>(kMostHeadSize));
    checks.expect(!Cache::kTiers || size % 16 == 0, "%s: a head size of %lld came; a multiple of 16 was expected",
                  kName, static_cast<long long>(size));
    checks.expect(
        key.extents[1] == kPlanes * kv_heads && std::memcmp(key.extents, value.extents, sizeof key.extents) == 0,
        "%s: caches of %lld heads came; %lld were expected", kName, static_cast<long long>(key.extents[1]),
        static_cast<long long>(kPlanes * kv_heads));
    checks.expect(qkv.last() == (heads + 2 * kv_heads) * size, "%s: rows of %lld values came; %lld were expected",
                  kName, static_cast<long long>(qkv.last()), static_cast<long long>((heads + 2 * kv_heads) * size));
    const int64_t rows = qkv.extents[1], half = cos.extents[1];
    checks.expect((ragged || lengths.elements() == 1) && positions.elements() == rows,
                  "%s: %lld positions came; %lld were expected", kName, static_cast<long long>(positions.elements()),
                  static_cast<long long>(rows));
    checks.expect(std::memcmp(cos.extents, sin.extents, sizeof cos.extents) == 0 && 2 * half <= size,
                  "%s: rotary tables do not fit a head of %lld", kName, static_cast<long long>(size));
    // Norms over all heads of a token together.
    const bool row_norms = q_norm.data != nullptr && heads > 1 && q_norm.elements() == heads * size &&
                           k_norm.elements() == kv_heads * size;
    checks.expect((q_norm.data == nullptr) == (k_norm.data == nullptr) &&
                      (q_norm.data == nullptr || (q_norm.elements() == size && k_norm.elements() == size) || row_norms),
                  "%s: norms do not fit a head of %lld", kName, static_cast<long long>(size));
    const Tensor* const of_channels[] = {&key_scale, &value_scale};
    for (const Tensor* channels : of_channels) {
      const int64_t wanted = Cache::kScaled ? kv_heads * size : 0;
      const int64_t came = channels->data == nullptr ? 0 : channels->elements();
      checks.expect(came == wanted, "%s: %lld scales of a cache came; %lld were expected", kName,
                    static_cast<long long>(came), static_cast<long long>(wanted));
    }
    if (!checks.ok()) return;

    const int64_t only_starts[2] = {0, rows}, only_slot[1] = {0};
    Sequences sequences{1, only_starts, only_slot, lengths.as<int64_t>()};
    if (ragged && !read_sequences(checks, starts, slots, lengths, rows, key.extents[0], &sequences)) return;
    if (!check_lengths(checks, sequences, capacity) || !check_tree(checks, tree, sequences, ragged)) return;
    for (int64_t row = 0; checks.ok() && row < rows; ++row) {
      const int64_t position = positions.as<int64_t>()[row];
      checks.expect(half == 0 || (position >= 0 && position < cos.extents[0]),
                    "%s: position %lld came; 0 to %lld expected", kName, static_cast<long long>(position),
                    static_cast<long long>(cos.extents[0] - 1));
    }
    if (!checks.ok()) return;

    Attention all{};
    all.level = level;
    all.cache_type = Cache::kType;
    all.heads = static_cast<int>(heads);
    all.kv_heads = static_cast<int>(kv_heads);
    all.size = static_cast<int>(size);
    all.capacity = static_cast<int>(capacity);
    all.rotary = static_cast<int>(2 * half);
    all.window = window > 0 ? static_cast<int>(window) : 0;
    all.scale = scale > 0.0f ? scale : 1.0f / __builtin_sqrtf(static_cast<float>(size));
    all.softcap = softcap;
    all.epsilon = epsilon;
    all.qkv = qkv.as<float>();
    all.positions = positions.as<int64_t>();
    all.cos = cos.as<float>();
    all.sin = sin.as<float>();
    all.q_norm = q_norm.as<float>();
    all.k_norm = k_norm.as<float>();
    all.key_scale = key_scale.as<float>();
    all.value_scale = value_scale.as<float>();
    all.row_norms = row_norms;

    const uint8_t* mask = tree.data == nullptr || tree.elements() == 0 ? nullptr : tree.as<uint8_t>();
    const size_t state = (static_cast<size_t>(size) + 15) / 16 * 16 + 16;
    size_t bytes = AttentionBatch::table_bytes(sequences.count) + Scratch::size<uint8_t>(key.extents[0]);
    int64_t num_blocks = 0, streamed_tasks = 0;
    for (int64_t b = 0; b < sequences.count; ++b) {
      streamed_tasks += kv_heads * ((sequences.rows(b) + kStreamRows - 1) / kStreamRows);
    }
    const size_t whole_room = partial_room(streamed_tasks, usable_cores());
    size_t room = whole_room;
    for (int64_t b = 0; b < sequences.count; ++b) {
      const size_t count = sequences.rows(b);
      const int64_t blocks = find_blocks(all, sequences, b).count();
      bytes += Scratch::size<float>(heads * count * size) + Scratch::size<int32_t>(count) +
               Scratch::size<int32_t>(mask == nullptr ? 0 : count * count) +
               Scratch::size<float>(take_partial(room, heads * count * blocks * state));
      num_blocks += blocks;
    }
    Scratch scratch;
    if (!checks.expect(scratch.reserve(bytes), "%s: no memory for %lld rows", kName, static_cast<long long>(rows)) ||
        !check_distinct(checks, sequences, key.extents[0], scratch.take<uint8_t>(key.extents[0]))) {
      return;
    }
    const int64_t extents[3] = {1, rows, heads * size};
    if (!write(api, checks, context, 0, extents, 3, &all.out) ||
        !write(api, checks, context, 1, key.extents, 4, &all.key) ||
        !write(api, checks, context, 2, value.extents, 4, &all.value) || rows == 0) {
      return;
    }
    copy_cache(key, all.key, ragged ? capacity : sequences.lengths[0]);
    copy_cache(value, all.value, ragged ? capacity : sequences.lengths[0]);
    // At least four tasks a thread, in long runs where there are enough blocks.
    const int64_t share = num_blocks * kv_heads / (4 * usable_cores());
    all.run = share < 1 ? 1 : share > 8 ? 8 : static_cast<int>(share);

    AttentionBatch batch(scratch, sequences.count);
    room = whole_room;
    for (int64_t b = 0; b < sequences.count; ++b) {
      const size_t count = sequences.rows(b), first = sequences.starts[b];
      const size_t values = static_cast<size_t>(kv_heads * capacity * size) * Cache::kBytes * sequences.slots[b];
      Attention op = all;
      op.rows = static_cast<int>(count);
      op.cached = static_cast<int>(sequences.lengths[b]);
      op.qkv += first * (heads + 2 * kv_heads) * size;
      op.positions += first;
      op.out += first * heads * size;
      op.key = static_cast<char*>(op.key) + values;
      op.value = static_cast<char*>(op.value) + values;
      const Blocks blocks = find_blocks(all, sequences, b);
      op.first_block = static_cast<int>(blocks.first);
      op.blocks = static_cast<int>(blocks.end);
      const size_t wanted = heads * count * blocks.count() * state, partial = take_partial(room, wanted);
      op.streamed = partial < wanted;
      op.chain = mask == nullptr || is_chain(mask, op.rows);
      op.queries = scratch.take<float>(heads * count * size);
      auto* depth = scratch.take<int32_t>(count);
      auto* path = scratch.take<int32_t>(op.chain ? 0 : count * count);
      op.partial = scratch.take<float>(partial);
      op.depth = depth;
      op.path = path;
      if (!find_paths(checks, op.chain ? nullptr : mask, first, op.rows, depth, path)) return;
      if (mask != nullptr) mask += count * count;
      batch.add(op);
    }
    checks.add(batch.run(api, context));
  }

  // Memory for the states of a sequence's blocks: all that it wants, or none.
  static size_t take_partial(size_t& room, size_t wanted) {
    if (wanted > room) return 0;
    room -= wanted;
    return wanted;
  }

  bool read_sequences(Checks& checks, const Tensor& starts, const Tensor& slots, const Tensor& lengths, int64_t rows,
                      int64_t num_slots, Sequences* sequences) const {
    const int64_t count = slots.elements();
    if (!checks.expect(
            starts.rank == 1 && slots.rank == 1 && lengths.rank == 1 && starts.elements() == count + 1 &&
                lengths.elements() == count,
            "%s: %lld starts, %lld slots and %lld cache lengths came; one start more was expected, for the end", kName,
            static_cast<long long>(starts.elements()), static_cast<long long>(count),
            static_cast<long long>(lengths.elements()))) {
      return false;
    }
    *sequences = {count, starts.as<int64_t>(), slots.as<int64_t>(), lengths.as<int64_t>()};
    checks.expect(sequences->starts[0] == 0 && sequences->starts[count] == rows,
                  "%s: sequences from row %lld to %lld came; 0 to %lld were expected", kName,
                  static_cast<long long>(sequences->starts[0]), static_cast<long long>(sequences->starts[count]),
                  static_cast<long long>(rows));
    for (int64_t b = 0; checks.ok() && b < count; ++b) {
      checks.expect(sequences->rows(b) > 0,
                    "%s: sequence %lld starts at row %lld, the next at %lld; a later one was expected", kName,
                    static_cast<long long>(b), static_cast<long long>(sequences->starts[b]),
                    static_cast<long long>(sequences->starts[b + 1]));
      checks.expect(sequences->slots[b] >= 0 && sequences->slots[b] < num_slots,
                    "%s: cache slot %lld came; 0 to %lld expected", kName, static_cast<long long>(sequences->slots[b]),
                    static_cast<long long>(num_slots - 1));
    }
    return checks.ok();
  }

  bool check_lengths(Checks& checks, const Sequences& sequences, int64_t capacity) const {
    for (int64_t b = 0; checks.ok() && b < sequences.count; ++b) {
      const int64_t rows = sequences.rows(b), cached = sequences.lengths[b];
      checks.expect(cached >= 0 && rows <= capacity && cached <= capacity - rows,
                    "%s: %lld tokens after %lld do not fit a cache of %lld", kName, static_cast<long long>(rows),
                    static_cast<long long>(cached), static_cast<long long>(capacity));
    }
    return checks.ok();
  }

  // One mask [rows, rows] after the other. In a ragged batch no value says that all sequences are chains.
  bool check_tree(Checks& checks, const Tensor& tree, const Sequences& sequences, bool ragged) const {
    if (tree.data == nullptr && tree.rank == 0) return true;
    int64_t values = 0;
    for (int64_t b = 0; b < sequences.count; ++b) values += sequences.rows(b) * sequences.rows(b);
    if (!ragged) {
      return checks.expect(tree.elements() == values, "%s: a tree mask of %lld values for %lld tokens", kName,
                           static_cast<long long>(tree.elements()), static_cast<long long>(sequences.rows(0)));
    }
    return checks.expect(tree.rank == 1 && (tree.elements() == 0 || tree.elements() == values),
                         "%s: a tree mask of %lld values on %zu axes came; %lld or 0 on one were expected", kName,
                         static_cast<long long>(tree.elements()), tree.rank, static_cast<long long>(values));
  }

  // No two sequences write to one cache.
  bool check_distinct(Checks& checks, const Sequences& sequences, int64_t num_slots, uint8_t* taken) const {
    if (num_slots > 0) std::memset(taken, 0, static_cast<size_t>(num_slots));
    for (int64_t b = 0; checks.ok() && b < sequences.count; ++b) {
      const int64_t slot = sequences.slots[b];
      checks.expect(taken[slot] == 0, "%s: cache slot %lld came for two sequences", kName,
                    static_cast<long long>(slot));
      taken[slot] = 1;
    }
    return checks.ok();
  }

  // Where past and present are not one buffer, so many positions of every head are copied.
  void copy_cache(const Tensor& past, void* present, int64_t positions) const {
    if (past.data == present) return;
    const size_t row = static_cast<size_t>(past.extents[3]) * Cache::kBytes, head = past.extents[2] * row;
    for (int64_t i = 0; i < past.extents[0] * past.extents[1]; ++i) {
      std::memcpy(static_cast<char*>(present) + i * head, past.as<char>() + i * head, positions * row);
    }
  }

  static bool is_chain(const uint8_t* mask, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < rows; ++column) {
        if ((mask[row * rows + column] != 0) != (column <= row)) return false;
      }
    }
    return true;
  }

  // Each token's ancestors in order, itself last; `first` is the sequence's first row.
  bool find_paths(Checks& checks, const uint8_t* mask, int64_t first, int64_t rows, int32_t* depth,
                  int32_t* path) const {
    for (int64_t row = 0; row < rows; ++row) {
      if (mask == nullptr) {
        depth[row] = static_cast<int32_t>(row);
        continue;
      }
      int32_t count = 0;
      for (int64_t column = 0; column < rows; ++column) {
        if (mask[row * rows + column] == 0) continue;
        if (!checks.expect(column <= row, "%s: row %lld of the tree mask sees a later row", kName,
                           static_cast<long long>(first + row))) {
          return false;
        }
        path[row * rows + count++] = static_cast<int32_t>(column);
      }
      if (!checks.expect(mask[row * rows + row] != 0, "%s: row %lld of the tree mask does not see itself", kName,
                         static_cast<long long>(first + row))) {
        return false;
      }
      depth[row] = count - 1;
    }
    return true;
  }
};

}  // namespace quasar
