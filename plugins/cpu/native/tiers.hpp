// A cache in two tiers of 4 bits (QuantSpec, arXiv 2502.10424): in every head the upper halves of all its values, then
// the lower ones, eight bytes for sixteen values. Both together are integers of 8 bits; the upper ones alone stand for
// them to within 8 steps, in half the memory.
// Included once per level, after vector.hpp.

struct BothTiers;
struct UpperTier;

// Values of a head from some place on, which is a multiple of sixteen: what a pointer is to values of one type.
template <typename Tiers>
struct TierRows {
  uint8_t* upper;
  size_t apart;  // bytes from a value's upper half to its lower one
  TierRows operator+(size_t values) const { return {upper + values / 2, apart}; }
};

#if defined(QUASAR_AVX512) || defined(QUASAR_AVX2)

inline __m128i sixteen_nibbles(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi64(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
}
inline Lanes load(TierRows<BothTiers> rows) {
  const __m128i upper = _mm_slli_epi16(sixteen_nibbles(rows.upper), 4);
  return lanes_of_bytes(_mm_or_si128(upper, sixteen_nibbles(rows.upper + rows.apart)));
}
inline Lanes load(TierRows<UpperTier> rows) {
  return lanes_of_bytes(_mm_or_si128(_mm_slli_epi16(sixteen_nibbles(rows.upper), 4), _mm_set1_epi8(8)));
}

#else

inline int8_t of_halves(int upper, int lower) { return static_cast<int8_t>(static_cast<uint8_t>(upper << 4 | lower)); }
inline Lanes load(TierRows<BothTiers> rows) {
  int8_t values[16];
  const uint8_t* lower = rows.upper + rows.apart;
  for (int i = 0; i < 8; ++i) {
    values[i] = of_halves(rows.upper[i] & 15, lower[i] & 15);
    values[i + 8] = of_halves(rows.upper[i] >> 4, lower[i] >> 4);
  }
  return load(values);
}
inline Lanes load(TierRows<UpperTier> rows) {
  int8_t values[16];
  for (int i = 0; i < 8; ++i) {
    values[i] = of_halves(rows.upper[i] & 15, 8);
    values[i + 8] = of_halves(rows.upper[i] >> 4, 8);
  }
  return load(values);
}

#endif

// New values go to both tiers, whatever is read of them.
template <typename Tiers>
inline void store(TierRows<Tiers> rows, const Lanes& x) {
  int8_t values[16];
  store(values, x);
  uint8_t* lower = rows.upper + rows.apart;
  for (int i = 0; i < 8; ++i) {
    const unsigned first = static_cast<uint8_t>(values[i]), second = static_cast<uint8_t>(values[i + 8]);
    rows.upper[i] = static_cast<uint8_t>(first >> 4 | (second & 0xf0));
    lower[i] = static_cast<uint8_t>((first & 15) | second << 4);
  }
}

// Heads are multiples of sixteen values.
template <typename Tiers>
inline Lanes load_first(TierRows<Tiers> rows, int) {
  return load(rows);
}
template <typename Tiers>
inline void store_first(TierRows<Tiers> rows, const Lanes& x, int) {
  store(rows, x);
}

// How values of a cache are read and written, and where those of a head begin that has so many of them.
template <typename Cache>
struct RowsOf {
  using Read = const Cache*;
  using Written = Cache*;
  static Written of_head(void* cache, int head, size_t values) { return static_cast<Cache*>(cache) + head * values; }
};
template <typename Tiers>
struct RowsInTiers {
  using Read = TierRows<Tiers>;
  using Written = TierRows<Tiers>;
  static Written of_head(void* cache, int head, size_t values) {
    return {static_cast<uint8_t*>(cache) + head * values, values / 2};
  }
};
template <>
struct RowsOf<BothTiers> : RowsInTiers<BothTiers> {};
template <>
struct RowsOf<UpperTier> : RowsInTiers<UpperTier> {};

// Memory to be fetched: where it begins, its bytes, and how far away as many more are (0: none).
struct Stretch {
  const char* begin;
  int bytes;
  size_t apart;
};
template <typename Element>
inline Stretch stretch(const Element* rows, int values) {
  return {reinterpret_cast<const char*>(rows), values * static_cast<int>(sizeof(Element)), 0};
}
inline Stretch stretch(TierRows<BothTiers> rows, int values) {
  return {reinterpret_cast<const char*>(rows.upper), values / 2, rows.apart};
}
inline Stretch stretch(TierRows<UpperTier> rows, int values) {
  return {reinterpret_cast<const char*>(rows.upper), values / 2, 0};
}
