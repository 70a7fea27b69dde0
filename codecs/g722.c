/* ITU-T G.722 (09/2012). Blocks and signals carry the names of the Recommendation's clause 6.2 (BLOCK1L … BLOCK4H), so
 * that the two can be read side by side; the lower band's signals end in L, the upper band's in H, and BLOCK4, the same
 * for both, leaves the letter away. Additions saturate at 16 bits wherever the Recommendation's do. */
#include "g722.h"

#include "lanes.h"

#define CHUNK 128 /* octets a pass: what the two stages hand each other stays in the first-level cache */

/* Table 14: decision levels of the lower band's quantizer, LL6 times 16 for an unsigned high multiplication. Levels
 * above the 29th are unreachable and only fill the lanes. */
static const uint16_t Q6[32] = {
    16 * 35,   16 * 72,   16 * 110,  16 * 150,  16 * 190,  16 * 233,  16 * 276,  16 * 323,
    16 * 370,  16 * 422,  16 * 473,  16 * 530,  16 * 587,  16 * 650,  16 * 714,  16 * 786,
    16 * 858,  16 * 940,  16 * 1023, 16 * 1121, 16 * 1219, 16 * 1339, 16 * 1458, 16 * 1612,
    16 * 1765, 16 * 1980, 16 * 2195, 16 * 2557, 16 * 2919, 65535,     65535,     65535,
};

/* Table 15: IL for the interval MIL - 1 of a positive and of a negative difference. */
static const uint8_t IL6[2][32] = {
    {61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46,
     45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32, 32, 32},
    {63, 62, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
     17, 16, 15, 14, 13, 12, 11, 10, 9,  8,  7,  6,  5,  4,  4,  4},
};

/* Tables 17 and 18: output values of the 4-, 5- and 6-bit inverse quantizers of the lower band, times 8. */
static const int16_t QM4[16] = {
    0, -20456, -12896, -8968, -6288, -4240, -2584, -1200, 20456, 12896, 8968, 6288, 4240, 2584, 1200, 0,
};
static const int16_t QM5[32] = {
    -280,  -280,  -23352, -17560, -14120, -11664, -9752, -8184, -6864, -5712, -4696,
    -3784, -2960, -2208,  -1520,  -880,   23352,  17560, 14120, 11664, 9752,  8184,
    6864,  5712,  4696,   3784,   2960,   2208,   1520,  880,   280,   -280,
};
static const int16_t QM6[64] = {
    -136,   -136,   -136,   -136,   -24808, -21904, -19008, -16704, -14984, -13512, -12280, -11192, -10232,
    -9360,  -8576,  -7856,  -7192,  -6576,  -6000,  -5456,  -4944,  -4464,  -4008,  -3576,  -3168,  -2776,
    -2400,  -2032,  -1688,  -1360,  -1040,  -728,   24808,  21904,  19008,  16704,  14984,  13512,  12280,
    11192,  10232,  9360,   8576,   7856,   7192,   6576,   6000,   5456,   4944,   4464,   4008,   3576,
    3168,   2776,   2400,   2032,   1688,   1360,   1040,   728,    432,    136,    -432,   -136,
};

/* Table 20: logarithmic multipliers of the lower band by RIL. */
static const int16_t WL[16] = {
    -60, 3042, 1198, 538, 334, 172, 58, -30, 3042, 1198, 538, 334, 172, 58, -30, -60,
};

/* Tables 18, 21: the upper band's inverse quantizer, times 8, and its logarithmic multipliers by IH. */
static const int16_t QM2[4] = {-7408, -1616, 7408, 1616};
static const int16_t WH[4] = {798, -214, 798, -214};
#define Q2 564 /* the upper band's decision level */

/* Table 19: the inverse logarithm's mantissa. */
static const int16_t ILB[32] = {
    2048, 2093, 2139, 2186, 2233, 2282, 2332, 2383, 2435, 2489, 2543, 2599, 2656, 2714, 2774, 2834,
    2896, 2960, 3025, 3091, 3158, 3228, 3298, 3371, 3444, 3520, 3597, 3676, 3756, 3838, 3922, 4008,
};

/* Table 11: the quadrature mirror filter's even taps; its odd ones are the same backwards. */
#define QMF_PAIRS(PAIR) \
    PAIR(3, -11), PAIR(-11, 53), PAIR(12, -156), PAIR(32, 362), PAIR(-210, -805), PAIR(951, 3876), \
    PAIR(3876, 951), PAIR(-805, -210), PAIR(362, 32), PAIR(-156, 12), PAIR(53, -11), PAIR(-11, 3)
