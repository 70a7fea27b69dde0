"""The values audio travels in: no behaviour beyond arithmetic on themselves."""

from __future__ import annotations

import enum

import msgspec
import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int16]
"""Mono PCM, shape ``(n,)``, int16."""


class Track(enum.Enum):
    """Whose voice a frame carries, as ``media.track`` names it."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"
    MIX = "mix"


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A stretch of one track's audio, in order.

    Attributes:
        samples: Mono PCM, shape ``(n,)``, int16, read-only.
        sample_rate: Hz.
        track: Whose voice it is.
        start: Position of ``samples[0]`` on the track's media clock, in samples at ``sample_rate``.
        lost: Samples missing just before this frame, at ``sample_rate``; 0 normally.
        sequence: The message's ``sequenceNumber``, or its ``chunk`` where the sender has none.
    """

    samples: Samples
    sample_rate: int
    track: Track
    start: int
    lost: int
    sequence: int

    @property
    def duration_ms(self) -> float:
        """Length of the audio in milliseconds."""
        return len(self.samples) * 1000 / self.sample_rate
