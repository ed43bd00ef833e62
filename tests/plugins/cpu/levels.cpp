// Runs every kernel of the level that QUASAR_CPU_LEVEL names on fixed inputs, and prints a hash of each result's bits.
// The kernels are those of the library that is named, or, with QUASAR_LINKED, those linked in.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../../plugins/cpu/native/kernels.hpp"

#if !defined(QUASAR_LINKED)
#include <dlfcn.h>
#endif

using namespace quasar;

static uint64_t state = 88172645463325252ull;
static uint32_t next() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>(state >> 32);
}
static float uniform() { return static_cast<float>(next() % 20001) / 10000.0f - 1.0f; }
static std::vector<float> floats(size_t count, float size = 1.0f) {
  std::vector<float> values(count);
  for (float& value : values) value = size * uniform();
  return values;
}
template <typename T>
static void print(const char* name, const std::vector<T>& values) {
  uint64_t hash = 1469598103934665603ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

static void run_linear(const Level& level, int rows, int inputs, int outputs, Gate gate, Form form, int group = 32,
                       bool offsets = false) {
  const bool blocks = form != Form::kBytes;
  Linear op{};
  op.rows = rows;
  op.inputs = inputs;
  op.outputs = outputs;
  op.padded = blocks ? (inputs + 31) / 32 * 32 : (inputs + 3) / 4 * 4;
  const int output_tiles = (outputs + 31) / 32;
  op.tiles = output_tiles * (gate != Gate::kNone ? 2 : 1);
  op.gate = gate;
  op.form = form;
  op.group = group;
  op.offsets = offsets;
  op.epsilon = 1e-5f;
  const auto x = floats(static_cast<size_t>(rows) * inputs, 3.0f), norm = floats(inputs);
  const auto scale = floats(static_cast<size_t>(op.tiles) * op.padded + 2 * outputs, 0.01f), bias = floats(2 * outputs);
  const auto residual = floats(static_cast<size_t>(rows) * outputs);
  std::vector<uint8_t> packed(static_cast<size_t>(op.tiles) * op.padded * 32 + 16384);
  for (auto& weight : packed) weight = static_cast<uint8_t>(next() % 255 + 1);
  const size_t groups = static_cast<size_t>(rows) * (blocks ? op.padded / 32 : 1);
  const size_t planes = form == Form::kNibblePlanes ? 2 : 1;
  std::vector<int8_t> q(planes * rows * op.padded);
  std::vector<float> amax(groups), sums(groups), normed(x.size()), y(residual.size());
  std::vector<int32_t> offset(planes * groups);
  std::vector<uint16_t> group_scale(2 * scale.size());
  // Any pattern that is a small number.
  for (auto& bits : group_scale) bits = static_cast<uint16_t>(next() & 0xa7ff);
  op.group_scale = reinterpret_cast<const Half*>(group_scale.data());
  op.x = x.data();
  op.norm = norm.data();
  op.scale = scale.data();
  op.bias = bias.data();
  op.residual = residual.data();
  op.packed = packed.data();
  op.q = q.data();
  op.amax = amax.data();
  op.offset = offset.data();
  op.sums = sums.data();
  op.normed = normed.data();
  op.y = y.data();
  for (int row = 0; row < rows; ++row) level.prepare_row(op, row);
  level.multiply_tiles(op, 0, output_tiles);
  print("normed", normed);
  print("quantized", q);
  print("linear", y);
}

// A copy of the caches of two heads whose pages below `unread` positions of each end the process if they are read.
static float* guard(const std::vector<float>& cache, size_t unread, int size) {
  constexpr size_t kPage = 4096;
  const size_t bytes = cache.size() * sizeof(float), head = bytes / 2, end = unread * size * sizeof(float);
  auto* copy = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::memcpy(copy, cache.data(), bytes);
  for (size_t at : {size_t{0}, head}) {
    const size_t first = (at + kPage - 1) / kPage * kPage, last = (at + end) / kPage * kPage;
    if (first < last) mprotect(copy + first, last - first, PROT_NONE);
  }
  return reinterpret_cast<float*>(copy);
}

static void run_attention(const Level& level, int rows, int cached, int size, bool tree, float softcap, int window,
                          CacheType type, bool row_norms = false, int rotary = -1) {
  Attention op{};
  op.rows = rows;
  op.heads = 6;
  op.kv_heads = 2;
  op.size = size;
  op.rotary = rotary < 0 ? size : rotary;
  op.row_norms = row_norms;
  op.capacity = cached + rows + 128;
  op.cached = cached;
  op.window = window;
  op.scale = 1.0f / std::sqrt(static_cast<float>(size));
  op.softcap = softcap;
  op.epsilon = 1e-5f;
  const auto qkv = floats(static_cast<size_t>(rows) * 10 * size, 3.0f), norm = floats(6 * size);
  const auto cos = floats(static_cast<size_t>(op.capacity) * size / 2), sin = floats(cos.size());
  auto key = floats(static_cast<size_t>(2) * op.capacity * size), value = floats(key.size());
  std::vector<uint16_t> key_16(key.size()), value_16(key.size());
  std::vector<int8_t> key_8(key.size()), value_8(key.size());
  auto key_scale = floats(2 * size, 0.02f), value_scale = floats(2 * size, 0.02f);
  for (int i = 0; i < 2 * size; ++i) {
    key_scale[i] = 0.001f + std::fabs(key_scale[i]);
    value_scale[i] = 0.001f + std::fabs(value_scale[i]);
  }
  for (size_t i = 0; i < key.size(); ++i) {
    // Any pattern that is a small number, subnormal ones too.
    key_16[i] = static_cast<uint16_t>(next() & (type == CacheType::kHalf ? 0xbfff : 0xbf7f));
    value_16[i] = static_cast<uint16_t>(next() & (type == CacheType::kHalf ? 0xbfff : 0xbf7f));
    key_8[i] = static_cast<int8_t>(static_cast<int>(next() % 255) - 127);
    value_8[i] = static_cast<int8_t>(static_cast<int>(next() % 255) - 127);
  }
  std::vector<int64_t> positions(rows);
  std::vector<int32_t> depth(rows), path(static_cast<size_t>(rows) * rows);
  for (int row = 0; row < rows; ++row) {
    // A tree of two branches: even rows, and odd ones.
    int count = 0;
    for (int other = 0; other <= row; ++other) {
      if (!tree || other % 2 == row % 2) path[static_cast<size_t>(row) * rows + count++] = other;
    }
    depth[row] = count - 1;
    positions[row] = cached + depth[row];
  }
  op.chain = !tree;
  op.depth = depth.data();
  op.path = path.data();
  op.positions = positions.data();
  op.qkv = qkv.data();
  op.cos = cos.data();
  op.sin = sin.data();
  op.q_norm = op.k_norm = norm.data();
  op.cache_type = type;
  op.blocks = (cached + rows + 63) / 64;
  op.first_block = window > 0 && cached + 1 > window ? (cached + 1 - window) / 64 : 0;
  const size_t unread = static_cast<size_t>(op.first_block) * 64;
  switch (type) {
    case CacheType::kFloat:
      op.key = guard(key, unread, size);
      op.value = guard(value, unread, size);
      break;
    case CacheType::kInt8:
    case CacheType::kBothTiers:
    case CacheType::kUpperTier:
      op.key = key_8.data();
      op.value = value_8.data();
      op.key_scale = key_scale.data();
      op.value_scale = value_scale.data();
      break;
    default:
      op.key = key_16.data();
      op.value = value_16.data();
  }
  op.run = 2;
  std::vector<float> queries(static_cast<size_t>(6) * rows * size), out(queries.size());
  std::vector<float> partial(static_cast<size_t>(6) * rows * op.blocks * ((size + 15) / 16 * 16 + 16));
  op.queries = queries.data();
  op.partial = partial.data();
  op.out = out.data();
  for (int row = 0; row < rows; ++row) level.append_row(op, row);
  for (op.streamed = false;; op.streamed = true) {
    for (int task = 0; task < level.attention_tasks(op); ++task) level.attend(op, task);
    for (int piece = 0; !op.streamed && piece < rows * 2; ++piece) level.merge_blocks(op, piece);
    print(op.streamed ? "streamed" : "attention", out);
    if (op.streamed) break;
  }
  if (type == CacheType::kFloat) {
    mprotect(op.key, key.size() * sizeof(float), PROT_READ);
    const auto* keys = static_cast<float*>(op.key);
    print("keys", std::vector<float>(keys, keys + key.size()));
    munmap(op.key, key.size() * sizeof(float));
    munmap(op.value, value.size() * sizeof(float));
  } else if (type == CacheType::kHalf || type == CacheType::kBfloat) {
    print("keys", key_16);
    print("values", value_16);
  } else {
    print("keys", key_8);
    print("values", value_8);
  }
}

#if defined(QUASAR_LINKED)
static const Level* find_level(int, char**) { return choose_level(); }
#else
static const Level* find_level(int count, char** arguments) {
  void* library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  void* choose = library == nullptr ? nullptr : dlsym(library, "quasar_choose_level");
  return choose == nullptr ? nullptr : static_cast<const Level*>(reinterpret_cast<const void* (*)()>(choose)());
}
#endif

int main(int count, char** arguments) {
  const Level* level = find_level(count, arguments);
  if (level == nullptr) return 2;
  std::fprintf(stderr, "%s\n", level->name);
  for (int rows : {1, 2, 7, 17}) {
    for (int inputs : {1, 33, 128}) {
      for (Gate gate : {Gate::kNone, Gate::kSilu, Gate::kGelu}) {
        for (Form form : {Form::kBytes, Form::kByteBlocks}) run_linear(*level, rows, inputs, 70, gate, form);
        for (int group : {32, 128}) {
          for (bool offsets : {false, true}) {
            run_linear(*level, rows, inputs, 70, gate, Form::kNibbleBlocks, group, offsets);
            run_linear(*level, rows, (inputs + 31) / 32 * 32, 70, gate, Form::kNibblePlanes, group, offsets);
          }
        }
      }
    }
  }
  for (int size : {16, 24, 64}) {
    for (int rows : {1, 6, 40}) {
      for (CacheType type : {CacheType::kFloat, CacheType::kHalf, CacheType::kBfloat, CacheType::kInt8,
                             CacheType::kBothTiers, CacheType::kUpperTier}) {
        // Tiers hold sixteen values side by side.
        if (type >= CacheType::kBothTiers && size % 16 != 0) continue;
        run_attention(*level, rows, 100, size, false, 0.0f, 0, type);
        run_attention(*level, rows, 64, size, true, 4.0f, 30, type);
        run_attention(*level, rows, 200, size, true, 0.0f, 70, type, true, size / 2);
        run_attention(*level, rows, 100, size, false, 0.0f, 0, type, true, 0);
      }
    }
  }
  const auto logits = floats(50001);
  std::vector<int64_t> token(1);
  level->argmax_row(logits.data(), 50001, token.data());
  print("argmax", token);
  return 0;
}
