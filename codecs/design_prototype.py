"""Designs the resampler's prototype filter and writes prototype.h beside it; needs scipy, run by hand.

An equiripple low-pass in units of the lower rate: passband to 0.42, stopband from 0.5. The stopband's weight grows by
9 dB an octave, because a pair of rates reads the prototype more coarsely than it is designed and folds the far
stopband onto the near one: what decays adds up to little.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from scipy.signal import remez

OVERSAMPLING = 32
WIDTH = 43  # periods of the lower rate: 2.7 ms of delay at 8 kHz
STOPBAND_EDGES = [0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16]
STOPBAND_WEIGHT = 74  # of its edge, against the passband's 1


def main() -> None:
    """Write the header."""
    bands, desired, weight = [0.0, 0.42], [1.0], [1.0]
    for low, high in pairwise(STOPBAND_EDGES):
        bands += [low, high if high == STOPBAND_EDGES[-1] else high - 0.002]
        desired.append(0.0)
        weight.append(STOPBAND_WEIGHT * (low / 0.5) ** 1.5)
    taps = remez(WIDTH * OVERSAMPLING + 1, bands, desired, weight=weight, fs=OVERSAMPLING, maxiter=500)
    half = taps[WIDTH * OVERSAMPLING // 2 :] * OVERSAMPLING
    numbers = [f"{value:.8e}f" for value in half]
    lines = [", ".join(numbers[i : i + 6]) for i in range(0, len(numbers), 6)]
    Path(__file__).with_name("prototype.h").write_text(
        "/* Written by design_prototype.py: the right half of the resampler's prototype filter, centre first. */\n"
        f"#define PROTOTYPE_OVERSAMPLING {OVERSAMPLING} /* points a period of the lower rate */\n"
        f"#define PROTOTYPE_POINTS {len(half)}\n"
        "static const float PROTOTYPE[PROTOTYPE_POINTS] = {\n    " + ",\n    ".join(lines) + ",\n};\n"
    )


if __name__ == "__main__":
    main()
