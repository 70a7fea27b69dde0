"""ITU-T G.722 (09/2012) clause 6.2 in plain Python, block by block: slow, and open to comparison with the text.

Every operation is the Recommendation's: additions saturate at 16 bits one after the other, products are shifted right
by 15. Where libraries take liberties at full scale, this is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable

Q6 = [35, 72, 110, 150, 190, 233, 276, 323, 370, 422, 473, 530, 587, 650, 714, 786, 858, 940, 1023, 1121, 1219, 1339]
Q6 += [1458, 1612, 1765, 1980, 2195, 2557, 2919]
OQ4 = [0, 150, 323, 530, 786, 1121, 1612, 2557]
OQ5 = [0, 35, 110, 190, 276, 370, 473, 587, 714, 858, 1023, 1219, 1458, 1765, 2195, 2919]
OQ6 = [0, 17, 54, 91, 130, 170, 211, 254, 300, 347, 396, 447, 501, 558, 618, 682, 750, 822, 899, 982, 1072, 1170, 1279]
OQ6 += [1399, 1535, 1689, 1873, 2088, 2376, 2738, 3101]
OQ2 = [0, 202, 926]
WL = [-60, -30, 58, 172, 334, 538, 1198, 3042]
WH = [0, -214, 798]
ILB = [2048, 2093, 2139, 2186, 2233, 2282, 2332, 2383, 2435, 2489, 2543, 2599, 2656, 2714, 2774, 2834, 2896, 2960]
ILB += [3025, 3091, 3158, 3228, 3298, 3371, 3444, 3520, 3597, 3676, 3756, 3838, 3922, 4008]
QMF = [3, -11, -11, 53, 12, -156, 32, 362, -210, -805, 951, 3876]
QMF += QMF[::-1]

# The sign and the magnitude's index that each code stands for.
CODE4 = [(1, 0)] + [(-1, i) for i in range(7, 0, -1)] + [(1, i) for i in range(7, -1, -1)]
CODE5 = [(-1, 1), (-1, 1)] + [(-1, i) for i in range(15, 1, -1)] + [(1, i) for i in range(15, 0, -1)] + [(-1, 1)]
CODE6 = [(-1, 1)] * 4 + [(-1, i) for i in range(30, 2, -1)] + [(1, i) for i in range(30, 0, -1)] + [(-1, 2), (-1, 1)]
CODE2 = [(-1, 2), (-1, 1), (1, 2), (1, 1)]


def sat(x: int) -> int:
    return max(-32768, min(32767, x))


def mult(a: int, b: int) -> int:
    return a * b >> 15


def limit(x: int) -> int:
    return max(-16384, min(16383, x))


def level(table: list[int], code: tuple[int, int], det: int) -> int:
    sign, index = code
    return mult(det, sign * (table[index] << 3))


class Band:
    def __init__(self, det: int, origin: int, most: int) -> None:
        self.det, self.origin, self.most = det, origin, most
        self.nb = self.s = self.sz = 0
        self.a = [0, 0, 0]
        self.b = [0] * 7
        self.d = [0] * 7
        self.p = [0, 0, 0]
        self.r = [0, 0, 0]

    def block3(self, w: int) -> None:
        self.nb = max(0, min(self.most, mult(self.nb, 32512) + w))
        mantissa, exponent = ILB[self.nb >> 6 & 31], self.nb >> 11
        self.det = (mantissa << exponent >> self.origin) << 2

    def block4(self, d: int) -> None:
        a, b, p, r = self.a, self.b, self.p, self.r
        self.d[0] = d
        r[0] = sat(self.s + d)  # RECONS
        p[0] = sat(self.sz + d)  # PARREC
        sign = [x >> 15 for x in p]
        wd1 = sat(sat(a[1] + a[1]) * 2)  # UPPOL2
        wd2 = sat(-wd1) if sign[0] == sign[1] else wd1
        wd3 = 128 if sign[0] == sign[2] else -128
        a2 = sat(sat((wd2 >> 7) + wd3) + mult(a[2], 32512))
        a2 = max(-12288, min(12288, a2))
        a1 = sat((192 if sign[0] == sign[1] else -192) + mult(a[1], 32640))  # UPPOL1
        a1 = max(-(15360 - a2), min(15360 - a2, a1))
        a[1], a[2] = a1, a2
        for i in range(6, 0, -1):  # UPZERO
            step = 0 if d == 0 else 128 if (self.d[i] >> 15) == (d >> 15) else -128
            b[i] = sat(step + mult(b[i], 32640))
            self.d[i] = self.d[i - 1]  # DELAYA
        p[2], p[1] = p[1], p[0]
        r[2], r[1] = r[1], r[0]
        self.sz = 0
        for i in range(6, 0, -1):  # FILTEZ
            self.sz = sat(self.sz + mult(sat(2 * self.d[i]), b[i]))
        sp = sat(mult(a[1], sat(2 * r[1])) + mult(a[2], sat(2 * r[2])))  # FILTEP
        self.s = sat(sp + self.sz)  # PREDIC


class Codec:
    """An encoder or a decoder: both keep the same two bands and 24 samples."""

    def __init__(self, mode: int = 1) -> None:
        self.mode = mode
        self.low = Band(32, 8, 18432)
        self.high = Band(8, 10, 22528)
        self.delay = [0] * 24

    def adapt(self, il: int, ih: int) -> None:
        code = CODE4[il >> 2]
        dlt = level(OQ4, code, self.low.det)
        self.low.block3(WL[code[1]])
        self.low.block4(dlt)
        dh = level(OQ2, CODE2[ih], self.high.det)
        self.high.block3(WH[CODE2[ih][1]])
        self.high.block4(dh)

    def encode(self, samples: Iterable[int]) -> bytes:
        out = bytearray()
        for first, second in zip(*[iter(samples)] * 2, strict=True):
            self.delay = [*self.delay[2:], first, second]
            even = sum(c * x for c, x in zip(QMF[0::2], self.delay[0::2], strict=True))
            odd = sum(c * x for c, x in zip(QMF[1::2], self.delay[1::2], strict=True))
            xl, xh = limit(even + odd >> 14), limit(odd - even >> 14)
            el, eh = sat(xl - self.low.s), sat(xh - self.high.s)
            wd = el if el >= 0 else 32767 - (el & 32767)
            mil = 1 + sum(mult(q << 3, self.low.det) <= wd for q in Q6)
            il = 62 - mil if el >= 0 else 64 - mil if mil < 3 else 34 - mil
            wd = eh if eh >= 0 else 32767 - (eh & 32767)
            mih = 2 if wd >= mult(564 << 3, self.high.det) else 1
            ih = 4 - mih if eh >= 0 else 2 - mih
            self.adapt(il, ih)
            out.append(ih << 6 | il)
        return bytes(out)

    def decode(self, octets: bytes) -> list[int]:
        out = []
        for octet in octets:
            il, ih = octet & 63, octet >> 6
            table, code = ((OQ6, CODE6[il]), (OQ5, CODE5[il >> 1]), (OQ4, CODE4[il >> 2]))[self.mode - 1]
            rl = limit(sat(self.low.s + level(table, code, self.low.det)))
            self.adapt(il, ih)
            rh = limit(self.high.r[0])
            self.delay = [*self.delay[2:], rl + rh, rl - rh]
            odd = sum(c * x for c, x in zip(QMF[1::2], self.delay[1::2], strict=True))
            even = sum(c * x for c, x in zip(QMF[0::2], self.delay[0::2], strict=True))
            out += [sat(odd >> 11), sat(even >> 11)]
        return out
