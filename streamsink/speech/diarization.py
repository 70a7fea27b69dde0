"""Telling apart the voices of one track: a place for an engine of the user's own."""

from __future__ import annotations

import asyncio
import importlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import structlog

from streamsink.audio import Frame, Samples
from streamsink.errors import SpeechError

log = structlog.get_logger(__name__)

REMEMBERED = 60.0
"""Seconds of a track that are kept for the utterance to come."""
PATIENCE = 3.0
"""Seconds a diarizer may take for an utterance."""


class Diarizer(Protocol):
    """What knows voices; made without arguments, one a track, so it may remember those it heard."""

    def speaker(self, samples: Samples, sample_rate: int, start: float, end: float) -> str:
        """Name who speaks; in a worker thread, one utterance after the other.

        Args:
            samples: The utterance, mono PCM, shape ``(n,)``, int16.
            sample_rate: Hz.
            start: Where it begins, in seconds on the track's media clock.
            end: Where it ends, likewise.
        """


def find_diarizer(where: str) -> Callable[[], Diarizer]:
    """Find a diarizer's class.

    Args:
        where: ``package.module:Name``.

    Raises:
        SpeechError: There is none.
    """
    module, _, name = where.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name) if name else None
    except (ImportError, AttributeError, ValueError) as error:
        raise SpeechError(f"the diarization engine `{where}` cannot be imported: {error}") from error
    if not callable(found) or not hasattr(found, "speaker"):
        raise SpeechError(f"`{where}` is no diarization engine: wanted package.module:Name of a class with `speaker`")
    return found  # type: ignore[no-any-return]


class Diarization:
    """One track's recent audio, and who is asked whose voice it is.

    Args:
        make: Makes the diarizer.
        otherwise: The speaker's name when it does not know.
    """

    def __init__(self, make: Callable[[], Diarizer], otherwise: str) -> None:
        self._diarizer: Diarizer | None = make()
        self._otherwise = otherwise
        self._recent: deque[Frame] = deque()

    def frame(self, frame: Frame) -> None:
        """Remember a frame."""
        self._recent.append(frame)
        oldest = frame.start - REMEMBERED * frame.sample_rate
        while self._recent[0].start < oldest:
            self._recent.popleft()

    async def speaker(self, start: float, end: float) -> str:
        """Name who spoke between ``start`` and ``end`` seconds; one that fails is not asked again."""
        diarizer = self._diarizer
        if diarizer is None or not self._recent:
            return self._otherwise
        rate = self._recent[0].sample_rate
        frames = [f.samples for f in self._recent if f.start < end * rate and f.start + len(f.samples) > start * rate]
        samples = np.concatenate(frames) if frames else np.zeros(0, np.int16)
        try:
            async with asyncio.timeout(PATIENCE):
                return str(await asyncio.to_thread(diarizer.speaker, samples, rate, start, end))
        except Exception as error:
            self._diarizer = None
            log.error("a diarization engine failed and is not asked again", error=type(error).__name__)
            return self._otherwise
