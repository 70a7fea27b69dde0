/* Eight int16 lanes: SSE2 where the compiler has it (every x86-64), elsewhere the same arithmetic in the vector types of
 * gcc and clang, which any machine's SIMD can serve.
 *
 * Define STREAMSINK_PORTABLE to get those on x86-64 too; the sanitizer run tests both. */
#ifndef STREAMSINK_LANES_H
#define STREAMSINK_LANES_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) && !defined(STREAMSINK_PORTABLE)
#define STREAMSINK_SSE2
#include <emmintrin.h>

typedef __m128i lanes;

static inline lanes lanes_load(const int16_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }
static inline void lanes_store(int16_t *p, lanes v) { _mm_storeu_si128((__m128i *)(void *)p, v); }
static inline lanes lanes_all(int16_t x) { return _mm_set1_epi16(x); }
static inline lanes lanes_xor(lanes a, lanes b) { return _mm_xor_si128(a, b); }
static inline lanes lanes_min(lanes a, lanes b) { return _mm_min_epi16(a, b); }
static inline lanes lanes_max(lanes a, lanes b) { return _mm_max_epi16(a, b); }
static inline lanes lanes_add(lanes a, lanes b) { return _mm_adds_epi16(a, b); } /* saturates, as all of G.722 does */
static inline lanes lanes_sub(lanes a, lanes b) { return _mm_subs_epi16(a, b); }

/* -1 where x is negative, else 0. */
static inline lanes lanes_sign(lanes x) { return _mm_srai_epi16(x, 15); }

/* x, or 0 where y is 0. */
static inline lanes lanes_where(lanes x, lanes y)
{
    return _mm_andnot_si128(_mm_cmpeq_epi16(y, _mm_setzero_si128()), x);
}

/* x >> 7. */
static inline lanes lanes_shift7(lanes x) { return _mm_srai_epi16(x, 7); }

/* a * b >> 15; the product must not be 2^30. */
static inline lanes lanes_mult(lanes a, lanes b)
{
    lanes high = _mm_mulhi_epi16(a, b);
    return _mm_add_epi16(_mm_add_epi16(high, high), _mm_srli_epi16(_mm_mullo_epi16(a, b), 15));
}

/* x + (x * -share >> 16): x less that share of 65536. */
static inline lanes lanes_leak(lanes x, lanes share)
{
    return _mm_add_epi16(x, _mm_mulhi_epi16(x, _mm_sub_epi16(_mm_setzero_si128(), share)));
}

/* Lanes come and go in pairs. The two of x in front, those of v two further on; what falls out, or zeros. */
static inline lanes lanes_pair(int16_t first, int16_t second)
{
    return _mm_cvtsi32_si128((int)((uint32_t)(uint16_t)second << 16 | (uint16_t)first));
}
static inline int16_t lanes_first(lanes v) { return (int16_t)_mm_cvtsi128_si32(v); }
static inline int16_t lanes_second(lanes v) { return (int16_t)(_mm_cvtsi128_si32(v) >> 16); }
static inline lanes lanes_repeat(lanes v) { return _mm_shuffle_epi32(v, 0); } /* the first pair in every pair */
static inline lanes lanes_push(lanes v, lanes x)
{
    return _mm_castps_si128(_mm_move_ss(_mm_castsi128_ps(_mm_slli_si128(v, 4)), _mm_castsi128_ps(x)));
}
#define lanes_drop(v, pairs) _mm_srli_si128(v, 4 * (pairs))

#else

typedef int16_t lanes __attribute__((vector_size(16)));
typedef uint16_t lanes_unsigned __attribute__((vector_size(16)));
typedef int32_t lanes_wide __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define LANES_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LANES_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif
#define LANES_WIDEN(v) __builtin_convertvector(v, lanes_wide)
#define LANES_NARROW(v) __builtin_convertvector(v, lanes)

static inline lanes lanes_load(const int16_t *p)
{
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void lanes_store(int16_t *p, lanes v) { memcpy(p, &v, sizeof v); }
static inline lanes lanes_all(int16_t x) { return (lanes){x, x, x, x, x, x, x, x}; }
static inline lanes lanes_xor(lanes a, lanes b) { return a ^ b; }
static inline lanes lanes_either(lanes mask, lanes a, lanes b) { return b ^ (mask & (a ^ b)); }
static inline lanes lanes_min(lanes a, lanes b) { return lanes_either(a < b, a, b); }
static inline lanes lanes_max(lanes a, lanes b) { return lanes_either(a > b, a, b); }
static inline lanes lanes_add(lanes a, lanes b)
{
    lanes sum = (lanes)((lanes_unsigned)a + (lanes_unsigned)b);
    return lanes_either((~(a ^ b) & (a ^ sum)) >> 15, (a >> 15) ^ 32767, sum);
}
static inline lanes lanes_sub(lanes a, lanes b)
{
    lanes difference = (lanes)((lanes_unsigned)a - (lanes_unsigned)b);
    return lanes_either(((a ^ b) & (a ^ difference)) >> 15, (a >> 15) ^ 32767, difference);
}
static inline lanes lanes_sign(lanes x) { return x >> 15; }
static inline lanes lanes_where(lanes x, lanes y) { return x & (y != 0); }
static inline lanes lanes_shift7(lanes x) { return x >> 7; }
static inline lanes lanes_mult(lanes a, lanes b) { return LANES_NARROW(LANES_WIDEN(a) * LANES_WIDEN(b) >> 15); }
static inline lanes lanes_leak(lanes x, lanes share)
{
    return x - LANES_NARROW((LANES_WIDEN(x) * LANES_WIDEN(share) + 65535) >> 16);
}
static inline lanes lanes_pair(int16_t first, int16_t second) { return (lanes){first, second}; }
static inline int16_t lanes_first(lanes v) { return v[0]; }
static inline int16_t lanes_second(lanes v) { return v[1]; }
static inline lanes lanes_repeat(lanes v) { return LANES_SHUFFLE(v, v, 0, 1, 0, 1, 0, 1, 0, 1); }
static inline lanes lanes_push(lanes v, lanes x) { return LANES_SHUFFLE(x, v, 0, 1, 8, 9, 10, 11, 12, 13); }
#define lanes_drop(v, pairs)                                                                                        \
    LANES_SHUFFLE(v, lanes_all(0), 2 * (pairs), 2 * (pairs) + 1, 2 * (pairs) + 2, 2 * (pairs) + 3, 2 * (pairs) + 4, \
                  2 * (pairs) + 5, 2 * (pairs) + 6, 2 * (pairs) + 7)

#endif
#endif
