/* ITU-T G.722 (09/2012). Blocks and signals carry the names of the Recommendation's clause 6.2 (BLOCK1L … BLOCK4H), so
 * that the two can be read side by side. The lower band's signals end in L, the upper band's in H; what is the same for
 * both (BLOCK4) is done for both at once, in neighbouring lanes, and leaves the letter away. Additions saturate at 16
 * bits wherever the Recommendation's do, in its order. */
#include "g722.h"

#include "lanes.h"

#define CHUNK 128 /* octets a pass: what the two stages hand each other stays in the first-level cache */
#define SPARE 6   /* samples that the mirror filters may touch beyond a chunk */

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

/* g722_predictor in registers. */
typedef struct {
    lanes d14, d56, b14, b56, a, r, p, s, sz;
} predictor;

static predictor predictor_load(const g722_predictor *from)
{
    return (predictor){
        .d14 = lanes_load(from->d14), .d56 = lanes_load(from->d56), .b14 = lanes_load(from->b14),
        .b56 = lanes_load(from->b56), .a = lanes_load(from->a),     .r = lanes_load(from->r),
        .p = lanes_load(from->p),     .s = lanes_load(from->s),     .sz = lanes_load(from->sz),
    };
}

static void predictor_store(g722_predictor *to, const predictor *x)
{
    lanes_store(to->d14, x->d14);
    lanes_store(to->d56, x->d56);
    lanes_store(to->b14, x->b14);
    lanes_store(to->b56, x->b56);
    lanes_store(to->a, x->a);
    lanes_store(to->r, x->r);
    lanes_store(to->p, x->p);
    lanes_store(to->s, x->s);
    lanes_store(to->sz, x->sz);
}

/* step, negated where a and b differ in sign. */
static inline lanes signed_step(lanes step, lanes a, lanes b)
{
    lanes differ = lanes_sign(lanes_xor(a, b));
    return lanes_sub(lanes_xor(step, differ), differ);
}

/* BLOCK4L and BLOCK4H: the adaptive predictor takes the quantized difference D and predicts the next value. */
static inline void block4(predictor *x, lanes d)
{
    static const int16_t POLE_STEP[8] = {192, 192, 128, 128};
    static const int16_t POLE_LEAK[8] = {256, 256, 512, 512};
    static const int16_t POLE_LIMIT[8] = {32767, 32767, 12288, 12288};
    lanes zero = lanes_all(0), all_d = lanes_repeat(d);

    lanes r = lanes_add(x->s, d);  /* RECONS */
    lanes p = lanes_add(x->sz, d); /* PARREC */

    /* UPPOL2 and UPPOL1 side by side: A1 in the first pair, A2 in the second. A step of ±192 or ±128, by whether P0
     * agrees in sign with P1 or P2, and a leak of 1/256 or 1/128. */
    lanes all_p = lanes_repeat(p);
    lanes a = lanes_add(signed_step(lanes_load(POLE_STEP), all_p, x->p), lanes_leak(x->a, lanes_load(POLE_LEAK)));
    /* UPPOL2: A2 also takes 4 * A1 >> 7, negated where P0 and P1 agree. */
    lanes wd1 = lanes_add(x->a, x->a);
    wd1 = lanes_add(wd1, wd1);
    lanes agree = lanes_xor(lanes_sign(lanes_xor(all_p, x->p)), lanes_all(-1));
    lanes wd2 = lanes_shift7(lanes_sub(lanes_xor(wd1, agree), agree));
    a = lanes_add(a, lanes_push(wd2, zero));
    lanes most = lanes_load(POLE_LIMIT);
    a = lanes_max(lanes_min(a, most), lanes_sub(zero, most));
    /* UPPOL1: A1 stays within 15360 - A2. */
    most = lanes_sub(lanes_all(15360), lanes_drop(a, 1));
    a = lanes_max(lanes_min(a, most), lanes_sub(zero, most));

    /* UPZERO */
    lanes step = lanes_where(lanes_all(128), all_d), leak = lanes_all(256);
    lanes b14 = lanes_add(signed_step(step, x->d14, all_d), lanes_leak(x->b14, leak));
    lanes b56 = lanes_add(signed_step(step, x->d56, all_d), lanes_leak(x->b56, leak));

    /* DELAYA */
    lanes d56 = lanes_push(x->d56, lanes_drop(x->d14, 3));
    lanes d14 = lanes_push(x->d14, d);
    x->r = lanes_push(x->r, r);
    x->p = lanes_push(x->p, p);

    /* FILTEZ: added up from the sixth to the first. */
    lanes w14 = lanes_mult(lanes_add(d14, d14), b14);
    lanes w56 = lanes_mult(lanes_add(d56, d56), b56);
    lanes sz = lanes_add(lanes_drop(w56, 1), w56);
    sz = lanes_add(sz, lanes_drop(w14, 3));
    sz = lanes_add(sz, lanes_drop(w14, 2));
    sz = lanes_add(sz, lanes_drop(w14, 1));
    sz = lanes_add(sz, w14);

    /* FILTEP */
    lanes w = lanes_mult(lanes_add(x->r, x->r), a);
    lanes sp = lanes_add(w, lanes_drop(w, 1));

    x->d14 = d14;
    x->d56 = d56;
    x->b14 = b14;
    x->b56 = b56;
    x->a = a;
    x->sz = sz;
    x->s = lanes_add(sp, sz); /* PREDIC */
}

