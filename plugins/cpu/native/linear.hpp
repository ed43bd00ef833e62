// W8A8Linear, W8A8BlockLinear, W4A8BlockLinear and W4A16BlockLinear: quantization of rows, and packed tiles times rows.
// Included once per level, after vector.hpp.

// 1 / sqrt(mean(x^2) + epsilon)
inline float rms_factor(const float* x, float epsilon, int count) {
  Lanes squares = splat(0.0f);
  for (int i = 0; i < count; i += 16) {
    const Lanes v = load_first(x + i, count - i);
    squares = fma(v, v, squares);
  }
  const float mean = sum(squares) / static_cast<float>(count);
  return 1.0f / __builtin_sqrtf(mean + epsilon);
}

// x * factor * weight
inline void scale_by(float factor, const float* x, const float* weight, int count, float* y) {
  for (int i = 0; i < count; i += 16) {
    const Lanes v = mul(mul(load_first(x + i, count - i), splat(factor)), load_first(weight + i, count - i));
    store_first(y + i, v, count - i);
  }
}

// The largest magnitude; infinity or NaN where the values hold one. Compared as integers: NaN > infinity > numbers.
inline float amax(const float* x, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float result;
  __builtin_memcpy(&result, &most, sizeof result);
  return result;
}

// q = round((x / a) / (1 / 127)), as the canonical graph has it, for `count` values, zeros up to `padded`; returns 128
// times their sum, negated.
inline int32_t quantize(const float* x, float a, int count, int padded, int8_t* q) {
  const Lanes largest = splat(a), step = splat(1.0f / 127.0f);
  int i = 0;
  for (; i + 16 <= count; i += 16) store_bytes(q + i, div(div(load(x + i), largest), step));
  if (i < count) {
    int8_t rest[16];
    store_bytes(rest, div(div(load_first(x + i, count - i), largest), step));
    for (int j = 0; i < count; ++i, ++j) q[i] = rest[j];
  }
  for (; i < padded; ++i) q[i] = 0;
  int32_t total = 0;
  for (i = 0; i < count; ++i) total += q[i];
  return -128 * total;
}

inline void quantize_group(const float* x, int count, int padded, int8_t* q, float* a, int32_t* offset) {
  const float largest = amax(x, count);
  if (!(largest < __builtin_inff())) {
    // A value that is no finite number makes every output of its row NaN.
    for (int i = 0; i < padded; ++i) q[i] = 0;
    *a = __builtin_nanf("");
    *offset = 0;
    return;
  }
  *a = largest > kAmaxFloor ? largest : kAmaxFloor;
  *offset = quantize(x, *a, count, padded, q);
}

// Integers of 16 bits, whose larger part is the first plane's and whose rest is the second's: from -127 to 127, and from
// -128 to 127. Sums of a block times 4 bits are less than 2^24.
constexpr float kPlanesMax = 127 * 256 + 127;

// A block of 32 values, from `q` on and `padded` bytes further; returns the sum of its integers.
inline int32_t quantize_planes(const float* x, int padded, int8_t* q, float* a, int32_t* offset, int blocks) {
  const float largest = amax(x, kBlock);
  if (!(largest < __builtin_inff())) {
    // A value that is no finite number makes every output of its row NaN.
    for (int i = 0; i < kBlock; ++i) q[i] = q[padded + i] = 0;
    *a = __builtin_nanf("");
    offset[0] = offset[blocks] = 0;
    return 0;
  }
  *a = largest > kAmaxFloor ? largest : kAmaxFloor;
  alignas(64) float steps[kBlock];
  for (int i = 0; i < kBlock; i += 16) {
    store(steps + i, nearest(div(div(load(x + i), splat(*a)), splat(1.0f / kPlanesMax))));
  }
  int32_t high_total = 0, low_total = 0;
  for (int i = 0; i < kBlock; ++i) {
    const int32_t whole = static_cast<int32_t>(steps[i]), high = (whole + 128) >> 8, low = whole - high * 256;
    q[i] = static_cast<int8_t>(high);
    q[padded + i] = static_cast<int8_t>(low);
    high_total += high;
    low_total += low;
  }
  offset[0] = -128 * high_total;
  offset[blocks] = -128 * low_total;
  return 256 * high_total + low_total;
}

