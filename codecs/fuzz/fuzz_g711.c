/* G.711: what is decoded encodes to itself, and no sample lands further than half a step away. */
#include "../g711.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int ready;
    if (!ready)
        g711_init();
    ready = 1;
    if (size < 1)
        return 0;
    const g711_law *law = data[0] & 1 ? &g711_mulaw : &g711_alaw;
    size_t octets = size - 1, samples = octets / 2;
    int16_t *linear = block(2 * octets), *again = block(2 * octets), *in = block_of(data + 1, 2 * samples);
    uint8_t *wire = block(octets), *coded = block(samples);
    g711_decode(law, data + 1, octets, linear);
    g711_encode(law, linear, octets, wire);
    g711_decode(law, wire, octets, again);
    PROMISE(memcmp(linear, again, 2 * octets) == 0); /* not the octets: mu-law has two zeros */
    g711_encode(law, in, samples, coded);
    g711_decode(law, coded, samples, linear);
    for (size_t i = 0; i < samples; i++)
        PROMISE(abs(in[i] - linear[i]) <= 644); /* half of the last segment's step, and what mu-law clips */
    free(linear);
    free(again);
    free(in);
    free(wire);
    free(coded);
    return 0;
}
