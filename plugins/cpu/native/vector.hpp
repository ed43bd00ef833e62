// Sixteen float lanes and sixteen sums of four 8-bit products, on every instruction level with the same bits: each
// operation rounds as IEEE 754 says, sums of lanes are taken in one fixed order, and nothing is contracted
// (-ffp-contract=off) but the fused multiply-adds that are written as such.
//
// Included once per level, inside its namespace: functions compiled for one level must not be shared with another.

// Arrays of lanes stay in registers only if the loops over them are gone early.
#define QUASAR_UNROLL _Pragma("GCC unroll 16")

#if defined(QUASAR_AVX512)
#include "vector_avx512.hpp"
#elif defined(QUASAR_AVX2)
#include "vector_avx2.hpp"
#elif defined(QUASAR_NEON)
#include "vector_neon.hpp"
#else
#include "vector_portable.hpp"
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

// Integers of 8 bits, rounded half to even and within ±127; a NaN becomes -127.
inline void store(int8_t* p, const Lanes& x) { store_bytes(p, smaller(larger(x, splat(-127.0f)), splat(127.0f))); }

// The first `count` values, zeros after them.
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