// The norm, and the integers that a row is multiplied as.
void prepare_row(const Linear& op, int row) {
  const float* x = op.x + static_cast<size_t>(row) * op.inputs;
  if (op.norm != nullptr) {
    float* normed = op.normed + static_cast<size_t>(row) * op.inputs;
    scale_by(rms_factor(x, op.epsilon, op.inputs), x, op.norm, op.inputs, normed);
    x = normed;
  }
  const int blocks = op.padded / kBlock;
  if (op.form == Form::kNibblePlanes) {
    int8_t* planes = op.q + 2 * static_cast<size_t>(row) * op.padded;
    for (int b = 0; b < blocks; ++b) {
      const size_t at = static_cast<size_t>(row) * blocks + b;
      int32_t* offset = op.offset + 2 * static_cast<size_t>(row) * blocks + b;
      const int32_t total =
          quantize_planes(x + b * kBlock, op.padded, planes + b * kBlock, op.amax + at, offset, blocks);
      if (op.offsets) op.sums[at] = static_cast<float>(total) * op.amax[at];
    }
    return;
  }
  int8_t* q = op.q + static_cast<size_t>(row) * op.padded;
  if (op.form == Form::kBytes) {
    quantize_group(x, op.inputs, op.padded, q, op.amax + row, op.offset + row);
    return;
  }
  for (int b = 0; b < blocks; ++b) {
    const int count = op.inputs - b * kBlock < kBlock ? op.inputs - b * kBlock : kBlock;
    const size_t at = static_cast<size_t>(row) * blocks + b;
    quantize_group(x + b * kBlock, count, kBlock, q + b * kBlock, op.amax + at, op.offset + at);
    if (op.offsets) op.sums[at] = static_cast<float>(op.offset[at] / -128) * op.amax[at];
  }
}

inline int32_t four_bytes(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return four;
}

// What to fetch from memory while a tile is multiplied. One pass over few rows reads on in its own tile; where several
// passes share a tile, each fetches its part of the next one, so that memory never waits for arithmetic.
struct Ahead {
  const uint8_t* next;
  int step;
};
// Rows of two planes are as much work as two.
inline int num_passes(const Linear& op) {
  const int most = op.form == Form::kNibblePlanes ? kMostRows / 2 : kMostRows;
  return (op.rows + most - 1) / most;
}
// `kStep`: bytes of four inputs of a whole tile.
template <int C, int kStep = 4 * kTile>
inline Ahead look_ahead(const Linear& op, const uint8_t* tile, int row, int first) {
  constexpr int kDistance = 4096;
  const int passes = num_passes(op);
  if (passes == 1) return {tile + kStep * first / kTile + kDistance, kStep};
  const int bytes = op.padded / 4 * kStep;
  const int distance = op.gate != Gate::kNone ? 2 * bytes : bytes;
  const int part = row * passes / op.rows * kTile + first;
  return {tile + distance + static_cast<size_t>(part) * bytes / (kTile * passes), kStep * C / kTile / passes};
}
template <int C>
inline void fetch(Ahead* ahead) {
  __builtin_prefetch(ahead->next, 0, 2);
  if (C == kTile && ahead->step > 64) __builtin_prefetch(ahead->next + 64, 0, 2);
  ahead->next += ahead->step;
}

// Bytes of four inputs of a tile with 4-bit weights.
constexpr int kNibbleStep = 2 * kTile;

// Sixteen columns of a tile at a time, where the sums of R rows by all 32 do not fit the registers: each half is read
// from the first input to the last, and touches cache lines of its own.
template <int R>
constexpr int kTogether = R > kRowsOfWholeTiles ? kTile / 2 : kTile;

// Four inputs of sixteen columns a part, times those of R rows, `stride` apart from `at` on: added to `total`.
template <int R, int Parts>
inline void add_products(Sums (&total)[R][Parts], const uint8_t* tile, const int8_t* at, size_t stride) {
  QUASAR_UNROLL
  for (int p = 0; p < Parts; ++p) {
    const Weights w = weights(tile + 64 * p);
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) {
      total[r][p] = dot(total[r][p], w, four_bytes(at + r * stride));
      before_next(total[r][p], at);
    }
  }
}

