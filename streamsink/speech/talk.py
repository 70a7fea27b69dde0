"""From windows that are speech or not to a talker who started or stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from streamsink.audio import Frame, Track
from streamsink.speech.events import Speech, SpeechChange, VadSettings

Listener = tuple[VadSettings, Callable[[Speech], None]]
"""What somebody asked for, and what takes each change."""


class Detector(Protocol):
    """Listens to one track.

    Attributes:
        rate: Hz of the frames it wants.
    """

    rate: int

    def push(self, frame: Frame) -> None:
        """Listen to a frame at :attr:`rate`, on the event loop."""

    def close(self) -> None:
        """The track has ended; nothing more is told."""


class Talk:
    """One listener's view of a track: keeps a click from being speech, and a breath from being its end.

    What was lost counts as silence. Positions are in samples at ``rate`` on the track's media clock.

    Args:
        listener: ``speech_ms`` and ``hangover_ms`` of its settings.
        track: Which track it is.
        rate: Hz.
        talking: Whether the talker has started already.
    """

    __slots__ = (
        "_begin",
        "_end",
        "_hangover",
        "_needed",
        "_rate",
        "_run",
        "_spoken_until",
        "_tell",
        "_track",
        "talking",
    )

    def __init__(self, listener: Listener, track: Track, rate: int, *, talking: bool = False) -> None:
        settings, self._tell = listener
        self.talking = talking
        self._track = track
        self._rate = rate
        self._needed = settings.speech_ms * rate // 1000
        self._hangover = settings.hangover_ms * rate // 1000
        # Where the last window ended; None before the first.
        self._end: int | None = None
        # While silent: how much speech there was lately, less the silence in it, and where it began.
        self._run = 0
        self._begin = 0
        # While talking: where the last speech ended.
        self._spoken_until = 0

    def judged(self, speech: bool, start: int, end: int) -> None:
        """Take the verdict on the window from ``start`` to ``end``."""
        if self._end is None:
            self._spoken_until = start
        elif start > self._end:
            self._silence(self._end, start)
        self._end = end
        if speech:
            self._speech(start, end)
        else:
            self._silence(start, end)

    def _speech(self, start: int, end: int) -> None:
        if not self.talking:
            if not self._run:
                self._begin = start
            self._run += end - start
            if self._run < self._needed:
                return
            self.talking = True
            self._spoken_until = end
            self._tell(Speech(SpeechChange.STARTED, self._begin / self._rate, self._track))
        self._spoken_until = end

    def _silence(self, start: int, end: int) -> None:
        if not self.talking:
            self._run = max(0, self._run - (end - start))
        elif end - self._spoken_until >= self._hangover:
            self.talking = False
            self._run = 0
            self._tell(Speech(SpeechChange.STOPPED, self._spoken_until / self._rate, self._track))