#define SUM(even, odd) {even, odd}
#define DIFFERENCE(even, odd) {-(even), odd}
#define EVEN(even, odd) {even, 0}
#define ODD(even, odd) {0, odd}
static const int16_t QMF_SUM[12][2] = {QMF_PAIRS(SUM)};
static const int16_t QMF_DIFFERENCE[12][2] = {QMF_PAIRS(DIFFERENCE)};
static const int16_t QMF_EVEN[12][2] = {QMF_PAIRS(EVEN)};
static const int16_t QMF_ODD[12][2] = {QMF_PAIRS(ODD)};

static inline int clamp(int x, int low, int high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* LIMIT: 15 bits, what the mirror filters may be given. */
static inline int limit(int x) { return clamp(x, -16384, 16383); }

/* LOGSCL, LOGSCH: the logarithmic scale factor leaks and takes the code's multiplier. */
static inline int logsc(int nb, int w, int most) { return clamp((nb * 127 >> 7) + w, 0, most); }

/* SCALEL, SCALEH: the linear scale factor; its exponent's origin is 8 in the lower band and 10 in the upper. */
static inline int scale(int nb, int origin) { return (ILB[nb >> 6 & 31] << (nb >> 11) >> origin) << 2; }

/* BLOCK4L, BLOCK4H: the adaptive predictor takes the quantized difference D and predicts the next value. */
static inline void block4(g722_band *x, int16_t d)
{
    int r = saturate16(x->s + d);  /* RECONS */
    int p = saturate16(x->sz + d); /* PARREC */

    /* UPPOL2 */
    int wd1 = saturate16(x->a1 * 4);
    int wd2 = ((p ^ x->p1) < 0 ? wd1 : saturate16(-wd1)) >> 7;
    int wd3 = (p ^ x->p2) < 0 ? -128 : 128;
    int a2 = clamp(wd2 + wd3 + (x->a2 * 127 >> 7), -12288, 12288);

    /* UPPOL1 */
    int wd4 = (p ^ x->p1) < 0 ? -192 : 192;
    int wd5 = 15360 - a2;
    int a1 = clamp(wd4 + (x->a1 * 255 >> 8), -wd5, wd5);

    /* UPZERO, and DELAYA for the difference signal */
    lanes b = lanes_load(x->b), delayed = lanes_load(x->d);
    lanes step = lanes_copysign(lanes_all(d == 0 ? 0 : 128), delayed, lanes_all(d));
    b = lanes_add(step, lanes_leak(b));
    delayed = lanes_push(delayed, d);

    /* FILTEZ */
    int sz = lanes_sum6(lanes_mult(lanes_add(delayed, delayed), b));

    /* FILTEP */
    int sp = saturate16((a1 * saturate16(r + r) >> 15) + (a2 * saturate16(x->r1 + x->r1) >> 15));

    lanes_store(x->b, b);
    lanes_store(x->d, delayed);
    x->a1 = (int16_t)a1;
    x->a2 = (int16_t)a2;
    x->p2 = x->p1; /* DELAYA */
    x->p1 = (int16_t)p;
    x->r1 = (int16_t)r;
    x->sz = (int16_t)sz;
    x->s = saturate16(sp + sz); /* PREDIC */
}

/* BLOCK2L, BLOCK3L, BLOCK4L: what the encoder and the decoder do alike with a lower band's code. */
static inline void adapt_low(g722_band *low, int il)
{
    int ril = il >> 2;
    int16_t dlt = (int16_t)(low->det * QM4[ril] >> 15); /* BLOCK2L, INVQAL */
    int nb = logsc(low->nb, WL[ril], 18432);            /* BLOCK3L */
    low->nb = (int16_t)nb;
    low->det = (int16_t)scale(nb, 8);
    block4(low, dlt);
}

/* BLOCK2H, BLOCK3H, BLOCK4H. */
static inline void adapt_high(g722_band *high, int ih)
{
    int16_t dh = (int16_t)(high->det * QM2[ih] >> 15); /* BLOCK2H, INVQAH */
    int nb = logsc(high->nb, WH[ih], 22528);           /* BLOCK3H */
    high->nb = (int16_t)nb;
    high->det = (int16_t)scale(nb, 10);
    block4(high, dh);
}

/* BLOCK1L, QUANTL: the code of a difference signal. Decision levels rise, so counting those not above it is a search. */
static inline int quantl(int el, int det)
{
    int wd = el ^ (el >> 15);
    int below = 0;
    for (int i = 0; i < 29; i++)
        below += (Q6[i] * det >> 16) <= wd;
    return IL6[el < 0][below];
}

/* BLOCK1H, QUANTH. */
static inline int quanth(int eh, int det)
{
    int wd = eh ^ (eh >> 15);
    int outer = wd >= (Q2 * det >> 12);
    return (eh < 0 ? 1 : 3) - outer;
}

/* The mirror filters: pairs of samples from w against two sets of taps, n pairs out; w holds 11 pairs more. */
static void qmf(const int16_t *w, size_t n, const int16_t (*first)[2], const int16_t (*second)[2], int32_t (*out)[2])
{
    for (size_t j = 0; j < n; j++, w += 2) {
        int32_t a = 0, b = 0;
        for (int i = 0; i < 12; i++) {
            a += w[2 * i] * first[i][0] + w[2 * i + 1] * first[i][1];
            b += w[2 * i] * second[i][0] + w[2 * i + 1] * second[i][1];
        }
        out[j][0] = a;
        out[j][1] = b;
    }
}

void g722_init(g722 *codec, int mode)
{
    memset(codec, 0, sizeof *codec);
    codec->low.det = 32;
    codec->high.det = 8;
    codec->mode = (uint8_t)mode;
}

void g722_decode(g722 *codec, const uint8_t *in, size_t octets, int16_t *out)
{
    int16_t w[G722_QMF_HISTORY + 2 * CHUNK];
    int32_t x[CHUNK][2];
    while (octets) {
        size_t n = octets < CHUNK ? octets : CHUNK;
        memcpy(w, codec->history, sizeof codec->history);
        for (size_t j = 0; j < n; j++) {
            int il = in[j] & 63, ih = in[j] >> 6;
            /* BLOCK5L: INVQBL, RECONS, LIMIT */
            int qm = codec->mode == 1 ? QM6[il] : codec->mode == 2 ? QM5[il >> 1] : QM4[il >> 2];
            int rl = limit(codec->low.s + (codec->low.det * qm >> 15));
            adapt_low(&codec->low, il);
            adapt_high(&codec->high, ih);
            int rh = limit(codec->high.r1); /* BLOCK5H: LIMIT */
            w[G722_QMF_HISTORY + 2 * j] = (int16_t)(rl + rh);
            w[G722_QMF_HISTORY + 2 * j + 1] = (int16_t)(rl - rh);
        }
        qmf(w, n, QMF_ODD, QMF_EVEN, x); /* receive QMF */
        for (size_t j = 0; j < n; j++) {
            out[2 * j] = saturate16(x[j][0] >> 11);
            out[2 * j + 1] = saturate16(x[j][1] >> 11);
        }
        memcpy(codec->history, w + 2 * n, sizeof codec->history);
        in += n;
        out += 2 * n;
        octets -= n;
    }
}

size_t g722_encode(g722 *codec, const int16_t *in, size_t samples, uint8_t *out)
{
    int16_t w[G722_QMF_HISTORY + 2 * CHUNK];
    int32_t x[CHUNK][2];
    size_t octets = (samples + codec->is_odd) / 2, left = octets;
    const int16_t *end = in + samples;
    while (left) {
        size_t n = left < CHUNK ? left : CHUNK;
        int16_t *fresh = w + G722_QMF_HISTORY;
        memcpy(w, codec->history, sizeof codec->history);
        if (codec->is_odd)
            *fresh++ = codec->odd;
        size_t taken = 2 * n - codec->is_odd;
        memcpy(fresh, in, taken * sizeof *in);
        in += taken;
        codec->is_odd = 0;
        qmf(w, n, QMF_SUM, QMF_DIFFERENCE, x); /* transmit QMF */
        for (size_t j = 0; j < n; j++) {
            int xl = limit(x[j][0] >> 14), xh = limit(x[j][1] >> 14);
            int il = quantl(saturate16(xl - codec->low.s), codec->low.det);
            int ih = quanth(saturate16(xh - codec->high.s), codec->high.det);
            adapt_low(&codec->low, il);
            adapt_high(&codec->high, ih);
            *out++ = (uint8_t)(ih << 6 | il);
        }
        memcpy(codec->history, w + 2 * n, sizeof codec->history);
        left -= n;
    }
    if (in != end) {
        codec->odd = *in;
        codec->is_odd = 1;
    }
    return octets;
}