// Columns `first` to `first + C` of a tile times R rows from `row` on, dequantized: y [R, 32].
template <int R, int C>
inline void multiply(const Linear& op, const uint8_t* tile, const float* scale, int columns, int row, int first,
                     float* y) {
  constexpr int kParts = C / 16;
  const int8_t* q = op.q + static_cast<size_t>(row) * op.padded;
  Ahead ahead = look_ahead<C>(op, tile, row, first);
  tile += 4 * first;
  Sums total[R][kParts];
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int p = 0; p < kParts; ++p) total[r][p] = sums(kWeightsKeepOffset ? op.offset[row + r] : 0);
  }
  for (int k = 0; k < op.padded; k += 4, tile += 4 * kTile) {
    fetch<C>(&ahead);
    add_products(total, tile, q + k, op.padded);
  }
  const Lanes step = splat(1.0f / 127.0f);
  QUASAR_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const int at = first + 16 * p;
    const Lanes factor = mul(step, load_first(scale + at, columns - at));
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) {
      store(y + r * kTile + at, mul(mul(to_float(total[r][p]), factor), splat(op.amax[row + r])));
    }
  }
}

// The same with a scale for every 32 inputs, on both sides.
template <int R, int C>
inline void multiply_blocks(const Linear& op, const uint8_t* tile, const float* scale, int row, int first, float* y) {
  constexpr int kParts = C / 16;
  const int8_t* q = op.q + static_cast<size_t>(row) * op.padded;
  const int blocks = op.padded / kBlock;
  Ahead ahead = look_ahead<C>(op, tile, row, first);
  tile += 4 * first;
  Lanes result[R][kParts];
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int p = 0; p < kParts; ++p) result[r][p] = splat(0.0f);
  }
  const Lanes step = splat(1.0f / 127.0f);
  for (int b = 0; b < blocks; ++b, scale += kTile) {
    Sums total[R][kParts];
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) {
      const int32_t offset = kWeightsKeepOffset ? op.offset[static_cast<size_t>(row + r) * blocks + b] : 0;
      QUASAR_UNROLL
      for (int p = 0; p < kParts; ++p) total[r][p] = sums(offset);
    }
    for (int k = 0; k < kBlock; k += 4, tile += 4 * kTile) {
      fetch<C>(&ahead);
      add_products(total, tile, q + b * kBlock + k, op.padded);
    }
    QUASAR_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const Lanes factor = mul(step, load(scale + first + 16 * p));
      QUASAR_UNROLL
      for (int r = 0; r < R; ++r) {
        const Lanes a = splat(op.amax[static_cast<size_t>(row + r) * blocks + b]);
        result[r][p] = fma(to_float(total[r][p]), mul(factor, a), result[r][p]);
      }
    }
  }
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    QUASAR_UNROLL
    for (int p = 0; p < kParts; ++p) store(y + r * kTile + first + 16 * p, result[r][p]);
  }
}

// Four inputs of sixteen columns a part, times those of R rows, as `add_products` does.
template <int R>
inline void add_nibble_products(BlockSums (&total)[R], Nibbles w, const int8_t* at, size_t stride) {
  QUASAR_UNROLL
  for (int r = 0; r < R; ++r) {
    total[r] = dot(total[r], w, four_bytes(at + r * stride));
    before_next(total[r], at);
  }
}

// A block's sums as floats, which hold them exactly.
template <int kPlanes>
inline Lanes block_total(const BlockSums* total, const int32_t* offset) {
  const Lanes first = to_float(whole(total[0], offset[0]));
  if constexpr (kPlanes == 1) return first;
  return fma(first, splat(256.0f), to_float(whole(total[1], offset[1])));
}