/* The quantizers' scale factors, in registers. */
typedef struct {
    int nbl, nbh, detl, deth;
} scales;

/* What the encoder and the decoder do alike with the codes of both bands. */
static inline void adapt(predictor *x, scales *q, int ril, int ih)
{
    int dlt = q->detl * QM4[ril] >> 15; /* BLOCK2L, INVQAL */
    int dh = q->deth * QM2[ih] >> 15;   /* BLOCK2H, INVQAH */
    q->nbl = logsc(q->nbl, WL[ril], 18432); /* BLOCK3L */
    q->detl = scale(q->nbl, 8);
    q->nbh = logsc(q->nbh, WH[ih], 22528); /* BLOCK3H */
    q->deth = scale(q->nbh, 10);
    block4(x, lanes_pair((int16_t)dlt, (int16_t)dh));
}

/* BLOCK1L, QUANTL: the code of EL, in e's first lane. Decision levels rise, so those above it are the last of the 29. */
static inline int quantl(lanes e, int detl)
{
    int el = lanes_first(e);
#ifdef STREAMSINK_SSE2
    __m128i det = _mm_set1_epi16((int16_t)detl), above[4];
    __m128i wd = lanes_xor(e, lanes_sign(e)), all_wd = _mm_shuffle_epi32(_mm_shufflelo_epi16(wd, 0), 0);
    for (int i = 0; i < 4; i++) {
        __m128i q6 = _mm_loadu_si128((const __m128i *)(const void *)(Q6 + 8 * i));
        above[i] = _mm_cmpgt_epi16(_mm_mulhi_epu16(q6, det), all_wd);
    }
    unsigned bits = (unsigned)_mm_movemask_epi8(_mm_packs_epi16(above[0], above[1]));
    bits |= (unsigned)_mm_movemask_epi8(_mm_packs_epi16(above[2], above[3])) << 16;
    int below = __builtin_ctz(bits | 1u << 29);
#else
    int below = 0, wd = el ^ (el >> 15);
    for (int i = 0; i < 29; i++)
        below += (Q6[i] * detl >> 16) <= wd;
#endif
    return IL6[el < 0][below];
}

/* BLOCK1H, QUANTH. */
static inline int quanth(int eh, int deth)
{
    int wd = eh ^ (eh >> 15);
    int outer = wd >= (Q2 * deth >> 12);
    return (eh < 0 ? 1 : 3) - outer;
}

/* The mirror filters: 12 pairs of samples from w on against two sets of taps, one pair of sums, shifted and saturated,
 * for each of n steps of one pair through w. May read up to three pairs more from w and write as many to out. */
static inline void qmf(const int16_t *w, size_t n, const int16_t (*even)[2], const int16_t (*odd)[2], int shift,
                       int16_t *out)
{
#ifdef STREAMSINK_SSE2
    for (size_t j = 0; j < n; j += 4, w += 8, out += 8) {
        __m128i a = _mm_setzero_si128(), b = a;
        for (int i = 0; i < 12; i++) {
            __m128i pairs = _mm_loadu_si128((const __m128i *)(const void *)(w + 2 * i));
            int taps[2];
            memcpy(&taps[0], even[i], sizeof taps[0]);
            memcpy(&taps[1], odd[i], sizeof taps[1]);
            a = _mm_add_epi32(a, _mm_madd_epi16(pairs, _mm_set1_epi32(taps[0])));
            b = _mm_add_epi32(b, _mm_madd_epi16(pairs, _mm_set1_epi32(taps[1])));
        }
        a = _mm_srai_epi32(a, shift);
        b = _mm_srai_epi32(b, shift);
        lanes_store(out, _mm_packs_epi32(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)));
    }
#else
    for (size_t j = 0; j < n; j++, w += 2, out += 2) {
        int32_t a = 0, b = 0;
        for (int i = 0; i < 12; i++) {
            a += w[2 * i] * even[i][0] + w[2 * i + 1] * even[i][1];
            b += w[2 * i] * odd[i][0] + w[2 * i + 1] * odd[i][1];
        }
        out[0] = (int16_t)clamp(a >> shift, -32768, 32767);
        out[1] = (int16_t)clamp(b >> shift, -32768, 32767);
    }
