"""Jitter buffer: audio that comes when it likes and leaves when it is asked for.

What is kept between the two clocks is a delay. It follows the jitter that is measured; where it has to change, whole
pitch periods are put in or left out, in silence when that can wait. What is missing is made up by repeating the last
period ever softer, so that there is never a click.

Delays are judged on a virtual clock: what was read last is played from then on, sample by sample, and what waits
follows it. That makes the delay of a frame that is on time a constant, whatever the sizes of what goes in and out.
"""

from __future__ import annotations

import math

import numpy as np

from streamsink.audio import Samples
from streamsink.room.pitch import Pitch

FIRST = 0.04
"""Seconds of delay at the start."""
LEAST = 0.02
"""Seconds of delay where nothing jitters."""
MOST = 0.2
"""Seconds of delay at most; what is beyond is cut out, also in speech."""
MARGIN = 0.026
"""Seconds of the first delay that are for no jitter."""
EDGE = 0.002
"""Seconds more than the jitter measured that a frame may be late."""
FORGET = 0.005
"""Seconds a second in which jitter that was once seen is forgotten."""
CREEP = 0.0005
"""Seconds a second by which another clock may differ from ours."""
SPARE = 0.004
"""Seconds of audio that are left over by a read just before what is on time comes."""
LONG, TOO_LONG = 0.004, 0.04
"""Seconds of delay too much that are mended in silence, and those that are mended in speech."""
SHORT, TOO_SHORT = 0.0015, 0.003
"""Seconds of delay too little, likewise."""
ALIKE = 0.6
"""How alike what is joined in speech must be, unless the delay runs out."""
FADE = 0.06
"""Seconds in which what is made up fades away."""
BROKEN = 0.2
"""Seconds made up after which the delay is built anew; and the longest gap that is filled."""
USUAL = 0.02
"""Seconds that are pulled at once, until the first pull tells."""
LARGEST = 0.12
"""Seconds taken at once; more is taken in pieces."""
STRAY = 1.0
"""Seconds a frame may be off before it is another clock that tells its place."""
SILENCE = 100.0
"""Amplitude (root mean square, about -50 dBFS) below which a change cannot be heard."""