// 4-bit weights: a scale for every 32 inputs of a row, and for every group of them in a column; there an offset, too.
// Rows of two planes are two rows of integers.
template <int R, int C, bool kOffsets, int kPlanes>
inline void multiply_nibbles(const Linear& op, const uint8_t* tile, const Half* scale, int row, int first, float* y) {
  constexpr int kParts = C / 16, kRows = R * kPlanes;
  const int8_t* q = op.q + static_cast<size_t>(row) * kPlanes * op.padded;
  const int blocks = op.padded / kBlock, blocks_of_group = op.group / kBlock;
  const int32_t* row_offset = op.offset + static_cast<size_t>(row) * kPlanes * blocks;
  Ahead ahead = look_ahead<C, kNibbleStep>(op, tile, row, first);
  Lanes result[kParts][R];
  QUASAR_UNROLL
  for (int p = 0; p < kParts; ++p) {
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) result[p][r] = splat(0.0f);
  }
  const Lanes step = splat(1.0f / (kPlanes == 1 ? 127.0f : kPlanesMax));
  for (int b = 0; b < blocks; ++b) {
    // 8 in a weight; nothing where weights have offsets of their own.
    int32_t offset[kRows];
    QUASAR_UNROLL
    for (int r = 0; r < kRows; ++r) offset[r] = kOffsets ? 0 : row_offset[r * blocks + b] / 16;
    BlockSums total[kParts][kRows];
    QUASAR_UNROLL
    for (int p = 0; p < kParts; ++p) {
      QUASAR_UNROLL
      for (int r = 0; r < kRows; ++r) total[p][r] = block_sums(offset[r]);
    }
    for (int k = b * kBlock; k < (b + 1) * kBlock; k += 4, tile += kNibbleStep) {
      fetch<C>(&ahead);
      if (C == kTile || first == 0) add_nibble_products(total[0], low_nibbles(tile), q + k, op.padded);
      if (C == kTile || first != 0) add_nibble_products(total[kParts - 1], high_nibbles(tile), q + k, op.padded);
    }
    const Half* here = scale + b / blocks_of_group * (kOffsets ? 2 * kTile : kTile) + first;
    QUASAR_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const Lanes factor = mul(step, load(here + 16 * p));
      const Lanes shift = kOffsets ? mul(step, load(here + kTile + 16 * p)) : step;
      QUASAR_UNROLL
      for (int r = 0; r < R; ++r) {
        const size_t at = static_cast<size_t>(row + r) * blocks + b;
        const Lanes sum = block_total<kPlanes>(total[p] + r * kPlanes, offset + r * kPlanes);
        result[p][r] = fma(sum, mul(factor, splat(op.amax[at])), result[p][r]);
        if (kOffsets) result[p][r] = fma(splat(op.sums[at]), shift, result[p][r]);
      }
    }
  }
  QUASAR_UNROLL
  for (int p = 0; p < kParts; ++p) {
    QUASAR_UNROLL
    for (int r = 0; r < R; ++r) store(y + r * kTile + first + 16 * p, result[p][r]);
  }
}

template <int R, int kPlanes>
inline void nibble_product(const Linear& op, const uint8_t* tile, const Half* scale, int row, float* y) {
  constexpr int kWide = kTogether<R * kPlanes>;
  for (int first = 0; first < kTile; first += kWide) {
    if (op.offsets) {
      multiply_nibbles<R, kWide, true, kPlanes>(op, tile, scale, row, first, y);
    } else {
      multiply_nibbles<R, kWide, false, kPlanes>(op, tile, scale, row, first, y);
    }
  }
}

template <int R>
inline void product(const Linear& op, int tile, int column, int columns, int row, float* y) {
  const size_t inputs = static_cast<size_t>(tile) * op.padded;
  const size_t first_group = static_cast<size_t>(tile) * ((op.padded + op.group - 1) / op.group);
  const uint8_t* nibbles = op.packed + inputs * kTile / 2;
  const Half* group_scale = op.group_scale + first_group * (op.offsets ? 2 * kTile : kTile);
  constexpr int kWide = kTogether<R>;
  switch (op.form) {
    case Form::kBytes:
      for (int first = 0; first < kTile; first += kWide) {
        multiply<R, kWide>(op, op.packed + inputs * kTile, op.scale + column, columns, row, first, y);
      }
      break;
    case Form::kByteBlocks:
      for (int first = 0; first < kTile; first += kWide) {
        multiply_blocks<R, kWide>(op, op.packed + inputs * kTile, op.scale + inputs, row, first, y);
      }
      break;
    case Form::kNibbleBlocks:
      nibble_product<R, 1>(op, nibbles, group_scale, row, y);
      break;
    case Form::kNibblePlanes:
      if constexpr (R <= kMostRows / 2) nibble_product<R, 2>(op, nibbles, group_scale, row, y);
      break;
  }
  if (op.bias == nullptr) return;
  const Lanes low = load_first(op.bias + column, columns), high = load_first(op.bias + column + 16, columns - 16);
  for (int r = 0; r < R; ++r) {
    store(y + r * kTile, add(load(y + r * kTile), low));
    store(y + r * kTile + 16, add(load(y + r * kTile + 16), high));
  }
}

