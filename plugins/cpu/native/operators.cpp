// The operators as ONNX Runtime sees them: schema, checks of everything that comes in, and the phases of a call.
#include <cstdio>
#include <cstring>

#include "kernels.hpp"
#include "suffix_automaton.hpp"
#include "team.hpp"

#if defined(_WIN32)
#define QUASAR_EXPORT extern "C" __declspec(dllexport)
#else
#define QUASAR_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace quasar {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;
using ort::Status;

constexpr char kDomain[] = "quasar.cpu";
constexpr size_t kMostRank = 4;
// |q * (w + 128)| sums to at most 127 * 255 * inputs in 32 bits.
constexpr int64_t kMostInputs = 65536;
constexpr int64_t kMostHeadSize = 256;
constexpr size_t kMostPartialFloats = 1u << 20;

// What kernels that are made from now on use.
const Level* chosen = nullptr;

// An error in the making: the first one counts.
class Checks {
 public:
  explicit Checks(const Api& api) : api_(api) {}
  bool ok() const { return status_ == nullptr; }
  Status* take() { return status_; }

  bool add(Status* status) {
    if (status == nullptr) return ok();
    if (status_ == nullptr) {
      status_ = status;
    } else {
      api_.release(status);
    }
    return false;
  }
  template <typename... Values>
  bool expect(bool holds, const char* format, Values... values) {
    if (holds || !ok()) return ok();
    char message[400];
    std::snprintf(message, sizeof message, format, values...);
    return add(api_.status(ort::kInvalidArgument, message));
  }

 private:
  const Api& api_;
  Status* status_ = nullptr;
};

// A tensor that came in. `data` is null where an optional one is not there.
struct Tensor {
  void* data = nullptr;
  int64_t extents[kMostRank] = {};
  size_t rank = 0;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  int64_t last() const { return rank == 0 ? 1 : extents[rank - 1]; }
  // Rows before the last axis.
  int64_t rows() const {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < rank; ++i) rows *= extents[i];
    return rows;
  }
  int64_t elements() const { return rank == 0 ? 1 : rows() * last(); }
};

bool read(const Api& api, Checks& checks, const KernelContext* context, size_t index, const char* name, Tensor* tensor) {
  const ort::Value* value = nullptr;
  if (!checks.add(api.input(context, index, &value)) || value == nullptr) return checks.ok();
  ort::Shape* shape = nullptr;
  if (!checks.add(api.shape(value, &shape))) return false;
  checks.add(api.rank(shape, &tensor->rank));
  if (checks.expect(tensor->rank <= kMostRank, "%s: %s has %zu axes; at most %zu are taken", kDomain, name, tensor->rank,
                    kMostRank)) {
    checks.add(api.extents(shape, tensor->extents, tensor->rank));
  }
  api.release(shape);
  if (checks.ok()) checks.add(api.data(const_cast<ort::Value*>(value), &tensor->data));
  return checks.ok();
}

template <typename T>
bool write(const Api& api, Checks& checks, KernelContext* context, size_t index, const int64_t* extents, size_t rank,
           T** data) {
  ort::Value* value = nullptr;
  void* memory = nullptr;
  *data = nullptr;
  if (!checks.add(api.output(context, index, extents, rank, &value)) || value == nullptr) return false;
  checks.add(api.data(value, &memory));
  *data = static_cast<T*>(memory);
  return checks.ok();
}

// Operators of one schema. `Kernel` has kName, inputs, outputs, and compute.
template <typename Kernel>
struct Operator : ort::CustomOp {
  Operator() : ort::CustomOp{} {
    version = ort::kAbiVersion;
    name = [](const CustomOp*) -> const char* { return Kernel::kName; };
    provider = [](const CustomOp*) -> const char* { return nullptr; };
    input_count = [](const CustomOp*) -> size_t { return sizeof(Kernel::kInputs) / sizeof(Kernel::kInputs[0]); };
    input_type = [](const CustomOp*, size_t i) -> int { return Kernel::kInputs[i].type; };
    input_presence = [](const CustomOp*, size_t i) -> int { return Kernel::kInputs[i].presence; };
    input_memory = [](const CustomOp*, size_t) -> int { return 0; };
    output_count = [](const CustomOp*) -> size_t { return sizeof(Kernel::kOutputs) / sizeof(Kernel::kOutputs[0]); };
    output_type = [](const CustomOp*, size_t i) -> int { return Kernel::kOutputs[i]; };
    output_presence = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
    variadic_input_min = [](const CustomOp*) -> int { return 0; };
    variadic_input_same = [](const CustomOp*) -> int { return 1; };
    variadic_output_min = [](const CustomOp*) -> int { return 0; };
    variadic_output_same = [](const CustomOp*) -> int { return 1; };
    first_version = [](const CustomOp*) -> int { return 1; };
    last_version = [](const CustomOp*) -> int { return 0x7fffffff; };
    create_kernel_checked = [](const CustomOp*, const void* table, const KernelInfo* info, void** made) -> Status* {
      const Api api(table);
      Checks checks(api);
      auto* kernel = static_cast<Kernel*>(std::malloc(sizeof(Kernel)));
      if (kernel == nullptr) return api.status(ort::kFail, "quasar.cpu: no memory for a kernel");
      *kernel = Kernel{api, chosen};
      kernel->read_attributes(checks, info);
      if (!checks.ok()) {
        std::free(kernel);
        return checks.take();
      }
      *made = kernel;
      return nullptr;
    };
    compute_checked = [](void* kernel, KernelContext* context) -> Status* {
      const auto& self = *static_cast<const Kernel*>(kernel);
      Checks checks(self.api);
      self.compute(checks, context);
      return checks.take();
    };
    destroy = [](void* kernel) { std::free(kernel); };
  }
};