#endif
}

void g722_init(g722 *codec, int mode)
{
    memset(codec, 0, sizeof *codec);
    codec->detl = 32;
    codec->deth = 8;
    codec->mode = (uint8_t)mode;
}

static scales scales_load(const g722 *codec)
{
    return (scales){.nbl = codec->nbl, .nbh = codec->nbh, .detl = codec->detl, .deth = codec->deth};
}

static void scales_store(g722 *codec, const scales *q)
{
    codec->nbl = (int16_t)q->nbl;
    codec->nbh = (int16_t)q->nbh;
    codec->detl = (int16_t)q->detl;
    codec->deth = (int16_t)q->deth;
}

/* One chunk's octets to pairs of the receive filter's input: the bands' sum and difference. */
static inline void decode_bands(g722 *codec, const uint8_t *in, size_t n, int16_t *w, const int16_t *qm, int drop)
{
    predictor x = predictor_load(&codec->predictor);
    scales q = scales_load(codec);
    for (size_t j = 0; j < n; j++) {
        int il = in[j] & 63, ih = in[j] >> 6;
        int dl = q.detl * qm[il >> drop] >> 15; /* BLOCK5L: INVQBL */
        int rl = limit(lanes_first(x.s) + dl);  /* BLOCK5L: RECONS; BLOCK6L: LIMIT */
        adapt(&x, &q, il >> 2, ih);
        int rh = limit(lanes_second(x.r)); /* BLOCK5H: LIMIT */
        w[2 * j] = (int16_t)(rl + rh);
        w[2 * j + 1] = (int16_t)(rl - rh);
    }
    predictor_store(&codec->predictor, &x);
    scales_store(codec, &q);
}

void g722_decode(g722 *codec, const uint8_t *in, size_t octets, int16_t *out)
{
    static const int16_t *const QM[4] = {NULL, QM6, QM5, QM4};
    int16_t w[G722_QMF_HISTORY + 2 * CHUNK + SPARE] = {0}, x[2 * CHUNK + SPARE];
    while (octets) {
        size_t n = octets < CHUNK ? octets : CHUNK;
        memcpy(w, codec->history, sizeof codec->history);
        decode_bands(codec, in, n, w + G722_QMF_HISTORY, QM[codec->mode], codec->mode - 1);
        qmf(w, n, QMF_ODD, QMF_EVEN, 11, x); /* receive QMF */
        memcpy(out, x, 2 * n * sizeof *out);
        memcpy(codec->history, w + 2 * n, sizeof codec->history);
        in += n;
        out += 2 * n;
        octets -= n;
    }
}

/* One chunk of the transmit filter's output, XL and XH in turn, to octets. */
static void encode_bands(g722 *codec, const int16_t *xlh, size_t n, uint8_t *out)
{
    predictor x = predictor_load(&codec->predictor);
    scales q = scales_load(codec);
    for (size_t j = 0; j < n; j++) {
        lanes e = lanes_sub(lanes_pair((int16_t)limit(xlh[2 * j]), (int16_t)limit(xlh[2 * j + 1])), x.s); /* SUBTRA */
        int il = quantl(e, q.detl);
        int ih = quanth(lanes_second(e), q.deth);
        adapt(&x, &q, il >> 2, ih);
        out[j] = (uint8_t)(ih << 6 | il);
    }
    predictor_store(&codec->predictor, &x);
    scales_store(codec, &q);
}

size_t g722_encode(g722 *codec, const int16_t *in, size_t samples, uint8_t *out)
{
    int16_t w[G722_QMF_HISTORY + 2 * CHUNK + SPARE] = {0}, x[2 * CHUNK + SPARE];
    const int16_t *end = in + samples;
    size_t octets = (samples + codec->is_odd) / 2, left = octets;
    while (left) {
        size_t n = left < CHUNK ? left : CHUNK, waiting = codec->is_odd;
        memcpy(w, codec->history, sizeof codec->history);
        w[G722_QMF_HISTORY] = codec->odd;
        codec->is_odd = 0;
        memcpy(w + G722_QMF_HISTORY + waiting, in, (2 * n - waiting) * sizeof *in);
        qmf(w, n, QMF_SUM, QMF_DIFFERENCE, 14, x); /* transmit QMF */
        encode_bands(codec, x, n, out);
        memcpy(codec->history, w + 2 * n, sizeof codec->history);
        in += 2 * n - waiting;
        out += n;
        left -= n;
    }
    if (in != end) {
        codec->odd = *in;
        codec->is_odd = 1;
    }
    return octets;
}
