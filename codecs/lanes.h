/* Eight int16 lanes: SSE2 where the compiler has it (every x86-64), the same arithmetic in plain C elsewhere.
 *
 * Define STREAMSINK_PORTABLE to get the plain form on x86-64 too; the sanitizer run tests both. */
#ifndef STREAMSINK_LANES_H
#define STREAMSINK_LANES_H

#include <stdint.h>
#include <string.h>

static inline int16_t saturate16(int32_t x)
{
    x = x < -32768 ? -32768 : x;
    return (int16_t)(x > 32767 ? 32767 : x);
}

#if defined(__SSE2__) && !defined(STREAMSINK_PORTABLE)
#define STREAMSINK_SSE2 1
#include <emmintrin.h>

typedef __m128i lanes;

static inline lanes lanes_load(const int16_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }
static inline void lanes_store(int16_t *p, lanes v) { _mm_storeu_si128((__m128i *)(void *)p, v); }
static inline lanes lanes_all(int16_t x) { return _mm_set1_epi16(x); }

/* Saturating sum of each lane. */
static inline lanes lanes_add(lanes a, lanes b) { return _mm_adds_epi16(a, b); }

/* (a * b) >> 15 in each lane; a * b must not be 2^30. */
static inline lanes lanes_mult(lanes a, lanes b)
{
    lanes high = _mm_mulhi_epi16(a, b);
    return _mm_add_epi16(_mm_add_epi16(high, high), _mm_srli_epi16(_mm_mullo_epi16(a, b), 15));
}

/* (a * 255) >> 8 in each lane. */
static inline lanes lanes_leak(lanes a) { return _mm_add_epi16(a, _mm_mulhi_epi16(a, _mm_set1_epi16(-256))); }

/* x with the sign of each lane flipped where a and b differ in sign. */
static inline lanes lanes_copysign(lanes x, lanes a, lanes b)
{
    lanes differ = _mm_srai_epi16(_mm_xor_si128(a, b), 15);
    return _mm_sub_epi16(_mm_xor_si128(x, differ), differ);
}

/* Lane i moves to lane i + 1, x enters at lane 0. */
static inline lanes lanes_push(lanes v, int16_t x) { return _mm_insert_epi16(_mm_slli_si128(v, 2), x, 0); }

/* Lanes 5, 4, 3, 2, 1, 0 summed in that order, saturating after each addition. */
static inline int16_t lanes_sum6(lanes v)
{
    lanes sum = _mm_adds_epi16(_mm_srli_si128(v, 10), _mm_srli_si128(v, 8));
    sum = _mm_adds_epi16(sum, _mm_srli_si128(v, 6));
    sum = _mm_adds_epi16(sum, _mm_srli_si128(v, 4));
    sum = _mm_adds_epi16(sum, _mm_srli_si128(v, 2));
    return (int16_t)_mm_cvtsi128_si32(_mm_adds_epi16(sum, v));
}

#else

typedef struct {
    int16_t lane[8];
} lanes;

#define LANES_EACH(expression)      \
    lanes out;                      \
    for (int i = 0; i < 8; i++)     \
        out.lane[i] = (int16_t)(expression); \
    return out

static inline lanes lanes_load(const int16_t *p)
{
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void lanes_store(int16_t *p, lanes v) { memcpy(p, &v, sizeof v); }
static inline lanes lanes_all(int16_t x) { LANES_EACH(x); }
static inline lanes lanes_add(lanes a, lanes b) { LANES_EACH(saturate16(a.lane[i] + b.lane[i])); }
static inline lanes lanes_mult(lanes a, lanes b) { LANES_EACH(a.lane[i] * b.lane[i] >> 15); }
static inline lanes lanes_leak(lanes a) { LANES_EACH(a.lane[i] * 255 >> 8); }
static inline lanes lanes_copysign(lanes x, lanes a, lanes b)
{
    LANES_EACH((a.lane[i] ^ b.lane[i]) < 0 ? -x.lane[i] : x.lane[i]);
}
static inline lanes lanes_push(lanes v, int16_t x) { LANES_EACH(i == 0 ? x : v.lane[i - 1]); }
static inline int16_t lanes_sum6(lanes v)
{
    int16_t sum = v.lane[5];
    for (int i = 4; i >= 0; i--)
        sum = saturate16(sum + v.lane[i]);
    return sum;
}

#endif
#endif
