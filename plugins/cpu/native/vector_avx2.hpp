// AVX2: sixteen lanes in two registers, with or without AVX-VNNI. What each function means is said in vector_avx512.hpp.

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
inline Lanes lanes_of_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Lanes load(const int8_t* p) { return lanes_of_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
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

// Four inputs of sixteen columns, from 0 to 15, of the 32 columns that 64 bytes hold.
struct Nibbles {
  __m256i a, b;
};
inline Nibbles low_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask),
          _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)), mask)};
}
inline Nibbles high_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)), 4), mask)};
}
// Sums of products over a block.
struct BlockSums {
  __m256i a, b;
};

#if defined(QUASAR_AVXVNNI)

inline BlockSums block_sums(int32_t offset) { return {_mm256_set1_epi32(offset), _mm256_set1_epi32(offset)}; }
inline BlockSums dot(BlockSums sums, Nibbles w, int32_t four) {
  const __m256i q = _mm256_set1_epi32(four);
  return {_mm256_dpbusd_avx_epi32(sums.a, w.a, q), _mm256_dpbusd_avx_epi32(sums.b, w.b, q)};
}
inline Sums whole(BlockSums sums, int32_t) { return {sums.a, sums.b}; }

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
// As for AVX-512.
template <typename AnySums, typename Element>
inline void before_next(AnySums& sums, const Element*&) {
  asm("" : "+x"(sums.a), "+x"(sums.b));
}
// Six rows by half a tile: twelve sums, two of weights and one of inputs are the registers there are, less one.
constexpr int kMostRows = 6, kRowsOfWholeTiles = 2, kQueryRows = 1;

#else

// In 16 bits, every other input of four: eight steps of two products are at most 8 * 2 * 15 * 128 = 30,720.
inline BlockSums block_sums(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline BlockSums dot(BlockSums sums, Nibbles w, int32_t four) {
  const __m256i q = _mm256_set1_epi32(four);
  return {_mm256_add_epi16(sums.a, _mm256_maddubs_epi16(w.a, q)),
          _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(w.b, q))};
}
inline Sums whole(BlockSums sums, int32_t offset) {
  const __m256i ones = _mm256_set1_epi16(1), begin = _mm256_set1_epi32(offset);
  return {_mm256_add_epi32(begin, _mm256_madd_epi16(sums.a, ones)),
          _mm256_add_epi32(begin, _mm256_madd_epi16(sums.b, ones))};
}

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
// Compilers begin many products at once and run out of registers: the next one begins when a sum is there.
template <typename AnySums, typename Element>
inline void before_next(AnySums& sums, const Element*& next) {
  asm("" : "+x"(sums.a), "+x"(sums.b), "+r"(next));
}
constexpr int kMostRows = 4, kRowsOfWholeTiles = 2, kQueryRows = 1;

#endif
