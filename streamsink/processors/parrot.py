"""Parrot: says back what it was told. The demo anyone understands, and a whole conversation in few lines."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Literal

import numpy as np

from streamsink.audio import Frame, Samples, Track
from streamsink.errors import ProcessorError
from streamsink.playout import BargeIn, Outcome, Playout
from streamsink.processor import Processor
from streamsink.speech.events import Speech, SpeechChange, VadSettings
from streamsink.stream import Stream

ROLL = 0.2
"""Seconds kept before and after an utterance, so that soft sounds at its ends are not cut."""
KEEP = 1.5
"""Seconds kept while nobody talks: a talker is noticed later than they began."""
LONGEST = 300.0
"""Seconds: who sets more would hear nothing for longer than anybody waits."""


class Parrot(Processor):
    """Waits for the talker to stop, then plays the last utterance back, whole and once.

    Whoever talks on while it speaks interrupts it, and is said back in turn; a word or a cough meanwhile is not.

    Args:
        pause_ms: Silence that ends an utterance.
        longest_seconds: Of a longer utterance, only so much is said back: its end.
        engine: How voice activity is detected.

    Raises:
        ProcessorError: ``longest_seconds`` cannot be used.
    """

    def __init__(
        self,
        *,
        pause_ms: int = 700,
        longest_seconds: float = 60.0,
        engine: Literal["auto", "silero", "energy"] = "auto",
    ) -> None:
        if not 1.0 <= longest_seconds <= LONGEST:
            raise ProcessorError(f"parrot: longest_seconds is {longest_seconds!r}; wanted 1 to {LONGEST:g} seconds")
        self.vad = VadSettings(engine=engine, hangover_ms=pause_ms)
        self._longest = longest_seconds
        self._frames: deque[Frame] = deque()
        # Where the utterance that is being listened to began, in seconds on the inbound media clock, and where one that
        # began while it speaks did.
        self._began: float | None = None
        self._barging: float | None = None
        self._speaking: asyncio.Task[None] | None = None

    async def on_start(self, stream: Stream) -> None:
        """Keep the stream to talk back on."""
        self._stream = stream

    def on_frame(self, frame: Frame) -> None:
        """Keep what may become part of an utterance."""
        if frame.track is not Track.INBOUND:
            return
        self._frames.append(frame)
        kept = KEEP if self._began is self._barging is None else self._longest + KEEP
        while frame.start - self._frames[0].start > kept * frame.sample_rate:
            self._frames.popleft()

    def on_speech(self, event: Speech) -> None:
        """Note where an utterance begins; when it ends, say it."""
        if event.track is not Track.INBOUND:
            return
        if event.change is SpeechChange.STARTED:
            if self._speaking is None:
                self._began = event.at
            else:
                self._barging = event.at
            return
        if self._began is not None:
            rate = self._frames[0].sample_rate
            began = max(self._began, event.at - self._longest)
            utterance = self._cut(round((began - ROLL) * rate), round((event.at + ROLL) * rate))
            playout = self._stream.play(utterance, rate, barge_in=BargeIn())
            self._speaking = asyncio.ensure_future(self._speak(playout))
        self._began = self._barging = None

    async def _speak(self, playout: Playout) -> None:
        # The end of the stream ends it too.
        played = await playout
        self._speaking = None
        if played.outcome is Outcome.INTERRUPTED:
            self._began = self._barging
        self._barging = None

    def _cut(self, start: int, end: int) -> Samples:
        """The audio between two places; what was lost is silence."""
        start = max(start, self._frames[0].start)
        utterance = np.zeros(end - start, np.int16)
        for frame in self._frames:
            piece = frame.samples[max(0, start - frame.start) : max(0, end - frame.start)]
            at = max(0, frame.start - start)
            utterance[at : at + len(piece)] = piece
        return utterance
