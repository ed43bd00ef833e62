// VerifyAttention for each type of cache: checks of everything that comes in, and the phases of a call.
#pragma once

#include <cstring>

#include "operator.hpp"
#include "team.hpp"

namespace quasar {

constexpr int64_t kMostHeadSize = 256;
constexpr size_t kMostPartialFloats = 1u << 20;

template <void (*Level::*Function)(const Attention&, int)>
void attention_phase(void* state, int piece) {
  const auto& op = *static_cast<Attention*>(state);
  (op.level->*Function)(op, piece);
}

struct FloatCache {
  static constexpr CacheType kType = CacheType::kFloat;
  static constexpr int kElement = ort::kFloat;
  static constexpr size_t kBytes = 4;
  static constexpr const char* kName = "VerifyAttention";
};
struct HalfCache {
  static constexpr CacheType kType = CacheType::kHalf;
  static constexpr int kElement = ort::kFloat16;
  static constexpr size_t kBytes = 2;
  static constexpr const char* kName = "VerifyAttentionFloat16";
};
struct BfloatCache {
  static constexpr CacheType kType = CacheType::kBfloat;
  static constexpr int kElement = ort::kBfloat16;
  static constexpr size_t kBytes = 2;
  static constexpr const char* kName = "VerifyAttentionBfloat16";
};

// Packed q/k/v of new tokens and a cache → context; keys and values are appended in place.
template <typename Cache>
struct VerifyAttention {
  static constexpr const char* kName = Cache::kName;
  // qkv, past key, past value, cache lengths, positions, cos, sin, tree mask, q norm, k norm
  static constexpr Input kInputs[] = {{ort::kFloat, ort::kRequired},     {Cache::kElement, ort::kRequired},
                                      {Cache::kElement, ort::kRequired}, {ort::kInt64, ort::kRequired},
                                      {ort::kInt64, ort::kRequired},     {ort::kFloat, ort::kRequired},
                                      {ort::kFloat, ort::kRequired},     {ort::kBool, ort::kOptional},
                                      {ort::kFloat, ort::kOptional},     {ort::kFloat, ort::kOptional}};
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
  }