class JitterBuffer:
    """One direction of one member's audio.

    Args:
        rate: Hz.
        first: Seconds of delay at the start.
        least: Seconds of delay at least.

    Attributes:
        delay: Seconds a frame that is on time waits, as measured.
        target: Seconds it should.
        jitter: Seconds that frames were late of late.
        concealed: Samples made up so far.
        inserted: Pitch periods put in.
        dropped: Pitch periods left out.
        cuts: How often audio was cut because there was far too much.
    """

    __slots__ = (
        "_buffer",
        "_earliest",
        "_end",
        "_expected",
        "_fresh",
        "_headroom",
        "_last_pull",
        "_last_push",
        "_least",
        "_made_up",
        "_period",
        "_pitch",
        "_pulled",
        "_read",
        "_want",
        "concealed",
        "cuts",
        "delay",
        "dropped",
        "first",
        "inserted",
        "jitter",
        "rate",
        "target",
    )

    def __init__(self, rate: int, first: float = FIRST, least: float = LEAST) -> None:
        self.rate = rate
        self.first = first
        self._least = least
        self.delay = self.target = first
        self.jitter = max(0.0, first - MARGIN)
        self.concealed = self.inserted = self.dropped = self.cuts = 0
        self._pitch = Pitch(rate)
        # What has been read and may be needed to make something up, then what has not been read.
        self._headroom = 2 * self._pitch.span
        self._buffer: Samples = np.zeros(self._headroom + rate, np.int16)
        self._read = self._end = self._headroom
        self._last_pull = self._last_push = 0.0
        # How many samples were taken then.
        self._pulled = round(USUAL * rate)
        # Where the next frame should begin; None before the first.
        self._expected: int | None = None
        # The least transit time seen: what a frame that is on time has.
        self._earliest = 0.0
        # Samples made up since audio last came, and the period they repeat.
        self._made_up = 0
        self._period: Samples | None = None
        # Whether silence comes before what is pushed next.
        self._fresh = True
        # Samples too many (above 0) or too few, where that is worth mending.
        self._want = 0

    @property
    def level(self) -> int:
        """Samples that wait to be read."""
        return self._end - self._read

    def push(self, samples: Samples, start: int, now: float) -> None:
        """Take what came.

        Args:
            samples: Shape ``(n,)``, int16.
            start: Their place on their own clock, in samples; what lies between it and the end of the frame before is
                lost.
            now: Seconds, when they came.
        """
        n = len(samples)
        if n > LARGEST * self.rate:
            half = n // 2
            self.push(samples[:half], start, now)
            self.push(samples[half:], start + half, now)
            return
        expected, self._expected = self._expected, start + n
        transit = now - (start + n) / self.rate
        if expected is None:
            self._earliest = transit
            self._begin(now)
        else:
            self._place(start - expected, now)
            earliest = min(self._earliest + CREEP * (now - self._last_push), transit)
            if abs(transit - self._earliest) > STRAY:
                earliest = transit
            self._earliest = earliest
            self._measure(transit - earliest, now)
        self._last_push = now
        if self._made_up:
            samples = self._resumed(samples)
        elif self._fresh:
            samples = self._faded_in(samples)
        if self._end + n > len(self._buffer):
            self._compact()
        self._buffer[self._end : self._end + n] = samples
        self._end += n
        if self._end - self._read > (MOST + TOO_LONG) * self.rate + n:
            self._cut(now)

    def pull(self, n: int, now: float) -> Samples:
        """What is heard next.

        Args:
            n: How many samples, 0.1 s at most.
            now: Seconds.

        Returns:
            Shape ``(n,)``, int16: a view that holds until the next call of anything here.
        """
        self._last_pull = now
        self._pulled = n
        if self._want:
            self._stretch()
        read = self._read
        if self._end - read >= n:
            self._read = read + n
            return self._buffer[read : read + n]
        return self._concealing(n)

    # --- How long to wait ---

    def _since_pull(self, now: float) -> float:
        """How much more than it pulled last a steady reader has used up since, in seconds: less than nothing at first.

        One that has stopped takes nothing more.
        """
        return min(max(0.0, now - self._last_pull), LARGEST) - self._pulled / self.rate

    def _begin(self, now: float) -> None:
        """Put silence before what comes, as long as the delay that is wanted."""
        self.delay = self.target
        if not self._last_pull:
            self._last_pull = now
        silence = max(0, round((self.target + self._since_pull(now)) * self.rate) - self.level)
        self._append(np.zeros(silence, np.int16))
        self._want = 0
        self._fresh = True

    def _measure(self, late: float, now: float) -> None:
        """Learn from a frame that came so many seconds after it could have come."""
        jitter = self.jitter - FORGET * (now - self._last_push)
        self.jitter = min(late, MOST) if late > jitter else max(jitter, 0.0)
        # Reads come in lumps: how long before one a frame comes that is on time, and how many there are while one is
        # waited for that is late.
        lump = self._pulled / self.rate
        early = lump - (now - late - self._last_pull) % lump
        lumps = max(0, math.ceil((self.jitter + EDGE - early) / lump))
        self.target = min(max(early + lumps * lump + SPARE, self._least), MOST)
        waits = self.level / self.rate - self._since_pull(now) + late
        self.delay += (waits - self.delay) / 8
        over = self.delay - self.target
        self._want = round(over * self.rate) if over > LONG or over < -SHORT else 0

    # --- What is missing ---

    def _place(self, gap: int, now: float) -> None:
        """Audio comes again: fill what was lost before it, less what has been made up for it meanwhile."""
        if self._made_up > BROKEN * self.rate:
            self._made_up = 0
            self._period = None
            self._begin(now)
            return
        if 0 < gap < STRAY * self.rate:
            missing = min(gap - self._made_up, round(BROKEN * self.rate))
            if missing > 0:
                self._append(self._make_up(missing))

    def _make_up(self, n: int) -> Samples:
        """The last period over and over, fading, from where that stands; silence where there is nothing to repeat."""
        if self._period is None:
            # Backwards in time: the end of what there is against what lies before.
            span = self._pitch.span
            past = self._buffer[self._end - span : self._end]
            lag, _ = self._pitch.period(past[::-1])
            self._period = self._smooth(past, lag)
        at = self._made_up
        self._made_up += n
        if self._expected is not None:
            self.concealed += n
        fade = FADE * self.rate
        if at >= fade:
            return np.zeros(n, np.int16)
        places = np.arange(at, at + n)
        softer = np.maximum(0.0, 1.0 - places / fade)
        made: Samples = np.rint(self._period[places % len(self._period)] * softer).astype(np.int16)
        return made

    def _smooth(self, past: Samples, lag: int) -> Samples:
        """The last period, its end led over to its own beginning."""
        period = past[-lag:].copy()
        window = min(self._pitch.window, lag // 2)
        up = np.arange(1, window + 1, dtype=np.float32) / np.float32(window + 1)
        # What came before the period's start follows on from what precedes its end.
        before = past[-lag - window : -lag] if len(past) >= lag + window else period[-window:]
        period[-window:] = np.rint(period[-window:] * (1 - up) + before * up)
        return period

    def _concealing(self, n: int) -> Samples:
        missing = n - self.level
        if self._end + missing > len(self._buffer):
            self._compact()
        self._append(self._make_up(missing))
        read = self._read
        self._read = read + n
        return self._buffer[read : read + n]

    def _resumed(self, samples: Samples) -> Samples:
        """Lead from what was made up over to what has come."""
        window = min(self._pitch.window, len(samples))
        concealed = self.concealed
        tail = self._make_up(window)
        self.concealed = concealed
        self._made_up = 0
        self._period = None
        joined = samples.copy()
        if window == self._pitch.window:
            joined[:window] = self._pitch.blend(tail, samples[:window])
        return joined

    def _faded_in(self, samples: Samples) -> Samples:
        self._fresh = False
        window = min(self._pitch.window, len(samples))
        rising = samples.copy()
        rising[:window] = np.rint(samples[:window] * self._pitch.up[:window])
        return rising

    # --- Stretching ---

    def _stretch(self) -> None:
        """Put a pitch period in or leave one out, when that cannot be heard or must be."""
        want, pitch, read = self._want, self._pitch, self._read
        if self.level < pitch.span or self._made_up:
            return
        ahead = self._buffer[read : read + pitch.span]
        loud = float(np.sqrt(np.mean(np.square(ahead, dtype=np.float32))))
        if loud > SILENCE and -TOO_SHORT < want / self.rate < TOO_LONG:
            return
        lag, likeness = (
            pitch.period(ahead) if loud > SILENCE else (max(pitch.shortest, min(abs(want), pitch.longest)), 1.0)
        )
        if likeness < ALIKE and -SPARE < want / self.rate < 2 * TOO_LONG:
            return
        window = pitch.window
        blend = pitch.blend
        if want > 0:
            if self.level < lag + pitch.span:
                return
            self._buffer[read + lag : read + lag + window] = blend(ahead[:window], ahead[lag : lag + window])
            self._read = read + lag
            self.dropped += 1
            change = -lag
        else:
            if read < self._headroom + lag:
                return
            joint = blend(ahead[lag : lag + window], ahead[:window])
            self._buffer[read - lag : read] = ahead[:lag].copy()
            self._buffer[read : read + window] = joint
            self._read = read - lag
            self.inserted += 1
            change = lag
        self.delay += change / self.rate
        over = (want + change) / self.rate
        self._want = want + change if over > LONG or over < -SHORT else 0

    def _cut(self, now: float) -> None:
        """Far too much has come: leave out what is older than the delay that is wanted."""
        # At least what is needed to make something up, should nothing follow.
        keep = max(round((self.target + self._since_pull(now)) * self.rate) + self._pitch.window, self._pitch.span)
        excess = self.level - keep
        if excess <= self._pitch.window:
            return
        read, window = self._read, self._pitch.window
        old = self._buffer[read : read + window].copy()
        self._read = read + excess
        self._buffer[self._read : self._read + window] = self._pitch.blend(
            old, self._buffer[self._read : self._read + window]
        )
        self.delay = self.target
        self._want = 0
        self.cuts += 1

    # --- Storage ---

    def _append(self, samples: Samples) -> None:
        if self._end + len(samples) > len(self._buffer):
            self._compact()
        self._buffer[self._end : self._end + len(samples)] = samples
        self._end += len(samples)

    def _compact(self) -> None:
        """Move what is there to the front, with what has been read before it."""
        keep = self._read - self._headroom
        length = self._end - keep
        self._buffer[:length] = self._buffer[keep : self._end].copy()
        self._read -= keep
        self._end -= keep
