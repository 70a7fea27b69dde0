#include "resample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "prototype.h"

#define CHUNK 512            /* input samples a pass */
#define MOST_EXACT 32768     /* coefficients in a table with one row for every phase; beyond, rows are interpolated */
#define MOST_HISTORY 1088    /* 192 kHz to 8 kHz: 43 periods of 24 samples, and the 24 that one output steps over */
#define PHASES_A_PERIOD 256  /* rows in one period of the lower rate when interpolating: an error of -94 dB at most */

/* Four windows of samples times four rows of coefficients: out[k] is the sum over taps of x[k][i] * c[k][i]. Every form
 * of it adds in the same order, so that all machines give the same samples: eight running sums, then lane i and i + 4,
 * then i and i + 2, then the last two. */
typedef void dot4_function(const float *const *x, const float *const *c, size_t taps, float *out);

#if defined(__SSE2__) && !defined(STREAMSINK_PORTABLE)
#include <immintrin.h>

static inline void fold4(const __m128 *sum, float *out)
{
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(sum[0], sum[1]), _mm_unpackhi_ps(sum[0], sum[1]));
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(sum[2], sum[3]), _mm_unpackhi_ps(sum[2], sum[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

/* `shared` where all rows are the first, as when the rate falls by a whole number: its loads are then done once. */
__attribute__((always_inline)) static inline void sse2(const float *const *x, const float *const *c,
                                                       size_t taps, float *out, int shared)
{
    __m128 low[4], high[4];
    for (int k = 0; k < 4; k++)
        low[k] = high[k] = _mm_setzero_ps();
    for (size_t i = 0; i < taps; i += 8)
        for (int k = 0; k < 4; k++) {
            const float *row = c[shared ? 0 : k] + i;
            low[k] = _mm_add_ps(low[k], _mm_mul_ps(_mm_loadu_ps(x[k] + i), _mm_loadu_ps(row)));
            high[k] = _mm_add_ps(high[k], _mm_mul_ps(_mm_loadu_ps(x[k] + i + 4), _mm_loadu_ps(row + 4)));
        }
    for (int k = 0; k < 4; k++)
        low[k] = _mm_add_ps(low[k], high[k]);
    fold4(low, out);
}

__attribute__((always_inline, target("avx"))) static inline void avx(const float *const *x, const float *const *c,
                                                                     size_t taps, float *out, int shared)
{
    __m256 sum[4];
    __m128 halves[4];
    for (int k = 0; k < 4; k++)
        sum[k] = _mm256_setzero_ps();
    for (size_t i = 0; i < taps; i += 8)
        for (int k = 0; k < 4; k++) {
            const float *row = c[shared ? 0 : k] + i;
            sum[k] = _mm256_add_ps(sum[k], _mm256_mul_ps(_mm256_loadu_ps(x[k] + i), _mm256_loadu_ps(row)));
        }
    for (int k = 0; k < 4; k++)
        halves[k] = _mm_add_ps(_mm256_castps256_ps128(sum[k]), _mm256_extractf128_ps(sum[k], 1));
    fold4(halves, out);
}

static void dot4_sse2(const float *const *x, const float *const *c, size_t taps, float *out)
{
    if (c[0] == c[1] && c[0] == c[2] && c[0] == c[3])
        sse2(x, c, taps, out, 1);
    else
        sse2(x, c, taps, out, 0);
}

__attribute__((target("avx"))) static void dot4_avx(const float *const *x, const float *const *c, size_t taps,
                                                    float *out)
{
    if (c[0] == c[1] && c[0] == c[2] && c[0] == c[3])
        avx(x, c, taps, out, 1);
    else
        avx(x, c, taps, out, 0);
}

static dot4_function *fastest_dot4(void) { return __builtin_cpu_supports("avx") ? dot4_avx : dot4_sse2; }

static inline void to_int16(const float *x, int16_t *out)
{
    __m128i rounded = _mm_cvtps_epi32(_mm_loadu_ps(x));
    _mm_storel_epi64((__m128i *)(void *)out, _mm_packs_epi32(rounded, rounded));
}

#else

static void dot4_portable(const float *const *x, const float *const *c, size_t taps, float *out)
{
    for (int k = 0; k < 4; k++) {
        float sum[8] = {0};
        for (size_t i = 0; i < taps; i += 8)
            for (int lane = 0; lane < 8; lane++)
                sum[lane] += x[k][i + lane] * c[k][i + lane];
        out[k] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
}

static dot4_function *fastest_dot4(void) { return dot4_portable; }

static inline void to_int16(const float *x, int16_t *out)
{
    for (int k = 0; k < 4; k++) {
        long rounded = lrintf(x[k]);
        out[k] = (int16_t)(rounded < -32768 ? -32768 : rounded > 32767 ? 32767 : rounded);
    }
}

#endif

/* The prototype's value t periods of the lower rate from its centre: a cubic through the four nearest of its points. */
static double prototype(double t)
{
    double x = fabs(t) * PROTOTYPE_OVERSAMPLING;
    size_t i = (size_t)x;
    if (i + 1 >= PROTOTYPE_POINTS)
        return 0;
    double f = x - (double)i;
    double a = PROTOTYPE[i ? i - 1 : 1], b = PROTOTYPE[i], c = PROTOTYPE[i + 1];
    double d = i + 2 < PROTOTYPE_POINTS ? PROTOTYPE[i + 2] : 0;
    return b + f * ((c - a / 3 - b / 2 - d / 6) + f * ((a + c) / 2 - b + f * ((d - a) / 6 + (b - c) / 2)));
}

static uint32_t common_divisor(uint32_t a, uint32_t b)
{
    while (b) {
        uint32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static double half_width(uint32_t rate_in, uint32_t rate_out)
{
    double lower = rate_in < rate_out ? rate_in : rate_out;
    return (double)(PROTOTYPE_POINTS - 1) / PROTOTYPE_OVERSAMPLING * rate_in / lower;
}

double resample_delay(const resample_filter *filter)
{
    return half_width(filter->rate_in, filter->rate_out) / filter->rate_in;
}

resample_filter *resample_design(uint32_t rate_in, uint32_t rate_out)
{
    uint32_t divisor = common_divisor(rate_in, rate_out);
    uint32_t up = rate_out / divisor, down = rate_in / divisor;
    double delay = half_width(rate_in, rate_out); /* in input samples */
    double period = rate_in > rate_out ? (double)rate_in / rate_out : 1;
    uint32_t taps = ((uint32_t)ceil(2 * delay) + 1 + 7) & ~7u;
    uint32_t phases = up;
    if ((uint64_t)up * taps > MOST_EXACT)
        phases = (uint32_t)ceil(PHASES_A_PERIOD / period);

    resample_filter *filter = malloc(sizeof *filter + (size_t)(phases + 1) * taps * sizeof(float));
    if (!filter)
        return NULL;
    *filter = (resample_filter){
        .rate_in = rate_in,
        .rate_out = rate_out,
        .up = up,
        .down = down,
        .whole = down / up,
        .part = down % up,
        .taps = taps,
        .history = taps + (down + up - 1) / up,
        .tail = (uint32_t)ceil(delay + 2.0 * down / up) - 1,
        .phases = phases,
        .dot4 = fastest_dot4(),
    };
    double sum = 0;
    for (uint32_t phase = 0; phase <= phases; phase++)
        for (uint32_t i = 0; i < taps; i++) {
            double value = prototype(((double)phase / phases + (taps - 1 - i) - delay) / period);
            filter->table[(size_t)phase * taps + i] = (float)value;
            sum += phase < phases ? value : 0;
        }
    float scale = (float)(phases / sum); /* a constant comes out as itself */
    for (size_t i = 0; i < (size_t)(phases + 1) * taps; i++)
        filter->table[i] *= scale;
    return filter;
}

void resampler_init(resampler *r, const resample_filter *filter)
{
    r->filter = filter;
    r->position = 0;
    memset(r->history, 0, filter->history * sizeof(float));
}

size_t resampler_due(const resampler *r, size_t samples)
{
    return (size_t)((r->position + (uint64_t)samples * r->filter->up) / r->filter->down);
}

/* Where the next output lies in a pass: its newest input sample, and the phase beyond it in 1/up of a sample. */
typedef struct {
    const float *newest;
    uint32_t phase;
} place;

static inline void advance(const resample_filter *f, place *at)
{
    at->newest += f->whole;
    at->phase += f->part;
    if (at->phase >= f->up) {
        at->phase -= f->up;
        at->newest++;
    }
}

/* Up to four outputs, each of one row. */
static void exact4(const resample_filter *f, place *at, size_t n, int16_t *four)
{
    const float *x[4], *c[4];
    float sums[4];
    for (size_t k = 0; k < 4; k++) {
        x[k] = at->newest - (f->taps - 1);
        c[k] = f->table + (size_t)at->phase * f->taps;
        if (k + 1 < n)
            advance(f, at);
    }
    advance(f, at);
    f->dot4(x, c, f->taps, sums);
    to_int16(sums, four);
}

/* Up to four outputs, each between two rows. */
static void interpolated4(const resample_filter *f, place *at, size_t n, int16_t *four)
{
    float sums[4] = {0};
    for (size_t k = 0; k < n; k += 2) {
        const float *x[4], *c[4];
        float weight[2], ends[4];
        for (size_t j = 0; j < 2; j++) {
            uint64_t row = (uint64_t)at->phase * f->phases;
            x[2 * j] = x[2 * j + 1] = at->newest - (f->taps - 1);
            c[2 * j] = f->table + (size_t)(row / f->up) * f->taps;
            c[2 * j + 1] = c[2 * j] + f->taps;
            weight[j] = (float)(row % f->up) / (float)f->up;
            if (j == 1 || k + 1 < n)
                advance(f, at);
        }
        f->dot4(x, c, f->taps, ends);
        for (size_t j = 0; j < 2; j++)
            sums[k + j] = ends[2 * j] + weight[j] * (ends[2 * j + 1] - ends[2 * j]);
    }
    to_int16(sums, four);
}

/* One pass: x holds the history and then n fresh samples. */
static int16_t *convolve(resampler *r, const float *x, size_t n, int16_t *out)
{
    const resample_filter *f = r->filter;
    size_t due = resampler_due(r, n);
    /* The next output lies `back` whole samples before the first fresh one, less a phase. */
    uint32_t back = (r->position + f->up - 1) / f->up;
    place at = {.newest = x + f->history - back, .phase = back * f->up - r->position};
    for (size_t left = due; left;) {
        int16_t four[4];
        size_t some = left < 4 ? left : 4;
        if (f->phases == f->up)
            exact4(f, &at, some, four);
        else
            interpolated4(f, &at, some, four);
        memcpy(out, four, some * sizeof *out);
        out += some;
        left -= some;
    }
    r->position = (uint32_t)(r->position + (uint64_t)n * f->up - (uint64_t)due * f->down);
    return out;
}

void resampler_push(resampler *r, const int16_t *in, size_t samples, int16_t *out)
{
    float x[MOST_HISTORY + CHUNK];
    size_t history = r->filter->history;
    while (samples) {
        size_t n = samples < CHUNK ? samples : CHUNK;
        memcpy(x, r->history, history * sizeof *x);
        if (in)
            for (size_t i = 0; i < n; i++)
                x[history + i] = in[i];
        else
            memset(x + history, 0, n * sizeof *x);
        out = convolve(r, x, n, out);
        memcpy(r->history, x + n, history * sizeof *x);
        if (in)
            in += n;
        samples -= n;
    }
}
