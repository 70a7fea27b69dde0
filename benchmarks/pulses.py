"""Bursts that are found again: what the delay of a room is measured with."""

from __future__ import annotations

import numpy as np

from streamsink.audio import Samples

PULSE = 20_000
"""How loud a burst is."""


def pulse(rate: int, number: int) -> Samples:
    """A frame; every twelfth has a short burst in its middle."""
    frame = np.zeros(rate // 50, np.int16)
    if number % 12 == 6:
        at = len(frame) // 2
        frame[at : at + rate // 1000] = PULSE
    return frame


def next_said(said: list[float], heard: float) -> float:
    """When what is heard at a time was said: the newest burst before it."""
    return max(at for at in said if at <= heard)