// x / (1 + e^-x)
inline Lanes silu(Lanes x) { return div(x, add(splat(1.0f), exponential(sub(splat(0.0f), x)))); }

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + e^-2u), which loses no digits where tanh is
// near -1: within 3e-7 |x|. Below -16 it is what it is there: less than 1e-37, where -x / e^88 would grow again.
inline Lanes gelu(Lanes x) {
  const Lanes minus_2u = mul(x, fma(mul(x, x), splat(-0.0713548163f), splat(-1.59576912f)));
  return div(larger(splat(-16.0f), x), add(splat(1.0f), exponential(minus_2u)));
}

// Columns of one output tile for R rows.
template <int R>
inline void output_tile(const Linear& op, int tile, int row) {
  alignas(64) float y[R * kTile];
  const int column = tile * kTile;
  const int columns = op.outputs - column < kTile ? op.outputs - column : kTile;
  if (op.gate != Gate::kNone) {
    alignas(64) float gate[R * kTile];
    product<R>(op, 2 * tile, column, columns, row, gate);
    product<R>(op, 2 * tile + 1, op.outputs + column, columns, row, y);
    for (int i = 0; i < R * kTile; i += 16) {
      const Lanes v = load(gate + i);
      store(y + i, mul(op.gate == Gate::kSilu ? silu(v) : gelu(v), load(y + i)));
    }
  } else {
    product<R>(op, tile, column, columns, row, y);
  }
  for (int r = 0; r < R; ++r) {
    const size_t at = static_cast<size_t>(row + r) * op.outputs + column;
    for (int half = 0; half < kTile && half < columns; half += 16) {
      Lanes v = load(y + r * kTile + half);
      if (op.residual != nullptr) v = add(load_first(op.residual + at + half, columns - half), v);
      store_first(op.y + at + half, v, columns - half);
    }
  }
}

template <int R>
inline void output_rows(const Linear& op, int tile, int row, int rows) {
  if constexpr (R > 0) {
    if (rows == R) {
      output_tile<R>(op, tile, row);
    } else {
      output_rows<R - 1>(op, tile, row, rows);
    }
  }
}

// As few passes over a tile as there can be, of about as many rows each: reading the tile takes a short pass as long.
void multiply_tiles(const Linear& op, int first, int end) {
  const int passes = num_passes(op);
  for (int tile = first; tile < end; ++tile) {
    for (int pass = 0, row = 0; pass < passes; ++pass) {
      const int rows = (op.rows - row) / (passes - pass);
      output_rows<kMostRows>(op, tile, row, rows);
      row += rows;
    }
  }
}

void argmax_row(const float* logits, int64_t columns, int64_t* token) {
  int64_t best = 0;
  Lanes most = splat(-__builtin_inff());
  // Runs of 1024: their largest value first, and only then where it is.
  float found = -__builtin_inff();
  for (int64_t start = 0; start < columns; start += 1024) {
    const int count = static_cast<int>(columns - start < 1024 ? columns - start : 1024);
    most = splat(found);
    int i = 0;
    for (; i + 16 <= count; i += 16) most = larger(load(logits + start + i), most);
    float here = largest(most);
    for (; i < count; ++i) here = logits[start + i] > here ? logits[start + i] : here;
    if (!(here > found)) continue;
    for (i = 0; i < count; ++i) {
      if (logits[start + i] == here) {
        best = start + i;
        break;
      }
    }
    found = here;
  }
  *token = best;
}

// Reads everything once: what memory can deliver.
float read_all(const float* memory, size_t count) {
  Lanes most = splat(0.0f);
  for (size_t i = 0; i + 64 <= count; i += 64) {
    __builtin_prefetch(memory + i + 1024, 0, 2);
    __builtin_prefetch(memory + i + 1040, 0, 2);
    __builtin_prefetch(memory + i + 1056, 0, 2);
    __builtin_prefetch(memory + i + 1072, 0, 2);
    most = larger(larger(load(memory + i), load(memory + i + 16)),
                  larger(most, larger(load(memory + i + 32), load(memory + i + 48))));
  }
  return largest(most);
}
