// NEON: sixteen lanes in four registers. What each function means is said in vector_avx512.hpp.

struct Lanes {
  float32x4_t v[4];
};
template <typename Operation>
inline Lanes each(Operation operation) {
  return {{operation(0), operation(1), operation(2), operation(3)}};
}
inline Lanes load(const float* p) {
  return each([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, Lanes x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline Lanes splat(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
inline Lanes add(Lanes x, Lanes y) {
  return each([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline Lanes sub(Lanes x, Lanes y) {
  return each([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline Lanes mul(Lanes x, Lanes y) {
  return each([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline Lanes div(Lanes x, Lanes y) {
  return each([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
inline Lanes fma(Lanes x, Lanes y, Lanes z) {
  return each([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline Lanes larger(Lanes x, Lanes y) {
  return each([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline Lanes smaller(Lanes x, Lanes y) {
  return each([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline Lanes nearest(Lanes x) {
  return each([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline Lanes scale_by_power_of_two(Lanes x, Lanes n) {
  return mul(x, each([&](int i) {
               return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
             }));
}
inline Lanes keep_first(Lanes x, int count, float other) {
  static const int32_t kIndex[4] = {0, 1, 2, 3};
  return each([&](int i) {
    const uint32x4_t kept = vcgtq_s32(vdupq_n_s32(count - 4 * i), vld1q_s32(kIndex));
    return vbslq_f32(kept, x.v[i], vdupq_n_f32(other));
  });
}
inline Lanes keep_at_least(Lanes x, Lanes floor, Lanes value) {
  return each([&](int i) { return vbslq_f32(vcgeq_f32(x.v[i], floor.v[i]), value.v[i], vdupq_n_f32(0.0f)); });
}
inline float sum(Lanes x) {
  const float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
inline float largest(Lanes x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
inline void transpose_tile(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
inline void store_bytes(int8_t* p, Lanes x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[0])), vqmovn_s32(vcvtnq_s32_f32(x.v[1])));
  const int16x8_t high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[2])), vqmovn_s32(vcvtnq_s32_f32(x.v[3])));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

inline Lanes load(const Half* p) {
  return each([&](int i) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p + 4 * i))));
  });
}
inline void store(Half* p, Lanes x) {
  for (int i = 0; i < 4; ++i) {
    vst1_u16(reinterpret_cast<uint16_t*>(p + 4 * i), vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
  }
}
inline Lanes load(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline Lanes load(const Bfloat* p) {
  return each([&](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p + 4 * i)), 16));
  });
}

struct Sums {
  int32x4_t v[4];
};
inline Sums sums(int32_t x) {
  const int32x4_t same = vdupq_n_s32(x);
  return {{same, same, same, same}};
}
inline Lanes to_float(Sums x) {
  return each([&](int i) { return vcvtq_f32_s32(x.v[i]); });
}
struct Weights {
  int8x16_t v[4];
};
inline Weights weights(const uint8_t* p) {
  const uint8x16_t shift = vdupq_n_u8(0x80);
  Weights w;
  for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), shift));
  return w;
}
inline Sums dot(Sums sums, Weights w, int32_t four) {
  const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) sums.v[i] = vdotq_s32(sums.v[i], w.v[i], q);
  return sums;
}
constexpr bool kWeightsKeepOffset = false;
// Four inputs of sixteen columns, from 0 to 15, of the 32 columns that 64 bytes hold.
struct Nibbles {
  int8x16_t v[4];
};
inline Nibbles low_nibbles(const uint8_t* p) {
  Nibbles w;
  for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_s8_u8(vandq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(15)));
  return w;
}
inline Nibbles high_nibbles(const uint8_t* p) {
  Nibbles w;
  for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p + 16 * i), 4));
  return w;
}
// Sums of products over a block, begun at `offset`.
struct BlockSums {
  Sums all;
};
inline BlockSums block_sums(int32_t offset) { return {sums(offset)}; }
inline BlockSums dot(BlockSums sums, Nibbles w, int32_t four) {
  const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(four));
  for (int i = 0; i < 4; ++i) sums.all.v[i] = vdotq_s32(sums.all.v[i], w.v[i], q);
  return sums;
}
inline Sums whole(BlockSums sums, int32_t) { return sums.all; }
template <typename AnySums, typename Element>
inline void before_next(AnySums&, const Element*&) {}
constexpr int kMostRows = 2, kRowsOfWholeTiles = 2, kQueryRows = 1;
