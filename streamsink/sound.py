"""Audio to play that is made here: tones, and sound files read block by block."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from streamsink.audio import Samples

TONE_DBFS = -12.0
"""Peak level of a tone, loud and well below clipping."""
RAMP = 0.005
"""Seconds in which a tone swells and fades, so that it does not click."""
LONGEST_TONE_MS = 600_000
_BLOCK = 0.2
"""Seconds of audio that are made or read at once."""


def check_tone(hz: float, ms: float, rate: int) -> None:
    """See that a tone can be made.

    Raises:
        ValueError: It cannot, at this rate.
    """
    if not 0 < hz < rate / 2:
        raise ValueError(
            f"tone() wants a frequency above 0 and below {rate // 2} Hz, half the stream's rate; got {hz!r}"
        )
    if not 0 < ms <= LONGEST_TONE_MS:
        raise ValueError(f"tone() wants a length above 0 and up to {LONGEST_TONE_MS} ms, got {ms!r}")


async def tone(hz: float, ms: float, rate: int) -> AsyncIterator[Samples]:
    """A sine at `TONE_DBFS`, block by block: int16 at ``rate``."""
    count = max(1, round(rate * ms / 1000))
    ramp = max(1, min(round(RAMP * rate), count // 2))
    size = round(_BLOCK * rate)
    for start in range(0, count, size):
        at = np.arange(start, min(start + size, count))
        # From both ends, in steps of half a sample: a raised cosine.
        edge = np.clip((np.minimum(at, count - 1 - at) + 0.5) / ramp, 0.0, 1.0)
        level = 32767 * 10 ** (TONE_DBFS / 20) * (0.5 - 0.5 * np.cos(math.pi * edge))
        yield np.rint(level * np.sin(2 * math.pi * hz / rate * at)).astype(np.int16)


class SoundFile:
    """A sound file as a source of audio, read in threads; channels are averaged.

    Args:
        path: Any format soundfile reads.

    Attributes:
        sample_rate: Hz, known when the first block has come; 0 before.
    """

    def __init__(self, path: str | Path) -> None:
        self.sample_rate = 0
        self._path = path
        self._file: soundfile.SoundFile | None = None
        # A block may still be read in one thread when another is to close the file.
        self._lock = threading.Lock()

    async def __aiter__(self) -> AsyncIterator[NDArray[np.float32]]:
        """Read it once, from the beginning, as float32.

        Raises:
            OSError: It cannot be opened.
            soundfile.SoundFileError: It is no sound file.
        """
        try:
            while len(block := await asyncio.to_thread(self._read)):
                yield block
        finally:
            await asyncio.to_thread(self._close)

    def _read(self) -> NDArray[np.float32]:
        with self._lock:
            if self._file is None:
                # Opened here for an error that names what is wrong with the path.
                with open(self._path, "rb"):
                    self._file = soundfile.SoundFile(self._path)
                self.sample_rate = self._file.samplerate
            block = self._file.read(round(_BLOCK * self.sample_rate), dtype="float32", always_2d=True)
        mono: NDArray[np.float32] = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        return mono

    def _close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
