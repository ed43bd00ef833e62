// AVX-512: sixteen lanes in one register.

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
inline Lanes lanes_of_bytes(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
inline Lanes load(const int8_t* p) { return lanes_of_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
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
// Four inputs of sixteen columns, from 0 to 15, of the 32 columns that 64 bytes hold.
struct Nibbles {
  __m512i v;
};
inline Nibbles low_nibbles(const uint8_t* p) { return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15))}; }
inline Nibbles high_nibbles(const uint8_t* p) {
  return {_mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15))};
}
// Sums of products over a block, begun at `offset`.
struct BlockSums {
  __m512i v;
};
inline BlockSums block_sums(int32_t offset) { return {_mm512_set1_epi32(offset)}; }
inline BlockSums dot(BlockSums sums, Nibbles w, int32_t four) {
  return {_mm512_dpbusd_epi32(sums.v, w.v, _mm512_set1_epi32(four))};
}
inline Sums whole(BlockSums sums, int32_t) { return {sums.v}; }
// Between two products of a pass. GCC begins many of them at once, and moves every sum from register to register, to
// memory too: told to have one sum in its register before the next product, it leaves them where they are.
template <typename AnySums, typename Element>
inline void before_next(AnySums& sums, const Element*&) {
  asm("" : "+v"(sums.v));
}
// Rows that share a load of a tile; those above which it is read by halves; queries that share a load of a key.
constexpr int kMostRows = 8, kRowsOfWholeTiles = 8, kQueryRows = 4;
