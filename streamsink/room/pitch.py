"""Where a voice repeats itself: what lets audio be stretched, shortened and made up without a click."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamsink.audio import Samples

SHORTEST = 0.0025
"""Seconds of the shortest pitch period looked for: 400 Hz."""
LONGEST = 0.0125
"""Seconds of the longest: 80 Hz."""
WINDOW = 0.005
"""Seconds that are compared, and in which one piece fades into another."""


class Pitch:
    """Lengths for one sample rate, in samples.

    Args:
        rate: Hz.
    """

    __slots__ = ("down", "longest", "shortest", "up", "window")

    def __init__(self, rate: int) -> None:
        self.shortest = round(SHORTEST * rate)
        self.longest = round(LONGEST * rate)
        self.window = round(WINDOW * rate)
        self.up = np.arange(1, self.window + 1, dtype=np.float32) / np.float32(self.window + 1)
        self.down = np.float32(1) - self.up

    @property
    def span(self) -> int:
        """Samples that a search looks at."""
        return self.longest + self.window

    def period(self, samples: Samples) -> tuple[int, float]:
        """The lag at which the beginning of ``samples`` repeats best.

        Args:
            samples: `span` of them.

        Returns:
            The lag in samples, and how alike it is there: 1 is the same, 0 nothing alike.
        """
        x: NDArray[np.float32] = samples.astype(np.float32)
        head = x[: self.window]
        windows = np.lib.stride_tricks.sliding_window_view(x, self.window)[self.shortest :]
        products = windows @ head
        energy = np.einsum("ij,ij->i", windows, windows) * (head @ head)
        likeness = products / np.sqrt(energy + 1.0)
        at = int(np.argmax(likeness))
        return self.shortest + at, float(likeness[at])

    def blend(self, out: Samples, into: Samples) -> Samples:
        """The one fading into the other; both `window` long."""
        blended: Samples = np.rint(out * self.down + into * self.up).astype(np.int16)
        return blended
