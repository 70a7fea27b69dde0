/* A streaming polyphase FIR resampler between any two integer rates from 8 to 192 kHz.
 *
 * One prototype low-pass filter, a function of time in periods of the lower rate, serves all pairs of rates: a pair's
 * table of phases is that function read at the instants the pair needs, and is shared by the pair's resamplers. */
#ifndef STREAMSINK_RESAMPLE_H
#define STREAMSINK_RESAMPLE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t rate_in, rate_out; /* Hz */
    uint32_t up, down;          /* the rates without their common divisor */
    uint32_t whole, part;       /* down / up: input samples from one output to the next, and the rest in 1/up */
    uint32_t taps;              /* input samples that make one output sample, a multiple of 8 */
    uint32_t history;           /* input samples kept between pushes */
    uint32_t tail;              /* zeros that bring the output up to the last input sample's delayed place */
    uint32_t phases;            /* rows of the table less the last; `up` of them, or fewer to interpolate between */
    void (*dot4)(const float *const *x, const float *const *c, size_t taps, float *out); /* this machine's fastest */
    float table[];              /* (phases + 1) rows of `taps` coefficients, for the oldest input sample first */
} resample_filter;

typedef struct {
    const resample_filter *filter;
    uint32_t position; /* the next output lies this many 1/up input samples before the next input */
    float history[];   /* the newest `filter->history` input samples, oldest first */
} resampler;

/* NULL when memory is short. The caller frees it. */
resample_filter *resample_design(uint32_t rate_in, uint32_t rate_out);

/* Seconds by which the output lags the input. */
double resample_delay(const resample_filter *filter);

static inline size_t resampler_size(const resample_filter *filter)
{
    return sizeof(resampler) + filter->history * sizeof(float);
}

void resampler_init(resampler *r, const resample_filter *filter);

/* How many samples the next push of `samples` gives. */
size_t resampler_due(const resampler *r, size_t samples);

/* Takes `samples` in (zeros where in is NULL) and writes resampler_due() out. */
void resampler_push(resampler *r, const int16_t *in, size_t samples, int16_t *out);

#endif
