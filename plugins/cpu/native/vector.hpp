// Sixteen float lanes and sixteen sums of four 8-bit products, on every instruction level with the same bits: each
// operation rounds as IEEE 754 says, sums of lanes are taken in one fixed order, and nothing is contracted
// (-ffp-contract=off) but the fused multiply-adds that are written as such.
//
// Included once per level, inside its namespace: functions compiled for one level must not be shared with another.

// Arrays of lanes stay in registers only if the loops over them are gone early.
#define QUASAR_UNROLL _Pragma("GCC unroll 16")

#if defined(QUASAR_AVX512)

struct Lanes {
  __m512 v;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger, and b where either is no number.
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a · 2^n for integral n from -126 to 127.
inline Lanes scale_by_power_of_two(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Lanes from `count` on are replaced by x.
inline Lanes keep_first(Lanes a, int count, float x) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
  return {_mm512_mask_blend_ps(mask, _mm512_set1_ps(x), a.v)};
}
// The values whose x is at least the floor, 0 for the others.
inline Lanes keep_at_least(Lanes x, Lanes floor, Lanes value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, floor.v, _CMP_GE_OQ), value.v)};
}
inline float sum(Lanes a) {
  const __m256 h =
      _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a.v); }
// 16 rows of 16 values become 16 columns.
inline void transpose_tile(const float* from, size_t from_stride, float* to, size_t to_stride) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 even_a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88),
                 odd_a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    const __m512 even_b = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    const __m512 odd_b = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_ps(to + i * to_stride, _mm512_shuffle_f32x4(even_a, even_b, 0x88));
    _mm512_storeu_ps(to + (4 + i) * to_stride, _mm512_shuffle_f32x4(odd_a, odd_b, 0x88));
    _mm512_storeu_ps(to + (8 + i) * to_stride, _mm512_shuffle_f32x4(even_a, even_b, 0xdd));
    _mm512_storeu_ps(to + (12 + i) * to_stride, _mm512_shuffle_f32x4(odd_a, odd_b, 0xdd));
  }
}
// 16 signed bytes, rounded half to even; the values lie within ±127.
inline void store_bytes(int8_t* p, Lanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline Lanes load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(Half* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Lanes load(const Bfloat* p) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}

struct Sums {
  __m512i v;
};
inline Sums sums(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Lanes to_float(Sums a) { return {_mm512_cvtepi32_ps(a.v)}; }
struct Weights {
  __m512i v;
};
inline Weights weights(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Sums dot(Sums sums, Weights w, int32_t four) {
  return {_mm512_dpbusd_epi32(sums.v, w.v, _mm512_set1_epi32(four))};
}
constexpr bool kWeightsKeepOffset = true;
constexpr int kMostRows = 8;

#elif defined(QUASAR_AVX2)

struct Lanes {
  __m256 a, b;
};
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes sub(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes div(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Lanes larger(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes smaller(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes nearest(Lanes x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Lanes scale_by_power_of_two(Lanes x, Lanes n) { return mul(x, {power_of_two(n.a), power_of_two(n.b)}); }
inline __m256 keep_first(__m256 a, int count, float x) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 kept = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), index));
  return _mm256_blendv_ps(_mm256_set1_ps(x), a, kept);
}
inline Lanes keep_first(Lanes a, int count, float x) {
  return {keep_first(a.a, count, x), keep_first(a.b, count - 8, x)};
}
inline Lanes keep_at_least(Lanes x, Lanes floor, Lanes value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, floor.a, _CMP_GE_OQ), value.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, floor.b, _CMP_GE_OQ), value.b)};
}
inline float sum(Lanes x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline float largest(Lanes x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}
inline void transpose_tile(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    const float* source = from + (quarter / 2) * 8 * from_stride + (quarter % 2) * 8;
    float* target = to + (quarter % 2) * 8 * to_stride + (quarter / 2) * 8;
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(source + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(target + i * to_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
      _mm256_storeu_ps(target + (4 + i) * to_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
    }
  }
}
inline void store_bytes(int8_t* p, Lanes x) {
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline Lanes load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store(Half* p, Lanes x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 load_bfloats(const Bfloat* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
inline Lanes load(const Bfloat* p) { return {load_bfloats(p), load_bfloats(p + 8)}; }

struct Sums {
  __m256i a, b;
};
inline Sums sums(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Lanes to_float(Sums x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

#if defined(QUASAR_AVXVNNI)

struct Weights {
  __m256i a, b;
};
inline Weights weights(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline Sums dot(Sums sums, Weights w, int32_t four) {
  const __m256i q = _mm256_set1_epi32(four);
  return {_mm256_dpbusd_avx_epi32(sums.a, w.a, q), _mm256_dpbusd_avx_epi32(sums.b, w.b, q)};
}
constexpr bool kWeightsKeepOffset = true;

#else

// Pairs of products are added in 16 bits: |w| as unsigned bytes times q with w's sign stays within 2 * 128 * 127.
struct Weights {
  __m256i a, b, magnitude_a, magnitude_b;
};
inline Weights weights(const uint8_t* p) {
  const __m256i shift = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i a = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), shift);
  const __m256i b = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)), shift);
  return {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
}
inline Sums dot(Sums sums, Weights w, int32_t four) {
  const __m256i q = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  const __m256i pairs_a = _mm256_maddubs_epi16(w.magnitude_a, _mm256_sign_epi8(q, w.a));
  const __m256i pairs_b = _mm256_maddubs_epi16(w.magnitude_b, _mm256_sign_epi8(q, w.b));
  return {_mm256_add_epi32(sums.a, _mm256_madd_epi16(pairs_a, ones)),
          _mm256_add_epi32(sums.b, _mm256_madd_epi16(pairs_b, ones))};
}
constexpr bool kWeightsKeepOffset = false;

#endif
constexpr int kMostRows = 2;

#elif defined(QUASAR_NEON)

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
constexpr int kMostRows = 2;

#else

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
constexpr int kMostRows = 2;

#endif

// Rounded half to even; a NaN stays one.
inline void store(Bfloat* p, const Lanes& x) {
  float v[16];
  store(v, x);
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, v + i, sizeof bits);
    const bool number = (bits & 0x7fffffff) <= 0x7f800000;
    p[i].bits = static_cast<uint16_t>(number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
  }
}

// The first `count` values, zeros behind them.
template <typename Element>
inline Lanes load_first(const Element* p, int count) {
  if (count >= 16) return load(p);
  Element v[16] = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return load(v);
}
template <typename Element>
inline void store_first(Element* p, const Lanes& x, int count) {
  if (count >= 16) return store(p, x);
  Element v[16];
  store(v, x);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
// 2^x within 2 units in the last place for x from -126 to 0; below, as for -126.
inline Lanes power_of_two_up_to_one(Lanes x) {
  x = larger(splat(-126.0f), x);
  const Lanes n = nearest(x);
  const Lanes f = sub(x, n);
  Lanes y = splat(1.535336188319500e-4f);
  y = fma(y, f, splat(1.339887440266574e-3f));
  y = fma(y, f, splat(9.618437357674640e-3f));
  y = fma(y, f, splat(5.550332471162809e-2f));
  y = fma(y, f, splat(2.402264791363012e-1f));
  y = fma(y, f, splat(6.931472028550421e-1f));
  y = fma(y, f, splat(1.0f));
  return scale_by_power_of_two(y, n);
}
// e^x within 2 units in the last place, for x from -87.3 to 88 and clamped to that; what is no number stays so.
inline Lanes exponential(Lanes x) {
  x = larger(splat(-87.3365447f), smaller(splat(88.0f), x));
  const Lanes n = nearest(mul(x, splat(1.44269504f)));
  Lanes r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Lanes y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), splat(1.0f));
  return scale_by_power_of_two(y, n);
}