struct Input {
  int type, presence;
};

// x [..., K] float → [..., N] float. `Blocks`: scales per 32 inputs.
template <bool Blocks>
struct W8A8 {
  static constexpr const char* kName = Blocks ? "W8A8BlockLinear" : "W8A8Linear";
  // x, packed weights, scales, bias, residual, RMS norm weight
  static constexpr Input kInputs[] = {{ort::kFloat, ort::kRequired}, {ort::kUint8, ort::kRequired},
                                      {ort::kFloat, ort::kRequired}, {ort::kFloat, ort::kOptional},
                                      {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  static constexpr int kOutputs[] = {ort::kFloat};

  Api api;
  const Level* level;
  int64_t outputs = 0, swiglu = 0;
  float epsilon = 0.0f;

  void read_attributes(Checks& checks, const KernelInfo* info) {
    checks.add(api.attribute(info, "outputs", &outputs));
    checks.add(api.attribute(info, "swiglu", &swiglu));
    checks.add(api.attribute(info, "epsilon", &epsilon));
    checks.expect(outputs > 0 && outputs < (1 << 30), "%s: %lld outputs came; a positive number was expected", kName,
                  static_cast<long long>(outputs));
  }

  void compute(Checks& checks, KernelContext* context) const {
    Tensor x, packed, scale, bias, residual, norm;
    if (!read(api, checks, context, 0, "x", &x) || !read(api, checks, context, 1, "packed", &packed) ||
        !read(api, checks, context, 2, "scale", &scale) || !read(api, checks, context, 3, "bias", &bias) ||
        !read(api, checks, context, 4, "residual", &residual) || !read(api, checks, context, 5, "norm", &norm)) {
      return;
    }
    const int64_t inputs = x.last(), rows = x.rows();
    const int64_t step = Blocks ? kBlock : 4;
    const int64_t padded = (inputs + step - 1) / step * step;
    const int64_t columns = swiglu != 0 ? 2 * outputs : outputs;
    const int64_t tiles = (outputs + kTile - 1) / kTile * (swiglu != 0 ? 2 : 1);
    checks.expect(x.rank >= 1 && inputs >= 1 && inputs <= kMostInputs, "%s: rows of %lld values came; 1 to %lld expected",
                  kName, static_cast<long long>(inputs), static_cast<long long>(kMostInputs));
    checks.expect(packed.rank == 4 && packed.extents[0] == tiles && packed.extents[1] == padded / 4 &&
                      packed.extents[2] == kTile && packed.extents[3] == 4,
                  "%s: packed weights are [%lld, %lld, %lld, %lld]; [%lld, %lld, 32, 4] was expected", kName,
                  static_cast<long long>(packed.extents[0]), static_cast<long long>(packed.extents[1]),
                  static_cast<long long>(packed.extents[2]), static_cast<long long>(packed.extents[3]),
                  static_cast<long long>(tiles), static_cast<long long>(padded / 4));
    const int64_t scales = Blocks ? tiles * padded : columns;
    checks.expect(scale.elements() == scales, "%s: %lld scales came; %lld were expected", kName,
                  static_cast<long long>(scale.elements()), static_cast<long long>(scales));
    checks.expect(bias.data == nullptr || bias.elements() == columns, "%s: a bias of %lld values came; %lld were expected",
                  kName, static_cast<long long>(bias.elements()), static_cast<long long>(columns));
    checks.expect(residual.data == nullptr || (residual.elements() == rows * outputs),
                  "%s: a residual of %lld values came; %lld were expected", kName,
                  static_cast<long long>(residual.elements()), static_cast<long long>(rows * outputs));
    checks.expect(norm.data == nullptr || norm.elements() == inputs,
                  "%s: a norm of %lld values came; %lld were expected", kName, static_cast<long long>(norm.elements()),
                  static_cast<long long>(inputs));
    checks.expect(rows < (1 << 24), "%s: %lld rows came; fewer than 2^24 were expected", kName,
                  static_cast<long long>(rows));
    if (!checks.ok()) return;

    Linear op{};
    op.level = level;
    int64_t extents[kMostRank];
    for (size_t i = 0; i < x.rank; ++i) extents[i] = x.extents[i];
    extents[x.rank - 1] = outputs;
    if (!write(api, checks, context, 0, extents, x.rank, &op.y) || rows == 0) return;
    op.rows = static_cast<int>(rows);
    op.inputs = static_cast<int>(inputs);
    op.outputs = static_cast<int>(outputs);
    op.padded = static_cast<int>(padded);
    op.tiles = static_cast<int>(tiles);
    op.swiglu = swiglu != 0;
    op.blocks = Blocks;
    op.x = x.as<float>();
    op.norm = norm.as<float>();
    op.epsilon = epsilon;
    op.packed = packed.as<uint8_t>();
    op.scale = scale.as<float>();
    op.bias = bias.as<float>();
    op.residual = residual.as<float>();

    const size_t groups = static_cast<size_t>(rows) * (Blocks ? padded / kBlock : 1);
    const size_t bytes = static_cast<size_t>(rows * padded), values = op.norm != nullptr ? rows * inputs : 0;
    Scratch scratch;
    if (!checks.expect(scratch.reserve(Scratch::size<int8_t>(bytes) + Scratch::size<float>(groups) +
                                       Scratch::size<int32_t>(groups) + Scratch::size<float>(values)),
                       "%s: no memory for %lld rows", kName, static_cast<long long>(rows))) {
      return;
    }
    op.q = scratch.take<int8_t>(bytes);
    op.amax = scratch.take<float>(groups);
    op.offset = scratch.take<int32_t>(groups);
    op.normed = scratch.take<float>(values);

    struct Work {
      Linear op;
      Pieces pieces;
    } work{op, Pieces(static_cast<int>((outputs + kTile - 1) / kTile))};
    Phase phases[2] = {
        {[](void* state, int piece) {
           const Work& work = *static_cast<Work*>(state);
           work.op.level->quantize_row(work.op, piece);
         }, &work, op.rows},
        {[](void* state, int piece) {
           const Work& work = *static_cast<Work*>(state);
           work.op.level->multiply_tiles(work.op, work.pieces.first(piece), work.pieces.first(piece + 1));
         },
         &work, work.pieces.count()}};
    checks.add(quasar::run(api, context, phases, 2));
  }
};

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

// Packed q/k/v of new rows and a cache → context; keys and values are appended in place.
template <typename Cache>
struct VerifyAttention {
  static constexpr const char* kName = Cache::kName;
  // qkv, past key, past value, cache lengths, positions, cos, sin, tree mask, q norm, k norm
  static constexpr Input kInputs[] = {
      {ort::kFloat, ort::kRequired}, {Cache::kElement, ort::kRequired}, {Cache::kElement, ort::kRequired},
      {ort::kInt64, ort::kRequired}, {ort::kInt64, ort::kRequired},     {ort::kFloat, ort::kRequired},
      {ort::kFloat, ort::kRequired}, {ort::kBool, ort::kOptional},      {ort::kFloat, ort::kOptional},
      {ort::kFloat, ort::kOptional}};
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
    checks.expect(qkv.rank == 3 && qkv.extents[0] == 1 && key.extents[0] == 1, "%s: a batch of %lld came; 1 was expected",
                  kName, static_cast<long long>(qkv.extents[0]));
    checks.expect(size >= 1 && size <= kMostHeadSize, "%s: a head size of %lld came; 1 to %lld expected", kName,
                  static_cast<long long>(size), static_cast<long long>(kMostHeadSize));
    checks.expect(key.extents[1] == kv_heads && std::memcmp(key.extents, value.extents, sizeof key.extents) == 0,
                  "%s: caches of %lld heads came; %lld were expected", kName, static_cast<long long>(key.extents[1]),
                  static_cast<long long>(kv_heads));
    checks.expect(qkv.last() == (heads + 2 * kv_heads) * size, "%s: rows of %lld values came; %lld were expected", kName,
                  static_cast<long long>(qkv.last()), static_cast<long long>((heads + 2 * kv_heads) * size));
    const int64_t rows = qkv.extents[1], half = cos.extents[1];
    checks.expect(lengths.elements() == 1 && positions.elements() == rows, "%s: %lld positions came; %lld were expected",
                  kName, static_cast<long long>(positions.elements()), static_cast<long long>(rows));
    checks.expect(std::memcmp(cos.extents, sin.extents, sizeof cos.extents) == 0 && 2 * half <= size,
                  "%s: rotary tables do not fit a head of %lld", kName, static_cast<long long>(size));
    checks.expect(tree.data == nullptr || tree.elements() == rows * rows, "%s: a tree mask of %lld values for %lld rows",
                  kName, static_cast<long long>(tree.elements()), static_cast<long long>(rows));
    checks.expect((q_norm.data == nullptr) == (k_norm.data == nullptr) &&
                      (q_norm.data == nullptr || (q_norm.elements() == size && k_norm.elements() == size)),
                  "%s: norms do not fit a head of %lld", kName, static_cast<long long>(size));
    if (!checks.ok()) return;
    const int64_t cached = *lengths.as<int64_t>();
    checks.expect(cached >= 0 && rows <= capacity && cached <= capacity - rows,
                  "%s: %lld rows behind %lld do not fit a cache of %lld", kName, static_cast<long long>(rows),
                  static_cast<long long>(cached), static_cast<long long>(capacity));
    for (int64_t row = 0; checks.ok() && row < rows; ++row) {
      const int64_t position = positions.as<int64_t>()[row];
      checks.expect(position >= 0 && position < cos.extents[0], "%s: position %lld came; 0 to %lld expected", kName,
                    static_cast<long long>(position), static_cast<long long>(cos.extents[0] - 1));
    }
    if (!checks.ok()) return;

    Attention op{};
    op.level = level;
    const int64_t extents[3] = {1, rows, heads * size};
    if (!write(api, checks, context, 0, extents, 3, &op.out) || !write(api, checks, context, 1, key.extents, 4, &op.key) ||
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
    op.chain = is_chain(tree, rows);

    op.blocks = static_cast<int>((cached + rows + kPositions - 1) / kPositions);
    const size_t state = (static_cast<size_t>(size) + 15) / 16 * 16 + 16;
    const size_t partial = static_cast<size_t>(heads * rows) * op.blocks * state;
    // At least four tasks a thread, in long runs where there are enough blocks.
    const int64_t share = op.blocks * kv_heads / (4 * usable_cores());
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

    Phase phases[3] = {
        {&attention_phase<&Level::append_row>, &op, op.rows},
        {&attention_phase<&Level::attend>, &op,
         level->attention_tasks(op)},
        {&attention_phase<&Level::merge_blocks>, &op,
         op.rows * op.kv_heads}};
    checks.add(quasar::run(api, context, phases, op.streamed ? 2 : 3));
  }

  // Where past and present are not one buffer, the committed rows go over.
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

  // Each row's ancestors in order, itself last.
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

Operator<W8A8<false>> linear;
Operator<W8A8<true>> block_linear;
Operator<VerifyAttention<FloatCache>> attention;
Operator<VerifyAttention<HalfCache>> half_attention;
Operator<VerifyAttention<BfloatCache>> bfloat_attention;
Operator<ArgMax> argmax;

}  // namespace
}  // namespace quasar

// The instruction level that operators use, or an empty text where none can be used.
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

QUASAR_EXPORT int quasar_abi() { return 2; }

QUASAR_EXPORT quasar::ort::Status* RegisterCustomOps(quasar::ort::SessionOptions* options,
                                                     const quasar::ort::ApiBase* base) {
  using namespace quasar;
  const void* table = base->get_api(ort::kAbiVersion);
  if (table == nullptr) {
    // Version 1 is always there; only its first entry is needed to say no.
    const ort::Api old(base->get_api(1));
    char message[200];
    std::snprintf(message, sizeof message, "quasar.cpu: ONNX Runtime %s is too old; 1.17 or newer was expected",
                  base->get_version());
    return old.status(ort::kFail, message);
  }
  const ort::Api api(table);
  chosen = choose_level();
  if (chosen == nullptr) {
    return api.status(ort::kFail, "quasar.cpu: QUASAR_CPU_LEVEL names a level that is unknown or that this CPU lacks");
  }
  ort::Domain* domain = nullptr;
  if (ort::Status* status = api.create_domain(kDomain, &domain)) return status;
  const ort::CustomOp* operators[] = {&linear,         &block_linear,     &attention,
                                      &half_attention, &bfloat_attention, &argmax};
  for (const ort::CustomOp* op : operators) {
    if (ort::Status* status = api.add_operator(domain, op)) return status;
  }
  return api.add_domain(options, domain);
}
