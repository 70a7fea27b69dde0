/* G.722: any octets and any samples, in any framing, give what they give in one piece, with SSE2 and without. */
#include "../g722.h"
#include "fuzz.h"

/* g722.c once more, compiled with STREAMSINK_PORTABLE and these names. */
void portable_init(g722 *codec, int mode);
void portable_decode(g722 *codec, const uint8_t *in, size_t octets, int16_t *out);
size_t portable_encode(g722 *codec, const int16_t *in, size_t samples, uint8_t *out);

static void decode(int mode, const uint8_t *octets, size_t n)
{
    int16_t *whole = block(4 * n), *plain = block(4 * n);
    g722 codec;
    g722_init(&codec, mode);
    g722_decode(&codec, octets, n, whole);
    portable_init(&codec, mode);
    portable_decode(&codec, octets, n, plain);
    PROMISE(memcmp(whole, plain, 4 * n) == 0);
    g722_init(&codec, mode);
    for (size_t at = 0; at < n;) {
        size_t length = 1 + stretch(octets, at, n - at - 1);
        uint8_t *in = block_of(octets + at, length);
        int16_t *out = block(4 * length);
        g722_decode(&codec, in, length, out);
        PROMISE(memcmp(out, whole + 2 * at, 4 * length) == 0);
        free(in);
        free(out);
        at += length;
    }
    free(whole);
    free(plain);
}

static void encode(const uint8_t *audio, size_t samples)
{
    int16_t *in = block_of(audio, 2 * samples);
    uint8_t *whole = block(samples / 2), *plain = block(samples / 2);
    g722 codec;
    g722_init(&codec, 1);
    PROMISE(g722_encode(&codec, in, samples, whole) == samples / 2);
    portable_init(&codec, 1);
    PROMISE(portable_encode(&codec, in, samples, plain) == samples / 2);
    PROMISE(memcmp(whole, plain, samples / 2) == 0);
    g722_init(&codec, 1);
    size_t made = 0;
    for (size_t at = 0; at < samples;) {
        size_t length = 1 + stretch(audio, at, samples - at - 1);
        int16_t *part = block_of(in + at, 2 * length);
        uint8_t *out = block((length + codec.is_odd) / 2);
        size_t octets = g722_encode(&codec, part, length, out);
        PROMISE(memcmp(out, whole + made, octets) == 0);
        made += octets;
        free(part);
        free(out);
        at += length;
    }
    PROMISE(made == samples / 2);
    free(in);
    free(whole);
    free(plain);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    if (data[0] & 1)
        decode(1 + (data[0] >> 1) % 3, data + 1, size - 1);
    else
        encode(data + 1, (size - 1) / 2);
    return 0;
}
