"""Our own voice coming back: telling it from a talker's.

A conference leg may carry what we play back to us, later, quieter and coded once more. Each frame that comes in is
compared with what the far end was playing up to 0.6 s before: a short filter is fitted (least squares) that makes the
one of the other. What it explains is echo; a talker over the echo is not explained, and is heard.

Everything is compared at 8000 Hz.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from streamsink.audio import Frame, Samples
from streamsink.codec import Resampler

RATE = 8000
"""Hz at which both are compared."""
LATEST = 0.65
"""Seconds by which an echo may be late."""
EARLIEST = 0.005
"""Seconds by which it may seem early. What comes before ours by a frame is a talker whom we are repeating."""
EXPLAINED = 0.85
"""Share of a frame's energy that the filter must make for the frame to be echo."""
PARTLY = 0.3
"""Share that is enough where no more than noise is left."""
LOUDEST_NOISE = 328.0**2
"""Power; what is louder than -40 dBFS is not taken for noise."""
LIKELY = 0.5
"""Share of the last `_FIT` that it must make for a place to be taken for the echo's."""
FAINT = 40.0
"""RMS of a frame that is not worth looking at: -58 dBFS."""
FALL = 0.2
"""Share of the way down to a quieter frame that the line's noise goes with it."""
RISE = 1.02
"""Factor by which it may seem to rise with a frame: 4 dB a second."""
_NOISE = np.random.default_rng(1).standard_normal(48_000 * 120 // 1000).astype(np.float32)
"""Enough for the longest frame there is."""
_TAPS = 12
_FIT = 1600
"""Samples that the filter is fitted to."""
_SEARCH = 2048
"""Samples that are searched for in what was played."""
_EVERY = 160
"""Samples between two searches; up to twenty times as many while none finds anything, since it takes 0.3 ms."""
_WHITE = 0.8
"""How far loud frequencies are kept from drowning the others in the search, 0 to 1."""
_BLOCK = 128
"""Samples that are made as loud as all others before."""
_CANDIDATES = 3
_HELD = 16_384
"""Samples of ours that are held: what is played soon, and what an echo of may still come."""

Floats = NDArray[np.float32]


class EchoGate:
    """Puts noise, as loud as the line's own, in place of the frames of a track that are nothing but our own voice.

    Not silence: beside that, a detector would take the line's noise for somebody.

    Args:
        rate: Hz of the frames, ours and the far end's.
        clock: Seconds, monotonic; that of the times we play at.
    """

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._ours = _Line(rate, _HELD)
        self._theirs = _Line(rate, _SEARCH)
        # How late the echo is, in samples; None while none is known.
        self._lag: int | None = None
        # Position on the inbound clock behind which nothing of ours can come back any more.
        self._over_at = -1
        # Power of the line's noise; None before the first frame that is looked at.
        self._noise: float | None = None
        # Where it was searched for last, and how often in vain.
        self._searched_at = 0
        self._in_vain = 0
        # The clock less the inbound media clock, in seconds: the least of late, since frames come late but never early.
        self._offset: float | None = None

    def played(self, samples: Samples, at: float) -> None:
        """Take a frame of ours that the far end may begin to play ``at`` seconds on the clock, but not before."""
        if self._offset is None:
            return
        start = round((at - self._offset) * self._rate)
        self._ours.push(samples, start)
        self._over_at = max(self._over_at, start + len(samples) + round(LATEST * self._rate))

    def clean(self, frame: Frame) -> Frame:
        """The frame that has just arrived, or noise in its place where it is echo."""
        offset = self._clock() - (frame.start + len(frame.samples)) / self._rate
        # A clock that runs 500 ppm slow is followed; a frame that is late is not.
        slack = 0.0005 * len(frame.samples) / self._rate
        self._offset = offset if self._offset is None else min(offset, self._offset + slack)
        if frame.start >= self._over_at:
            return frame
        count = self._theirs.push(frame.samples, frame.start)
        newest = self._theirs.newest(count)
        power = float(newest @ newest) / count if count else 0.0
        noise = power if self._noise is None else self._noise
        explained = 0.0
        if power > FAINT * FAINT:
            if self._lag is not None:
                explained = self._explained(self._lag, count)[1]
            if not _is_echo(explained, power, noise):
                explained = self._search(count, explained)
        rest = power * (1.0 - explained)
        self._noise = noise + FALL * (rest - noise) if rest < noise else min(rest, noise * RISE)
        if not _is_echo(explained, power, noise):
            return frame
        samples = (_NOISE[: len(frame.samples)] * np.float32(self._noise**0.5)).astype(np.int16)
        samples.setflags(write=False)
        return Frame(samples, frame.sample_rate, frame.track, frame.start, frame.lost, frame.sequence)

    def _search(self, count: int, explained: float) -> float:
        """Look where else an echo may be; returns the share of the newest ``count`` samples that is one then."""
        if self._theirs.end - self._searched_at < _EVERY * min(1 + self._in_vain // 4, 20):
            return explained
        self._searched_at = self._theirs.end
        (lately, now), lag = max((self._explained(lag, count), lag) for lag in self._candidates())
        if lately < LIKELY:
            self._in_vain += 1
            return explained
        self._in_vain = 0
        self._lag = lag
        return now

    def _candidates(self) -> list[int]:
        """The lags at which ours is most like theirs, in samples."""
        theirs = self._theirs.newest(_SEARCH)
        earliest, latest = round(EARLIEST * RATE), round(LATEST * RATE)
        ours = self._ours.between(self._theirs.end - _SEARCH - latest, self._theirs.end + earliest)
        size = 8192
        cross = np.fft.rfft(_even(ours), size) * np.conj(np.fft.rfft(_even(theirs), size))
        magnitude = np.abs(cross)
        cross /= magnitude**_WHITE + np.float32(1e-6) * (magnitude.max() + np.float32(1.0))
        # At place k theirs begins with what ours has k samples after its beginning: a lag of latest - k.
        likeness = np.abs(np.fft.irfft(cross, size)[: latest + earliest])
        found = []
        for _ in range(_CANDIDATES):
            place = int(likeness.argmax())
            found.append(latest - place)
            likeness[max(0, place - _TAPS) : place + _TAPS] = 0.0
        return found

    def _explained(self, lag: int, count: int) -> tuple[float, float]:
        """Which share of the last `_FIT` samples, and of the newest ``count``, ours makes at a lag."""
        length = max(_FIT, count)
        theirs = self._theirs.newest(length)
        end = self._theirs.end - lag + _TAPS // 2
        ours = self._ours.between(end - length - _TAPS + 1, end)
        shifted = sliding_window_view(ours, _TAPS)
        square = shifted.T @ shifted
        square.flat[:: _TAPS + 1] += 1e-5 * np.trace(square) / _TAPS + 1.0
        rest = theirs - shifted @ np.linalg.solve(square, shifted.T @ theirs)
        return _share(rest, theirs), _share(rest[-count:], theirs[-count:])


def _is_echo(explained: float, power: float, noise: float) -> bool:
    """Whether a frame is echo and nothing else, but for the line's noise."""
    rest = power * (1.0 - explained)
    return explained >= EXPLAINED or (explained >= PARTLY and rest <= 2.0 * min(noise, LOUDEST_NOISE))


def _even(samples: Floats) -> Floats:
    """As loud everywhere: a faint beginning is not to be lost beside what is said later."""
    count = len(samples) // _BLOCK
    blocks = samples[: count * _BLOCK].reshape(count, _BLOCK)
    loudness = np.sqrt(np.einsum("ij,ij->i", blocks, blocks) / _BLOCK) + np.float32(FAINT)
    even: Floats = (blocks / loudness[:, np.newaxis]).ravel()
    return even


def _share(rest: Floats, whole: Floats) -> float:
    energy = float(whole @ whole)
    return 1.0 - float(rest @ rest) / energy if energy else 0.0


class _Line:
    """The last samples of one side at 8000 Hz, on the inbound media clock.

    Args:
        rate: Hz of what is pushed.
        held: How many samples are held.
    """

    def __init__(self, rate: int, held: int) -> None:
        self._rate = rate
        self._resampler = Resampler(rate, RATE) if rate != RATE else None
        self._held: Floats = np.zeros(held, np.float32)
        # At RATE: where what is held ends; at the rate of what is pushed: where that is expected to go on.
        self.end = 0
        self._next = 0

    def push(self, samples: Samples, start: int) -> int:
        """Add samples that begin at ``start``; returns how many they are at 8000 Hz."""
        if abs(start - self._next) > self._rate // 500:
            # Not where the last ones ended: what lies between is silence.
            if self._resampler is not None:
                self._resampler.reset()
            self._skip(start * RATE // self._rate - self.end)
            self._next = start
        self._next += len(samples)
        if self._resampler is not None:
            samples = self._resampler.push(samples)
        self._skip(len(samples))
        self._held[len(self._held) - len(samples) :] = samples
        return len(samples)

    def _skip(self, count: int) -> None:
        held = self._held
        if count < 0:
            # Back to what was never played.
            held[-count:] = held[:count].copy()
            held[:-count] = 0.0
        elif count:
            count_kept = max(0, len(held) - count)
            held[:count_kept] = held[len(held) - count_kept :].copy()
            held[count_kept:] = 0.0
        self.end += count

    def newest(self, count: int) -> Floats:
        """The last so many samples."""
        return self._held[len(self._held) - count :]

    def between(self, start: int, end: int) -> Floats:
        """From one place to another; silence where nothing is held."""
        held = self._held
        first = start - (self.end - len(held))
        last = first + end - start
        if first >= 0 and last <= len(held):
            return held[first:last]
        part: Floats = np.zeros(end - start, np.float32)
        low, high = max(0, first), min(len(held), last)
        if low < high:
            part[low - first : high - first] = held[low:high]
        return part
