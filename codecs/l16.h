/* L16: samples as they are, two octets each; big-endian in RFC 3551 §4.5.11, little-endian in code that works with
 * SignalWire. */
#ifndef STREAMSINK_L16_H
#define STREAMSINK_L16_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint8_t is_big;
    uint8_t is_odd; /* decoder: whether an octet waits for the next payload */
    uint8_t odd;    /* and which */
} l16;

/* (octets + whether one waited) / 2 samples are written; their number is returned. */
size_t l16_decode(l16 *codec, const uint8_t *in, size_t octets, int16_t *out);

/* 2 * samples octets are written. */
void l16_encode(const l16 *codec, const int16_t *in, size_t samples, uint8_t *out);

#endif
