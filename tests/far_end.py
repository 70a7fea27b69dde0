"""A playback and the far end of it, on a clock the test turns."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import numpy as np

from streamsink.audio import Samples
from streamsink.codec import CodecSpec
from streamsink.playback import LEAD, Playback
from streamsink.playout import Played, Playout
from streamsink.wire import EndpointMessage, Writer, decode_endpoint


class FarEnd:
    """What a playback has sent, on a clock the test turns."""

    def __init__(self, codec: str = "L16@8000h", listen: bool = False, lead: float = LEAD) -> None:
        self.now = 100.0
        self.spec = CodecSpec.parse(codec)
        self.sent: list[EndpointMessage] = []
        self.woken = 0
        self.heard: list[tuple[float, int]] = []
        self.playback = Playback(self.spec, Writer("s"), self._send, self._wake, lambda: self.now, lead)
        if listen:
            self.playback.on_played = lambda samples, at: self.heard.append((round(at, 3), len(samples)))

    def _send(self, text: bytes) -> None:
        self.sent.append(decode_endpoint(text))

    def _wake(self) -> None:
        self.woken += 1

    def run(self, seconds: float) -> None:
        """Turn the clock, calling advance at each due time as the pacer does."""
        until = self.now + seconds
        for _ in range(10_000):
            due = self.playback.due
            if due is None or due > until:
                break
            self.now = max(self.now, due)
            self.playback.advance(self.now)
        else:
            raise AssertionError("advance() does not move its own due time")
        self.now = until

    async def live(self, seconds: float, step: float = 0.01) -> None:
        """Turn the clock in steps, with time for tasks between them."""
        for _ in range(round(seconds / step)):
            await settle()
            self.run(step)
        await settle()

    @property
    def frames(self) -> int:
        return sum(1 for message in self.sent if message.event == "media")

    @property
    def audio(self) -> Samples:
        decoder = self.spec.decoder()
        nothing: Samples = np.zeros(0, np.int16)
        return np.concatenate([nothing, *(decoder.decode(m.media.payload) for m in self.sent if m.media is not None)])

    @property
    def events(self) -> str:
        """One letter a message: m for media, k for mark, c for clear, d for dtmf."""
        return "".join({"media": "m", "mark": "k", "clear": "c", "dtmf": "d"}[message.event] for message in self.sent)


async def settle() -> None:
    """Let tasks that can run do so."""
    for _ in range(200):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let tasks run, and threads, until something is so."""
    async with asyncio.timeout(10):
        for _ in itertools.takewhile(lambda _: not condition(), itertools.count()):
            await asyncio.sleep(0)


async def wait(playout: Playout) -> Played:
    """Await it in a task of its own."""
    return await playout


def ramp(count: int) -> Samples:
    """Samples that say where they belong."""
    return (np.arange(1, count + 1) % 30_000).astype(np.int16)
