/* Resampling: any rates, any samples, any framing: the promised number comes out, and what comes out in one piece, with
 * SIMD and without. */
#include "../resample.h"
#include "fuzz.h"

/* resample.c once more, compiled with STREAMSINK_PORTABLE and these names. */
resample_filter *portable_design(uint32_t rate_in, uint32_t rate_out);
void portable_push(resampler *r, const int16_t *in, size_t samples, int16_t *out);

static uint32_t rate(const uint8_t *data)
{
    static const uint32_t COMMON[] = {8000, 11025, 16000, 24000, 44100, 48000, 96000, 192000};
    uint32_t number = (uint32_t)data[0] << 16 | (uint32_t)data[1] << 8 | data[2];
    return data[0] & 1 ? COMMON[data[1] % 8] : 8000 + number % 184001;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 6)
        return 0;
    uint32_t rate_in = rate(data), rate_out = rate(data + 3);
    resample_filter *filter = resample_design(rate_in, rate_out);
    PROMISE(filter);
    const uint8_t *audio = data + 6;
    size_t samples = (size - 6) / 2, total = (size_t)((uint64_t)samples * rate_out / rate_in), made = 0;
    int16_t *in = block_of(audio, 2 * samples), *whole = block(2 * total);
    resampler *state = block(resampler_size(filter));
    resampler_init(state, filter);
    PROMISE(resampler_due(state, samples) == total);
    resampler_push(state, in, samples, whole);

    resample_filter *plain_filter = portable_design(rate_in, rate_out);
    PROMISE(plain_filter);
    int16_t *plain = block(2 * total);
    resampler_init(state, plain_filter);
    portable_push(state, in, samples, plain);
    PROMISE(memcmp(whole, plain, 2 * total) == 0);
    free(plain);
    free(plain_filter);

    resampler_init(state, filter);
    for (size_t at = 0; at < samples;) {
        size_t length = 1 + stretch(audio, at, samples - at - 1), due = resampler_due(state, length);
        int16_t *part = block_of(in + at, 2 * length), *out = block(2 * due);
        resampler_push(state, part, length, out);
        PROMISE(memcmp(out, whole + made, 2 * due) == 0);
        made += due;
        free(part);
        free(out);
        at += length;
    }
    PROMISE(made == total);
    size_t due = resampler_due(state, filter->tail);
    int16_t *tail = block(2 * due);
    resampler_push(state, NULL, filter->tail, tail);
    free(tail);
    free(state);
    free(in);
    free(whole);
    free(filter);
    return 0;
}
