/* Eight int16 lanes: SSE2 where the compiler has it (every x86-64), the same arithmetic in plain C elsewhere.
 *
 * Define STREAMSINK_PORTABLE to get the plain form on x86-64 too; the sanitizer run tests both. */
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

typedef struct {
    int16_t lane[8];
} lanes;

#define LANES_EACH(expression)               \
    lanes out;                               \
    for (int i = 0; i < 8; i++)              \
        out.lane[i] = (int16_t)(expression); \
    return out

static inline int16_t lanes_saturated(int32_t x) { return (int16_t)(x < -32768 ? -32768 : x > 32767 ? 32767 : x); }
static inline lanes lanes_load(const int16_t *p)
{
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void lanes_store(int16_t *p, lanes v) { memcpy(p, &v, sizeof v); }
static inline lanes lanes_all(int16_t x) { LANES_EACH(x); }
static inline lanes lanes_xor(lanes a, lanes b) { LANES_EACH(a.lane[i] ^ b.lane[i]); }
static inline lanes lanes_min(lanes a, lanes b) { LANES_EACH(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline lanes lanes_max(lanes a, lanes b) { LANES_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline lanes lanes_add(lanes a, lanes b) { LANES_EACH(lanes_saturated(a.lane[i] + b.lane[i])); }
static inline lanes lanes_sub(lanes a, lanes b) { LANES_EACH(lanes_saturated(a.lane[i] - b.lane[i])); }
static inline lanes lanes_sign(lanes x) { LANES_EACH(x.lane[i] >> 15); }
static inline lanes lanes_where(lanes x, lanes y) { LANES_EACH(y.lane[i] ? x.lane[i] : 0); }
static inline lanes lanes_shift7(lanes x) { LANES_EACH(x.lane[i] >> 7); }
static inline lanes lanes_mult(lanes a, lanes b) { LANES_EACH(a.lane[i] * b.lane[i] >> 15); }
static inline lanes lanes_leak(lanes x, lanes share) { LANES_EACH(x.lane[i] + (x.lane[i] * -share.lane[i] >> 16)); }
static inline lanes lanes_pair(int16_t first, int16_t second) { LANES_EACH(i == 0 ? first : i == 1 ? second : 0); }
static inline int16_t lanes_first(lanes v) { return v.lane[0]; }
static inline int16_t lanes_second(lanes v) { return v.lane[1]; }
static inline lanes lanes_repeat(lanes v) { LANES_EACH(v.lane[i & 1]); }
static inline lanes lanes_push(lanes v, lanes x) { LANES_EACH(i < 2 ? x.lane[i] : v.lane[i - 2]); }
static inline lanes lanes_drop(lanes v, int pairs) { LANES_EACH(i + 2 * pairs < 8 ? v.lane[i + 2 * pairs] : 0); }

#endif
#endif
