/* ITU-T G.711: A-law and mu-law, 8 kHz, one octet a sample. Tables 1a to 2b, with samples left-justified in 16 bits. */
#ifndef STREAMSINK_G711_H
#define STREAMSINK_G711_H

#include <stddef.h>
#include <stdint.h>

/* Both directions of one law. */
typedef struct {
    int16_t linear[256];      /* by octet */
    uint8_t compressed[16384]; /* by the top 14 bits of a sample, from the most negative up */
} g711_law;

extern g711_law g711_mulaw, g711_alaw;

/* Fills both laws' tables; once, before anything else. */
void g711_init(void);

void g711_decode(const g711_law *law, const uint8_t *in, size_t octets, int16_t *out);
void g711_encode(const g711_law *law, const int16_t *in, size_t samples, uint8_t *out);

#endif
