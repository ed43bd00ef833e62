// What operators ask of an instruction level: plain arguments, and a table of functions per level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quasar {

constexpr int kTile = 32;       // columns of a packed tile
constexpr int kBlock = 32;      // inputs that share a scale in linears with blocks
constexpr int kPositions = 64;  // logical positions of an attention block
constexpr int kStreamRows = 32;  // new tokens of a task that streams attention
constexpr float kAmaxFloor = 6.103515625e-05f;  // 2^-14

struct Level;

// What becomes of the first half of a linear's columns: act(gate) * up. The numbers are those of the attribute.
enum class Gate { kNone, kSilu, kGelu };

// 16-bit floats, as a cache may hold them.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
enum class CacheType { kFloat, kHalf, kBfloat, kInt8, kBothTiers, kUpperTier };

// A linear's weights. 8 bits around 128, packed [tiles, inputs / 4, 32 columns, 4], with a scale per column and row; the
// same with scales per block of inputs, on both sides; 4 bits with those scales, around 8 or from an offset, packed
// [tiles, inputs / 4, 16, 4]: columns 0 to 15 in the low bits of a byte, 16 to 31 in the high ones; those 4 bits times
// rows of 16 bits, in two planes: 256 times integers of the first, and integers of the second.
enum class Form { kBytes, kByteBlocks, kNibbleBlocks, kNibblePlanes };

// y [rows, outputs] = dequantized(q · w), then bias, residual or gate. Where there are gates, tiles alternate between
// gate and up.
struct Linear {
  const Level* level;
  int rows, inputs, outputs;
  int padded;                 // bytes of a quantized row: inputs rounded up to 4, or to 32 with block scales
  int tiles;                  // tiles of the packed weight
  Gate gate;
  Form form;
  int group;                  // inputs that share a scale of 4-bit weights: a multiple of a block; a block elsewhere
  const float* x;
  const float* norm;          // RMS norm weight [inputs] or null
  float epsilon;
  const uint8_t* packed;
  const float* scale;         // [N] per column; with blocks [tiles, padded / 32, 32]
  bool offsets;               // 4-bit weights have offsets beside scales
  const Half* group_scale;  // of 4-bit weights [tiles, groups, 32], or 32 scales and 32 offsets; the last group may
  // be shorter
  const float* bias;  // [N] or null
  const float* residual;  // [rows, outputs] or null
  float* y;
  // Scratch.
  int8_t* q;  // [rows, planes, padded]
  float* amax;  // [rows], with blocks [rows, padded / 32]
  int32_t* offset;  // [rows], with blocks [rows, planes, padded / 32]: what 128 in the weights adds to a sum, negated
  float* sums;  // [rows, padded / 32] with offsets: the sum of a block's integers times its amax
  float* normed;  // [rows, inputs] where norm is given
};

// Attention of new tokens over a cache, by logical position: committed ones, then the token's own ancestors and itself.
struct Attention {
  const Level* level;
  int rows, heads, kv_heads, size, capacity, cached;
  int rotary;  // values of a head that are rotated
  int window;  // positions that a token sees, 0: all
  float scale, softcap, epsilon;
  const float* qkv;  // [rows, (heads + 2 kv_heads) * size]
  const int64_t* positions;  // [rows]
  const float *cos, *sin;  // [positions, rotary / 2]
  const float *q_norm, *k_norm;  // or null
  bool row_norms;  // one norm over all heads of a token [heads * size], not one for each [size]
  CacheType cache_type;
  void *key, *value;  // [kv_heads, capacity, size]; in tiers [kv_heads, 2, capacity, size / 2]
  const float *key_scale, *value_scale;  // of an INT8 cache, of each channel [kv_heads, size]; or null
  float* out;  // [rows, heads * size]
  // Where the new tokens lie logically.
  bool chain;
  const int32_t* depth;  // [rows]: ancestors among the new tokens
  const int32_t* path;  // [rows, rows]: those ancestors and the token itself, in order
  // Scratch.
  float* queries;  // [kv_heads, rows * group, size], rotated and scaled
  int first_block;  // logical blocks from the first one that a token sees
  int blocks;  // up to the deepest token
  int run;  // blocks of one task
  bool streamed;  // one task follows all blocks of some tokens, instead of some blocks for all
  float* partial;  // [heads * rows, blocks - first_block, size rounded up to 16, + 16]: output, then maximum and sum
};

// A draw from one row of logits [columns].
struct Sampling {
  const float* logits;
  int64_t columns;
  double temperature;  // above 0
  int64_t top_k;  // 0: all
  double top_p;  // 1: all
  double min_p;  // 0: all
  uint64_t seed, position;
};

struct Level {
  const char* name;
  void (*prepare_row)(const Linear&, int row);
  void (*multiply_tiles)(const Linear&, int first, int end);
  void (*append_row)(const Attention&, int row);
  int (*attention_tasks)(const Attention&);
  void (*attend)(const Attention&, int task);
  void (*merge_blocks)(const Attention&, int piece);
  void (*argmax_row)(const float* logits, int64_t columns, int64_t* token);
  float (*read)(const float* memory, size_t count);
  int (*sample_row)(const Sampling&, int64_t* token);
};

// The best level that this CPU has, or the one that QUASAR_CPU_LEVEL names; null where the name is unknown or the CPU
// lacks it.
const Level* choose_level();

}  // namespace quasar
