#include "resample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "prototype.h"

#define CHUNK 512            /* input samples a pass */
#define MOST_EXACT 32768     /* coefficients in a table with one row for every phase; beyond, rows are interpolated */
#define MOST_HISTORY 1088    /* 192 kHz to 8 kHz: 40 periods of 24 samples, and the 24 that one output steps over */
#define PHASES_A_PERIOD 256  /* rows in one period of the lower rate when interpolating: an error of -94 dB at most */

/* The prototype's value at t periods of the lower rate from its centre: a cubic through the four nearest of its points. */
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
    uint32_t taps = ((uint32_t)ceil(2 * delay) + 1 + 3) & ~3u;
    uint32_t phases = up;
    if ((uint64_t)up * taps > MOST_EXACT)
        phases = (uint32_t)ceil(PHASES_A_PERIOD / period);

    resample_filter *filter = malloc(sizeof *filter + (size_t)(phases + 1) * taps * sizeof(float));
    if (!filter)
        return NULL;
    *filter = (resample_filter){
        .rate_in = rate_in, .rate_out = rate_out, .up = up, .down = down, .taps = taps,
        .history = taps + (down + up - 1) / up, .tail = (uint32_t)ceil(delay + 2.0 * down / up) - 1, .phases = phases,
    };
    for (uint32_t phase = 0; phase <= phases; phase++) {
        float *row = filter->table + (size_t)phase * taps;
        double sum = 0;
        for (uint32_t i = 0; i < taps; i++)
            sum += prototype(((double)phase / phases + (taps - 1 - i) - delay) / period);
        for (uint32_t i = 0; i < taps; i++) /* every phase passes a constant exactly, so none hums */
            row[i] = (float)(prototype(((double)phase / phases + (taps - 1 - i) - delay) / period) / sum);
    }
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

static inline float dot(const float *x, const float *c, size_t taps)
{
    float sum[4] = {0};
    for (size_t i = 0; i < taps; i += 4)
        for (int k = 0; k < 4; k++)
            sum[k] += x[i + k] * c[i + k];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static inline int16_t to_int16(float x)
{
    x = x < -32768.0f ? -32768.0f : x;
    return (int16_t)lrintf(x > 32767.0f ? 32767.0f : x);
}

/* One pass: x holds the history and then n fresh samples. */
static int16_t *convolve(resampler *r, const float *x, size_t n, int16_t *out)
{
    const resample_filter *f = r->filter;
    size_t due = resampler_due(r, n);
    uint32_t whole = f->down / f->up, part = f->down % f->up;
    /* The next output lies `position` before the first fresh sample: `back` whole samples, less a phase. */
    uint32_t back = (r->position + f->up - 1) / f->up;
    uint32_t phase = back * f->up - r->position;
    const float *window = x + f->history - back - (f->taps - 1);
    for (size_t k = 0; k < due; k++) {
        if (f->phases == f->up) {
            *out++ = to_int16(dot(window, f->table + (size_t)phase * f->taps, f->taps));
        } else {
            uint64_t row = (uint64_t)phase * f->phases;
            float weight = (float)(row % f->up) / (float)f->up;
            const float *c = f->table + (size_t)(row / f->up) * f->taps;
            float a = dot(window, c, f->taps), b = dot(window, c + f->taps, f->taps);
            *out++ = to_int16(a + weight * (b - a));
        }
        window += whole;
        phase += part;
        if (phase >= f->up) {
            phase -= f->up;
            window++;
        }
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
        for (size_t i = 0; i < n; i++)
            x[history + i] = in ? in[i] : 0;
        out = convolve(r, x, n, out);
        memcpy(r->history, x + n, history * sizeof *x);
        if (in)
            in += n;
        samples -= n;
    }
}
