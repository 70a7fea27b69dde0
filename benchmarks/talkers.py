"""Processors that talk without end, for bench_playout."""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np

from streamsink import Frame, Processor, Stream

RATE = 8000
SECONDS = 20
"""How much is queued at once."""


def voice() -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    """Something like speech: noise that swells."""
    noise = np.random.default_rng(1).normal(0, 1500, RATE * SECONDS)
    return (noise * (1 + np.sin(np.arange(len(noise)) * 2 * np.pi * 4 / RATE))).astype(np.int16)


VOICE = voice()


class Talker(Processor):
    """Plays through `Stream.play` from the first digit to the second; a mark tells when that one was heard."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.frames = 0

    async def on_start(self, stream: Stream) -> None:
        """Be ready."""
        self.stream = stream

    async def talk(self) -> None:
        """Have two pieces queued all the time."""
        before = self.stream.play(VOICE, RATE)
        while True:
            following = self.stream.play(VOICE, RATE)
            await before
            before = following

    def on_frame(self, frame: Frame) -> None:
        """Take what is decoded."""
        self.frames += 1

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        """Begin, or fall silent."""
        if self.task is None:
            self.task = asyncio.create_task(self.talk())
            return
        self.task.cancel()
        told = time.monotonic()
        self.stream.clear()
        self.stream.mark(repr(told))

    async def on_stop(self, reason: str) -> None:
        """End."""
        if self.task is not None:
            self.task.cancel()


class Sleeper(Talker):
    """What most people write: a task a stream that sleeps for a frame's time after each frame."""

    def __init__(self, lead_ms: int = 100) -> None:
        super().__init__()
        self.lead = lead_ms // 20

    async def talk(self) -> None:
        """Send the lead, then a frame after each sleep."""
        pieces = itertools.cycle(VOICE[at : at + 160] for at in range(0, len(VOICE), 160))
        for piece in itertools.islice(pieces, self.lead):
            self.stream.play(piece, RATE)
        for piece in pieces:
            await asyncio.sleep(0.02)
            self.stream.play(piece, RATE)
