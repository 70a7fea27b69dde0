/* ITU-T G.722 (09/2012): 7 kHz audio in 64 kbit/s, sub-band ADPCM.
 *
 * Two samples at 16 kHz are one octet: the upper band's 2-bit code IH in bits 7..6, the lower band's 6-bit IL below it
 * (RFC 3551 §4.5.2 sends octets in this order). */
#ifndef STREAMSINK_G722_H
#define STREAMSINK_G722_H

#include <stddef.h>
#include <stdint.h>

/* One band's adaptive predictor and quantizer scale: the variables of the Recommendation's table 9, without their L or H. */
typedef struct {
    int16_t b[8];    /* B1..B6, zero predictor coefficients; lanes 6 and 7 are idle */
    int16_t d[8];    /* D1..D6, the quantized difference signal, newest first; lanes 6 and 7 are idle */
    int16_t a1, a2;  /* pole predictor coefficients */
    int16_t p1, p2;  /* partially reconstructed signal */
    int16_t r1;      /* reconstructed signal */
    int16_t s, sz;   /* predicted value, and the zero predictor's share of it */
    int16_t nb, det; /* logarithmic and linear scale factor of the quantizer */
} g722_band;

#define G722_QMF_HISTORY 22 /* of the quadrature mirror filter's 24 taps, those that lie before the newest pair */

typedef struct {
    g722_band low, high;
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
