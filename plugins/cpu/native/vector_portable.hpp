// Plain C++: sixteen lanes in an array. What each function means is said in vector_avx512.hpp.

struct Lanes {
  float v[16];
};
template <typename Operation>
inline Lanes each(Operation operation) {
  Lanes result;
  for (int i = 0; i < 16; ++i) result.v[i] = operation(i);
  return result;
}
inline Lanes load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(float* p, const Lanes& x) {
  for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
inline Lanes splat(float x) {
  return each([&](int) { return x; });
}
inline Lanes add(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] + y.v[i]; });
}
inline Lanes sub(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] - y.v[i]; });
}
inline Lanes mul(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] * y.v[i]; });
}
inline Lanes div(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] / y.v[i]; });
}
inline Lanes fma(const Lanes& x, const Lanes& y, const Lanes& z) {
  return each([&](int i) { return __builtin_fmaf(x.v[i], y.v[i], z.v[i]); });
}
inline Lanes larger(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
inline Lanes smaller(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
}
inline Lanes nearest(const Lanes& x) {
  return each([&](int i) { return __builtin_rintf(x.v[i]); });
}
inline Lanes scale_by_power_of_two(const Lanes& x, const Lanes& n) {
  return each([&](int i) {
    // What is no number has no power; the caller's other factor carries it.
    const int32_t bits = n.v[i] == n.v[i] ? (static_cast<int32_t>(n.v[i]) + 127) << 23 : 0;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return x.v[i] * value;
  });
}
inline Lanes keep_first(const Lanes& x, int count, float other) {
  return each([&](int i) { return i < count ? x.v[i] : other; });
}
inline Lanes keep_at_least(const Lanes& x, const Lanes& floor, const Lanes& value) {
  return each([&](int i) { return x.v[i] >= floor.v[i] ? value.v[i] : 0.0f; });
}
inline float sum(const Lanes& x) {
  float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}
inline float largest(const Lanes& x) {
  float result = x.v[0];
  for (int i = 1; i < 16; ++i) result = x.v[i] > result ? x.v[i] : result;
  return result;
}
inline void transpose_tile(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
inline void store_bytes(int8_t* p, const Lanes& x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(x.v[i])));
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline float float_of(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16, magnitude = half.bits & 0x7fff;
  if (magnitude >= 0x7c00) {
    // Infinity; a NaN comes out quiet.
    return float_of(sign | 0x7f800000 | (magnitude > 0x7c00 ? 0x400000 : 0) | (magnitude & 0x3ff) << 13);
  }
  // Scaling by 2^112 moves the exponent and makes subnormal values normal.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 5.192296858534828e33f));
}
inline Half half_of(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, magnitude = bits_of(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the rounded value in the last bits.
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13)};
}
inline Lanes load(const Half* p) {
  return each([&](int i) { return float_of(p[i]); });
}
inline void store(Half* p, const Lanes& x) {
  for (int i = 0; i < 16; ++i) p[i] = half_of(x.v[i]);
}
inline Lanes load(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline Lanes load(const Bfloat* p) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(p[i].bits) << 16); });
}

struct Sums {
  int32_t v[16];
};
inline Sums sums(int32_t x) {
  Sums result;
  for (int i = 0; i < 16; ++i) result.v[i] = x;
  return result;
}
inline Lanes to_float(const Sums& x) {
  return each([&](int i) { return static_cast<float>(x.v[i]); });
}
struct Weights {
  const uint8_t* p;
};
inline Weights weights(const uint8_t* p) { return {p}; }
inline Sums dot(Sums sums, Weights w, int32_t four) {
  int8_t q[4];
  __builtin_memcpy(q, &four, sizeof q);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 4; ++k) sums.v[i] += (static_cast<int32_t>(w.p[4 * i + k]) - 128) * q[k];
  }
  return sums;
}
constexpr bool kWeightsKeepOffset = false;
// Four inputs of sixteen columns, from 0 to 15, of the 32 columns that 64 bytes hold.
struct Nibbles {
  const uint8_t* p;
  int shift;
};
inline Nibbles low_nibbles(const uint8_t* p) { return {p, 0}; }
inline Nibbles high_nibbles(const uint8_t* p) { return {p, 4}; }
// Sums of products over a block, begun at `offset`.
struct BlockSums {
  Sums all;
};
inline BlockSums block_sums(int32_t offset) { return {sums(offset)}; }
inline BlockSums dot(BlockSums sums, Nibbles w, int32_t four) {
  int8_t q[4];
  __builtin_memcpy(q, &four, sizeof q);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 4; ++k) sums.all.v[i] += (w.p[4 * i + k] >> w.shift & 15) * q[k];
  }
  return sums;
}
inline Sums whole(const BlockSums& sums, int32_t) { return sums.all; }
template <typename AnySums, typename Element>
inline void before_next(AnySums&, const Element*&) {}
constexpr int kMostRows = 2, kRowsOfWholeTiles = 2, kQueryRows = 1;