  void compute(Checks& checks, KernelContext* context) const {
    Tensor qkv, key, value, lengths, positions, cos, sin, tree, q_norm, k_norm;
    if (!read(api, checks, context, 0, "qkv", &qkv) || !read(api, checks, context, 1, "key", &key) ||
        !read(api, checks, context, 2, "value", &value) || !read(api, checks, context, 3, "cache_lengths", &lengths) ||
        !read(api, checks, context, 4, "position_ids", &positions) || !read(api, checks, context, 5, "cos", &cos) ||
        !read(api, checks, context, 6, "sin", &sin) || !read(api, checks, context, 7, "tree_mask", &tree) ||
        !read(api, checks, context, 8, "q_norm", &q_norm) || !read(api, checks, context, 9, "k_norm", &k_norm)) {
      return;
    }
    const int64_t size = key.extents[3], capacity = key.extents[2];
    checks.expect(qkv.rank == 3 && key.rank == 4 && value.rank == 4 && cos.rank == 2 && sin.rank == 2,
                  "%s: inputs have other axes than were expected", kName);
    checks.expect(qkv.rank == 3 && qkv.extents[0] == 1 && key.extents[0] == 1,
                  "%s: a batch of %lld came; 1 was expected", kName, static_cast<long long>(qkv.extents[0]));
    checks.expect(size >= 1 && size <= kMostHeadSize, "%s: a head size of %lld came; 1 to %lld expected", kName,
                  static_cast<long long>(size), static_cast<long long>(kMostHeadSize));
    checks.expect(key.extents[1] == kv_heads && std::memcmp(key.extents, value.extents, sizeof key.extents) == 0,
                  "%s: caches of %lld heads came; %lld were expected", kName, static_cast<long long>(key.extents[1]),
                  static_cast<long long>(kv_heads));
    checks.expect(qkv.last() == (heads + 2 * kv_heads) * size, "%s: rows of %lld values came; %lld were expected",
                  kName, static_cast<long long>(qkv.last()), static_cast<long long>((heads + 2 * kv_heads) * size));
    const int64_t rows = qkv.extents[1], half = cos.extents[1];
    checks.expect(lengths.elements() == 1 && positions.elements() == rows,
                  "%s: %lld positions came; %lld were expected", kName, static_cast<long long>(positions.elements()),
                  static_cast<long long>(rows));
    checks.expect(std::memcmp(cos.extents, sin.extents, sizeof cos.extents) == 0 && 2 * half <= size,
                  "%s: rotary tables do not fit a head of %lld", kName, static_cast<long long>(size));
    checks.expect(tree.data == nullptr || tree.elements() == rows * rows,
                  "%s: a tree mask of %lld values for %lld tokens", kName, static_cast<long long>(tree.elements()),
                  static_cast<long long>(rows));
    // Norms over all heads of a token together.
    const bool row_norms = q_norm.data != nullptr && heads > 1 && q_norm.elements() == heads * size &&
                           k_norm.elements() == kv_heads * size;
    checks.expect((q_norm.data == nullptr) == (k_norm.data == nullptr) &&
                      (q_norm.data == nullptr || (q_norm.elements() == size && k_norm.elements() == size) || row_norms),
                  "%s: norms do not fit a head of %lld", kName, static_cast<long long>(size));
    if (!checks.ok()) return;
    const int64_t cached = *lengths.as<int64_t>();
    checks.expect(cached >= 0 && rows <= capacity && cached <= capacity - rows,
                  "%s: %lld tokens after %lld do not fit a cache of %lld", kName, static_cast<long long>(rows),
                  static_cast<long long>(cached), static_cast<long long>(capacity));
    for (int64_t row = 0; checks.ok() && row < rows; ++row) {
      const int64_t position = positions.as<int64_t>()[row];
      checks.expect(half == 0 || (position >= 0 && position < cos.extents[0]),
                    "%s: position %lld came; 0 to %lld expected", kName, static_cast<long long>(position),
                    static_cast<long long>(cos.extents[0] - 1));
    }
    if (!checks.ok()) return;

    Attention op{};
    op.level = level;
    const int64_t extents[3] = {1, rows, heads * size};
    if (!write(api, checks, context, 0, extents, 3, &op.out) ||
        !write(api, checks, context, 1, key.extents, 4, &op.key) ||
        !write(api, checks, context, 2, value.extents, 4, &op.value) || rows == 0) {
      return;
    }
    copy_cache(key, op.key, cached);
    copy_cache(value, op.value, cached);
    op.cache_type = Cache::kType;
    op.rows = static_cast<int>(rows);
    op.heads = static_cast<int>(heads);
    op.kv_heads = static_cast<int>(kv_heads);
    op.size = static_cast<int>(size);
    op.capacity = static_cast<int>(capacity);
    op.cached = static_cast<int>(cached);
    op.rotary = static_cast<int>(2 * half);
    op.window = window > 0 ? static_cast<int>(window) : 0;
    op.scale = scale > 0.0f ? scale : 1.0f / __builtin_sqrtf(static_cast<float>(size));
    op.softcap = softcap;
    op.epsilon = epsilon;
    op.qkv = qkv.as<float>();
    op.positions = positions.as<int64_t>();
    op.cos = cos.as<float>();
    op.sin = sin.as<float>();
    op.q_norm = q_norm.as<float>();
    op.k_norm = k_norm.as<float>();
    op.row_norms = row_norms;
    op.chain = is_chain(tree, rows);

    // The first token has no ancestor among the new ones, so that none sees further back.
    op.first_block =
        static_cast<int>(op.window > 0 && cached + 1 > op.window ? (cached + 1 - op.window) / kPositions : 0);
    op.blocks = static_cast<int>((cached + rows + kPositions - 1) / kPositions);
    const int64_t blocks = op.blocks - op.first_block;
    const size_t state = (static_cast<size_t>(size) + 15) / 16 * 16 + 16;
    const size_t partial = static_cast<size_t>(heads * rows * blocks) * state;
    // At least four tasks a thread, in long runs where there are enough blocks.
    const int64_t share = blocks * kv_heads / (4 * usable_cores());
    op.run = share < 1 ? 1 : share > 8 ? 8 : static_cast<int>(share);
    op.streamed = partial > kMostPartialFloats;
    const size_t queries = static_cast<size_t>(heads * rows * size), paths = op.chain ? 0 : rows * rows;
    Scratch scratch;
    if (!checks.expect(scratch.reserve(Scratch::size<float>(queries) + Scratch::size<int32_t>(rows) +
                                       Scratch::size<int32_t>(paths) + Scratch::size<float>(op.streamed ? 0 : partial)),
                       "%s: no memory for %lld rows", kName, static_cast<long long>(rows))) {
      return;
    }
    op.queries = scratch.take<float>(queries);
    auto* depth = scratch.take<int32_t>(rows);
    auto* path = scratch.take<int32_t>(paths);
    op.partial = scratch.take<float>(op.streamed ? 0 : partial);
    op.depth = depth;
    op.path = path;
    if (!find_paths(checks, op.chain ? nullptr : tree.as<uint8_t>(), rows, depth, path)) return;

    Phase phases[3] = {{&attention_phase<&Level::append_row>, &op, op.rows},
                       {&attention_phase<&Level::attend>, &op, level->attention_tasks(op)},
                       {&attention_phase<&Level::merge_blocks>, &op, op.rows * op.kv_heads}};
    checks.add(quasar::run(api, context, phases, op.streamed ? 2 : 3));
  }

  // Where past and present are not one buffer, the committed positions are copied.
  void copy_cache(const Tensor& past, void* present, int64_t cached) const {
    if (past.data == present) return;
    const size_t row = static_cast<size_t>(past.extents[3]) * Cache::kBytes, head = past.extents[2] * row;
    for (int64_t i = 0; i < kv_heads; ++i) {
      std::memcpy(static_cast<char*>(present) + i * head, past.as<char>() + i * head, cached * row);
    }
  }

  static bool is_chain(const Tensor& tree, int64_t rows) {
    if (tree.data == nullptr) return true;
    const uint8_t* mask = tree.as<uint8_t>();
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < rows; ++column) {
        if ((mask[row * rows + column] != 0) != (column <= row)) return false;
      }
    }
    return true;
  }

  // Each token's ancestors in order, itself last.
  bool find_paths(Checks& checks, const uint8_t* mask, int64_t rows, int32_t* depth, int32_t* path) const {
    for (int64_t row = 0; row < rows; ++row) {
      if (mask == nullptr) {
        depth[row] = static_cast<int32_t>(row);
        continue;
      }
      int32_t count = 0;
      for (int64_t column = 0; column < rows; ++column) {
        if (mask[row * rows + column] == 0) continue;
        if (!checks.expect(column <= row, "%s: row %lld of the tree mask sees a later row", kName,
                           static_cast<long long>(row))) {
          return false;
        }
        path[row * rows + count++] = static_cast<int32_t>(column);
      }
      if (!checks.expect(mask[row * rows + row] != 0, "%s: row %lld of the tree mask does not see itself", kName,
                         static_cast<long long>(row))) {
        return false;
      }
      depth[row] = count - 1;
    }
    return true;
  }
};

}  // namespace quasar
