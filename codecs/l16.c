#include "l16.h"

#include <string.h>

#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define MACHINE_IS_BIG 1
#else
#define MACHINE_IS_BIG 0
#endif

/* Between the wire's order and the machine's, either way. */
static void copy(int is_big, uint8_t *out, const uint8_t *in, size_t samples)
{
    if (!samples)
        return; /* an empty buffer may be NULL */
    if (is_big == MACHINE_IS_BIG) {
        memcpy(out, in, 2 * samples);
        return;
    }
    for (size_t i = 0; i < samples; i++) {
        uint16_t x;
        memcpy(&x, in + 2 * i, sizeof x);
        x = (uint16_t)(x >> 8 | x << 8);
        memcpy(out + 2 * i, &x, sizeof x);
    }
}

size_t l16_decode(l16 *codec, const uint8_t *in, size_t octets, int16_t *out)
{
    size_t samples = (octets + codec->is_odd) / 2, left = samples;
    uint8_t *to = (uint8_t *)out;
    if (codec->is_odd && left) {
        uint8_t pair[2] = {codec->odd, *in++};
        copy(codec->is_big, to, pair, 1);
        codec->is_odd = 0;
        octets--;
        left--;
        to += 2;
    }
    copy(codec->is_big, to, in, left);
    if (octets > 2 * left) {
        codec->odd = in[octets - 1];
        codec->is_odd = 1;
    }
    return samples;
}

void l16_encode(const l16 *codec, const int16_t *in, size_t samples, uint8_t *out)
{
    copy(codec->is_big, out, (const uint8_t *)in, samples);
}
