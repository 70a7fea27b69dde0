"""What the platform does with the audio that comes back: its play-out queue, and how long replies took."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from streamsink.audio import Samples
from streamsink.codec import CodecSpec

PAUSE = 0.5
"""Seconds: returned audio that has been silent for longer begins a new talk spurt, which is no underrun."""

SILENT = 100
"""Samples up to this are silence: -50 dBFS. Coding alone makes a few dozen of none."""


class Durations:
    """Many durations in little memory: counted in steps of 10 µs."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[round(seconds * 100_000)] += 1

    def percentiles(self) -> dict[str, float] | None:
        """``p50``, ``p99``, ``p999`` (nearest rank) and ``max`` in milliseconds; None when there is nothing."""
        if not self._counts:
            return None
        steps, counts = np.array(sorted(self._counts.items())).T
        ranks = np.quantile(steps, (0.5, 0.99, 0.999, 1.0), weights=counts, method="inverted_cdf")
        return dict(zip(("p50", "p99", "p999", "max"), (ranks / 100).tolist(), strict=True))


class EchoMatch:
    """Pairs the k-th frame that comes back with the k-th frame sent; ``turnaround`` takes the time between the two."""

    WINDOW = 4096
    """Frames in flight that can still be timed, 82 s at 20 ms; beyond them frames are only counted."""

    __slots__ = ("_in_flight", "_turnaround", "returned", "sent")

    def __init__(self, turnaround: Durations) -> None:
        self._turnaround = turnaround
        self._in_flight: deque[float] = deque(maxlen=self.WINDOW)  # when each was sent
        self.sent = 0
        self.returned = 0

    def send(self, now: float) -> None:
        """A frame goes out; ``now`` in seconds on the clock of `come_back`."""
        if self.sent >= self.returned:
            self._in_flight.append(now)
        self.sent += 1

    def come_back(self, now: float) -> None:
        """A frame came back."""
        if 0 < self.sent - self.returned <= len(self._in_flight):
            self._turnaround.add(now - self._in_flight.popleft())
        self.returned += 1

    @property
    def missing(self) -> int:
        """Frames that have not come back."""
        return max(0, self.sent - self.returned)


class FarEnd:
    """The platform's play-out of one stream: a queue played in order, one frame behind.

    A talk spurt starts one ptime after its first audio arrives, the least jitter buffer there is; from then on audio
    plays as the one before it ends. Audio that comes after the queue ran dry starts a spurt of its own; it is an
    **underrun**, a hole a participant hears, unless the silence lasted longer than `PAUSE` or the endpoint had cleared
    the queue. Places in time are samples since the call began, so audio that is contiguous stays so.

    Every ``now`` is in seconds since the call began.

    Args:
        codec: How the audio is encoded.
        keep: Decode the audio and keep it for `heard`.
    """

    __slots__ = ("_codec", "_decoder", "_end", "_in_spurt", "_kept", "_marks", "_sound_until", "underruns")

    def __init__(self, codec: CodecSpec, *, keep: bool = False) -> None:
        self._codec = codec
        self._decoder = codec.decoder() if keep else None
        self._end = 0
        self._in_spurt = False
        self._marks: deque[tuple[int, str]] = deque()
        self._kept: list[tuple[int, Samples]] = []
        self._sound_until = 0
        self.underruns = 0

    def media(self, payload: bytes, now: float) -> None:
        """Queue audio."""
        position = int(now * self._codec.rate)
        if self._end <= position:
            if self._in_spurt and position - self._end <= PAUSE * self._codec.rate:
                self.underruns += 1
            self._end = position + self._codec.frame_samples
            self._in_spurt = True
        if self._decoder is None:
            self._end += self._codec.samples_in(len(payload))
        else:
            samples = self._decoder.decode(payload)
            self._kept.append((self._end, samples))
            self._end += len(samples)
            if np.abs(samples).max(initial=0) > SILENT:
                self._sound_until = self._end

    def mark(self, name: str) -> None:
        """Queue a mark behind the audio."""
        self._marks.append((self._end, name))

    def clear(self, now: float) -> None:
        """Drop the audio that has not been played; all waiting marks count as played."""
        position = int(now * self._codec.rate)
        self._end = min(self._end, position)
        self._sound_until = min(self._sound_until, position)
        self._in_spurt = False
        self._marks = deque((0, name) for _, name in self._marks)
        self._kept = [(start, samples[: position - start]) for start, samples in self._kept if start < position]

    def played(self, now: float) -> list[str]:
        """The names of the marks whose audio has been played by now, in order; each is returned once."""
        names = []
        # A deadline comes back from seconds to samples by rounding, or the mark on it would be missed by one sample.
        position = round(now * self._codec.rate)
        while self._marks and self._marks[0][0] <= position:
            names.append(self._marks.popleft()[1])
        return names

    def next_mark(self) -> float | None:
        """When the next waiting mark's audio will have been played, in seconds since the call began."""
        return self._marks[0][0] / self._codec.rate if self._marks else None

    @property
    def sound_until(self) -> float:
        """When the last audio that can be heard has been played, in seconds since the call began; 0 without `keep`."""
        return self._sound_until / self._codec.rate

    def heard(self) -> Samples:
        """All audio as a participant heard it since the call began, silence where there was none."""
        heard = np.zeros(self._kept[-1][0] + len(self._kept[-1][1]) if self._kept else 0, np.int16)
        for start, samples in self._kept:
            heard[start : start + len(samples)] = samples
        return heard
