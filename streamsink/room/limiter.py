"""A look-ahead limiter for many outputs at once: none of them ever wraps around or is clipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamsink.audio import Samples

CEILING = 32767
PIECES_AHEAD = 3
"""How many of a block's pieces (about a millisecond each) the output lags its input."""
RELEASE = 0.2
"""Seconds in which most of a reduction is given back."""

Sums = NDArray[np.int32]


class Limiter:
    """Holds every row of what it is given within int16.

    It looks ahead by three pieces of a block, about 3 ms: gain goes down before a peak comes, along straight lines that
    stay below what each piece allows, and comes back slowly. What needs no limiting passes bit by bit, delayed.

    Args:
        block: Samples in a block of 20 ms.
    """

    def __init__(self, block: int) -> None:
        # 44.1 kHz is why: 882 samples are no twenty equal pieces.
        self._pieces = next(pieces for pieces in (20, 21, 18, 1) if block % pieces == 0)
        self._piece = block // self._pieces
        self._ahead = PIECES_AHEAD * self._piece
        self._block = block
        # The share of a reduction that is left after a piece.
        self._decay = np.float32(np.exp(-0.02 / self._pieces / RELEASE))
        self._waiting: Sums = np.zeros((0, self._ahead), np.int32)
        # What each piece that waits allows, and the gain where the output ends.
        self._allowed: NDArray[np.float32] = np.ones((0, PIECES_AHEAD), np.float32)
        self._gain: NDArray[np.float32] = np.ones(0, np.float32)
        self._idle = True

    @property
    def lag(self) -> int:
        """Samples by which the output lags."""
        return self._ahead

    def add(self) -> None:
        """One more row, behind the others."""
        self._waiting = np.concatenate([self._waiting, np.zeros((1, self._ahead), np.int32)])
        self._allowed = np.concatenate([self._allowed, np.ones((1, PIECES_AHEAD), np.float32)])
        self._gain = np.append(self._gain, np.float32(1))

    def remove(self, row: int) -> None:
        """That row is no more; those behind it move up."""
        self._waiting = np.delete(self._waiting, row, axis=0)
        self._allowed = np.delete(self._allowed, row, axis=0)
        self._gain = np.delete(self._gain, row)

    def push(self, sums: Sums) -> Samples:
        """Limit a block of each row.

        Args:
            sums: Shape ``(rows, block)``, int32.

        Returns:
            Shape ``(rows, block)``, int16.
        """
        out = np.empty(sums.shape, np.int16)
        peak = max(int(sums.max(initial=0)), -int(sums.min(initial=0)))
        if self._idle and peak <= CEILING:
            out[:, : self._ahead] = self._waiting
            out[:, self._ahead :] = sums[:, : -self._ahead]
            self._waiting = sums[:, -self._ahead :].copy()
            return out
        return self._limit(sums)

    def _limit(self, sums: Sums) -> Samples:
        rows, pieces, piece = len(sums), self._pieces, self._piece
        peaks = np.abs(sums).reshape(rows, pieces, piece).max(axis=2)
        allowed = np.minimum(np.float32(1), np.float32(CEILING) / np.maximum(peaks, 1)).astype(np.float32)
        every = np.concatenate([self._allowed, allowed], axis=1)
        # At the end of each piece that leaves: the least that it and those ahead allow, or what has come back by then.
        ends = np.lib.stride_tricks.sliding_window_view(every, PIECES_AHEAD + 1, axis=1).min(axis=2)
        gains = np.empty((rows, pieces + 1), np.float32)
        gains[:, 0] = gain = self._gain
        for k in range(pieces):
            gain = np.minimum(1 - (1 - gain) * self._decay, ends[:, k])
            gains[:, k + 1] = gain
        gains = np.where(gains > 0.99999, np.float32(1), gains)
        limited = np.empty((rows, self._block), np.float32)
        limited[:, : self._ahead] = self._waiting
        limited[:, self._ahead :] = sums[:, : -self._ahead]
        slope = np.arange(1, piece + 1, dtype=np.float32) / np.float32(piece)
        levels = (gains[:, 1:] - gains[:, :-1])[:, :, None] * slope
        levels += gains[:, :-1, None]
        limited *= levels.reshape(rows, self._block)
        # Rounding of floats may add a step to what fills the range.
        np.rint(limited, out=limited)
        np.clip(limited, -CEILING - 1, CEILING, out=limited)
        self._waiting = sums[:, -self._ahead :].copy()
        self._allowed = allowed[:, -PIECES_AHEAD:]
        self._gain = gains[:, -1]
        self._idle = bool((self._gain == 1).all() and (self._allowed == 1).all())
        return limited.astype(np.int16)
