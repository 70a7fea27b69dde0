/* L16: octets in any framing come back as they were. */
#include "../l16.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    const uint8_t *audio = data + 1;
    l16 codec = {.is_big = data[0] & 1};
    size_t octets = size - 1, made = 0;
    for (size_t at = 0; at < octets;) {
        size_t length = 1 + stretch(audio, at, octets - at - 1);
        uint8_t *in = block_of(audio + at, length);
        int16_t *out = block((length + codec.is_odd) / 2 * 2);
        size_t samples = l16_decode(&codec, in, length, out);
        PROMISE(samples <= (length + 1) / 2);
        uint8_t *wire = block(2 * samples);
        l16_encode(&codec, out, samples, wire);
        PROMISE(memcmp(wire, audio + made, 2 * samples) == 0);
        made += 2 * samples;
        free(in);
        free(out);
        free(wire);
        at += length;
    }
    PROMISE(made == octets / 2 * 2 && codec.is_odd == octets % 2);
    return 0;
}
