/* ITU-T G.722 (09/2012): 7 kHz audio in 64 kbit/s, sub-band ADPCM.
 *
 * Two samples at 16 kHz are one octet: the upper band's 2-bit code IH in bits 7..6, the lower band's 6-bit IL below it
 * (RFC 3551 §4.5.2 sends octets in this order). */
#ifndef STREAMSINK_G722_H
#define STREAMSINK_G722_H

#include <stddef.h>
#include <stdint.h>

#define G722_QMF_HISTORY 22 /* of the quadrature mirror filter's 24 taps, those that lie before the newest pair */

/* The variables of the Recommendation's table 9 for both bands at once: a lower band's value in an even lane, the upper
 * band's of the same name in the odd lane after it. In arrays of two pairs or more the newest comes first. */
typedef struct {
    int16_t d14[8], d56[8]; /* D1..D4 and D5, D6, the quantized difference signal */
    int16_t b14[8], b56[8]; /* B1..B4 and B5, B6, the zero predictor's coefficients */
    int16_t a[8];           /* A1, A2, the pole predictor's coefficients */
    int16_t r[8];           /* R1, R2, the reconstructed signal */
    int16_t p[8];           /* P1, P2, the partially reconstructed signal */
    int16_t s[8];           /* S, the predicted value */
    int16_t sz[8];          /* SZ, the zero predictor's share of it */
} g722_predictor;

typedef struct {
    g722_predictor predictor;
    int16_t nbl, nbh;   /* logarithmic scale factors of the quantizers */
    int16_t detl, deth; /* and the same linear */
    int16_t history[G722_QMF_HISTORY];
    int16_t odd;    /* encoder: the sample that waits for its partner */
    uint8_t is_odd; /* encoder: whether one waits */
    uint8_t mode;   /* decoder: 1, 2 or 3 for 64, 56 or 48 kbit/s (table 1) */
} g722;

void g722_init(g722 *codec, int mode);

/* 2 * octets samples are written. */
void g722_decode(g722 *codec, const uint8_t *in, size_t octets, int16_t *out);

/* (samples + whether one waited) / 2 octets are written; their number is returned. */
size_t g722_encode(g722 *codec, const int16_t *in, size_t samples, uint8_t *out);

#endif
