"""Loudness that changes without a click."""

from __future__ import annotations

import numpy as np

from streamsink.audio import Samples

RAMP = 0.02
"""Seconds in which a change of loudness is spread."""


def factor(db: float) -> float:
    """What samples are multiplied with to be that many dB quieter."""
    return float(10 ** (-db / 20))


class Gain:
    """A gain that slides to where it is sent.

    Args:
        rate: Hz of what it is applied to.
    """

    __slots__ = ("_level", "_ramp", "_step", "_target")

    def __init__(self, rate: int) -> None:
        self._ramp = round(RAMP * rate)
        self._level = self._target = 1.0
        self._step = 0.0

    def slide(self, target: float) -> None:
        """Be ``target``, a factor from 0 to 1, within `RAMP` of audio."""
        if target != self._target:
            self._target = target
            self._step = (target - self._level) / self._ramp

    @property
    def idle(self) -> bool:
        """Whether it would change nothing."""
        return self._level == self._target == 1.0

    def apply(self, samples: Samples) -> Samples:
        """What comes next, that much quieter: a new array."""
        if self._level == self._target:
            louder: Samples = np.rint(samples * np.float32(self._level)).astype(np.int16)
            return louder
        levels = self._level + self._step * np.arange(1, len(samples) + 1)
        levels = np.maximum(levels, self._target) if self._step < 0 else np.minimum(levels, self._target)
        # A step that is spent has rounding left over.
        self._level = self._target if abs(levels[-1] - self._target) < abs(self._step) / 2 else float(levels[-1])
        sliding: Samples = np.rint(samples * levels).astype(np.int16)
        return sliding


def mixed(one: Samples, other: Samples) -> Samples:
    """Both at once; what is too loud together saturates."""
    total: Samples = np.clip(one.astype(np.int32) + other, -32768, 32767).astype(np.int16)
    return total
