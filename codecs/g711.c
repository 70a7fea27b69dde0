#include "g711.h"

/* mu-law is defined on 14 bits and A-law on 13; both are kept at the top of a 16-bit sample. */
#define MULAW_BIAS 33
#define MULAW_CLIP 8158 /* with the bias, the last value of the last segment */

g711_law g711_mulaw, g711_alaw;

/* The segment of a magnitude: how many bits lie above its lowest six. */
static int segment(int magnitude)
{
    int bits = 0;
    while (magnitude >> bits > 63)
        bits++;
    return bits;
}

static int16_t mulaw_to_linear(uint8_t octet)
{
    int code = ~octet & 255;
    int magnitude = (((code & 15) * 2 + MULAW_BIAS) << (code >> 4 & 7)) - MULAW_BIAS;
    return (int16_t)(code & 128 ? -4 * magnitude : 4 * magnitude);
}

static uint8_t linear_to_mulaw(int sample)
{
    int magnitude = sample < 0 ? -sample : sample;
    magnitude = (magnitude > MULAW_CLIP ? MULAW_CLIP : magnitude) + MULAW_BIAS;
    int s = segment(magnitude);
    return (uint8_t) ~((sample < 0 ? 128 : 0) | s << 4 | (magnitude >> (s + 1) & 15));
}

static int16_t alaw_to_linear(uint8_t octet)
{
    int code = octet ^ 0x55, s = code >> 4 & 7;
    int magnitude = (code & 15) * 2 + 1;
    if (s)
        magnitude = (magnitude + 32) << (s - 1);
    return (int16_t)(code & 128 ? 8 * magnitude : -8 * magnitude);
}

static uint8_t linear_to_alaw(int sample)
{
    int magnitude = sample < 0 ? ~sample : sample;
    int s = magnitude < 32 ? 0 : segment(magnitude) + 1;
    return (uint8_t)(((sample < 0 ? 0 : 128) | s << 4 | (magnitude >> (s ? s : 1) & 15)) ^ 0x55);
}

void g711_init(void)
{
    for (int i = 0; i < 256; i++) {
        g711_mulaw.linear[i] = mulaw_to_linear((uint8_t)i);
        g711_alaw.linear[i] = alaw_to_linear((uint8_t)i);
    }
    for (int i = 0; i < 16384; i++) {
        g711_mulaw.compressed[i] = linear_to_mulaw(i - 8192);
        g711_alaw.compressed[i] = linear_to_alaw((i - 8192) >> 1);
    }
}

void g711_decode(const g711_law *law, const uint8_t *in, size_t octets, int16_t *out)
{
    for (size_t i = 0; i < octets; i++)
        out[i] = law->linear[in[i]];
}

void g711_encode(const g711_law *law, const int16_t *in, size_t samples, uint8_t *out)
{
    for (size_t i = 0; i < samples; i++)
        out[i] = law->compressed[(in[i] >> 2) + 8192];
}
