"""The jitter buffer: its delay follows the jitter, clocks that differ cost nothing one hears, and nothing clicks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from streamsink.audio import Samples
from streamsink.room.jitter import BROKEN, LEAST, MOST, JitterBuffer

RATE = 8000
N = 160
"""20 ms."""


def tone(hz: float, seconds: float, level: float = 8000, rate: int = RATE) -> Samples:
    samples: Samples = np.rint(level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(
        np.int16
    )
    return samples


def steepest(samples: Samples) -> int:
    """The largest step from one sample to the next: a click is one that the signal itself does not have."""
    return int(np.abs(np.diff(samples.astype(np.int32))).max(initial=0))


def curl(samples: Samples) -> float:
    """The largest second difference: a join that is no join shows here first."""
    return float(np.abs(np.diff(samples.astype(np.int32), 2)).max(initial=0))


class Line:
    """A far end that sends frames of a signal on its own clock, and a mixer that pulls on ours."""

    def __init__(
        self,
        signal: Callable[[int, int], Samples],
        *,
        ppm: float = 0.0,
        jitter: Callable[[int], float] = lambda number: 0.0,
        lost: Callable[[int], bool] = lambda number: False,
        rate: int = RATE,
    ) -> None:
        self.buffer = JitterBuffer(rate)
        self.signal, self.jitter, self.lost = signal, jitter, lost
        self.period = 0.02 / (1 + ppm * 1e-6)
        self.n = rate // 50
        self.sent = self.pulled = 0
        self.arrived = 0.0

    def run(self, seconds: float) -> Iterator[Samples]:
        end = self.pulled + round(seconds * 50)
        while self.pulled < end:
            now = (self.pulled + 1) * 0.02
            while (at := max(self.arrived, (self.sent + 0.5) * self.period + self.jitter(self.sent))) <= now:
                if not self.lost(self.sent):
                    self.buffer.push(self.signal(self.sent * self.n, self.n), self.sent * self.n, at)
                self.sent += 1
                # One connection: nothing overtakes.
                self.arrived = at
            self.pulled += 1
            yield self.buffer.pull(self.n, now).copy()

    def all(self, seconds: float) -> Samples:
        return np.concatenate(list(self.run(seconds)))


def sine(hz: float, level: float = 8000, rate: int = RATE) -> Callable[[int, int], Samples]:
    def at(start: int, n: int) -> Samples:
        wave: Samples = np.rint(level * np.sin(2 * np.pi * hz * np.arange(start, start + n) / rate)).astype(np.int16)
        return wave

    return at


def test_audio_comes_out_as_it_went_in_forty_milliseconds_later() -> None:
    line = Line(lambda start, n: (1000 + np.arange(start, start + n) % 20_000).astype(np.int16))
    out = line.all(3)
    first = int(np.argmax(out > 0))
    # Half a tick after the clocks' beginning the first frame has come; the first pull is half a tick later.
    assert first / RATE == pytest.approx(0.04 - 0.01, abs=0.021)
    steady = np.diff(out[RATE : 2 * RATE])
    assert steady.tolist() == [1] * len(steady)
    assert line.buffer.concealed == 0


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.1])
def test_the_delay_follows_the_jitter(spread: float) -> None:
    random = np.random.default_rng(1)
    late = random.uniform(0, spread, 5000)
    line = Line(lambda start, n: np.zeros(n, np.int16), jitter=lambda number: float(late[number]))
    line.all(30)
    buffer = line.buffer
    assert max(spread - 0.005, LEAST) <= buffer.target <= spread + 0.035
    assert buffer.delay == pytest.approx(buffer.target, abs=0.01)
    concealed = buffer.concealed
    line.all(30)
    # A frame a minute that is later than any before.
    assert buffer.concealed - concealed <= N // 2


def test_the_delay_stays_within_its_limits_whatever_comes() -> None:
    random = np.random.default_rng(2)
    late = random.uniform(0, 2.0, 5000) * (random.random(5000) < 0.05)
    line = Line(sine(200), jitter=lambda number: float(late[number]))
    for _ in line.run(40):
        assert line.buffer.target <= MOST
        assert line.buffer.level < (MOST + 0.15) * RATE
    assert line.buffer.cuts > 0


@pytest.mark.parametrize("ppm", [200, -200])
def test_an_hour_of_clocks_that_differ_is_heard_without_a_skip(ppm: float) -> None:
    # Half a second of speech-like tone, half a second of pause: what must be mended is, in the pauses.
    talk, quiet = tone(180, 0.5), np.zeros(RATE // 2, np.int16)
    fade = np.minimum(1, np.minimum(np.arange(4000), np.arange(4000)[::-1]) / 80)
    second = np.concatenate([np.rint(talk * fade).astype(np.int16), quiet])
    line = Line(lambda start, n: second[start % RATE :][:n], ppm=ppm)
    usual = steepest(second)
    for block in line.run(3600):
        assert steepest(block) <= usual * 1.1
    buffer = line.buffer
    assert buffer.concealed == buffer.cuts == 0
    # 720 ms in pieces of 2.5 to 12.5 ms.
    assert 720 / 12.5 * 0.8 <= max(buffer.inserted, buffer.dropped) <= 720 / 2.5 * 1.1
    # Back by a little at most each time that one clock has passed the other by a frame: nothing swings to and fro.
    assert min(buffer.inserted, buffer.dropped) <= 720 / 20
    assert abs(buffer.delay - buffer.target) < 0.02


@pytest.mark.parametrize("ppm", [200, -200])
def test_who_never_pauses_is_stretched_by_whole_periods(ppm: float) -> None:
    line = Line(sine(200), ppm=ppm)
    out = line.all(900)[RATE:]
    buffer = line.buffer
    assert buffer.concealed == buffer.cuts == 0
    assert max(buffer.inserted, buffer.dropped) >= 8
    # The tone goes on through every one of them.
    assert steepest(out) <= 1.02 * steepest(tone(200, 1))
    assert curl(out) <= 1.2 * curl(tone(200, 1))
    spectrum = np.abs(np.fft.rfft(out[: RATE * 100] * np.hanning(RATE * 100)))
    peak = int(spectrum.argmax())
    assert peak / 100 == pytest.approx(200, abs=0.1)


def test_a_lost_frame_is_made_up_by_what_was_there_before() -> None:
    line = Line(sine(200), lost=lambda number: number == 20)
    out = line.all(1.0)[800:]
    assert line.buffer.concealed == pytest.approx(N, abs=1)
    assert steepest(out) <= 1.1 * steepest(tone(200, 1))
    # It is quieter for a moment, and never gone: 20 ms of 60.
    levels = np.sqrt(np.mean(out[: len(out) // 40 * 40].reshape(-1, 40).astype(float) ** 2, axis=1))
    assert 0.5 * 8000 / np.sqrt(2) < levels.min()


def test_who_stops_sending_fades_away_and_comes_back_with_the_delay_built_anew() -> None:
    line = Line(sine(200), lost=lambda number: 30 <= number < 100)
    out = line.all(4.0)[800:]
    assert steepest(out) <= 1.1 * steepest(tone(200, 1))
    silent = out[: len(out) // N * N].reshape(-1, N).any(axis=1)
    assert 60 < (~silent).sum() < 72
    assert line.buffer.delay == pytest.approx(line.buffer.target, abs=0.02)
    assert line.buffer.level > 0


def test_a_pause_of_the_sender_that_is_made_up_for_is_not_filled_twice() -> None:
    # Three frames lost in a row: the buffer ran dry meanwhile, and the gap they leave is what was made up already.
    line = Line(sine(200), lost=lambda number: 40 <= number < 45)
    line.all(0.7)
    before = line.buffer.delay
    line.all(1.0)
    assert line.buffer.delay == pytest.approx(before, abs=0.015)


def test_a_stall_makes_the_delay_longer_and_it_shrinks_again() -> None:
    talk = tone(180, 0.5)
    second = np.concatenate([talk, np.zeros(RATE // 2, np.int16)])
    line = Line(
        lambda start, n: second[start % RATE :][:n],
        jitter=lambda number: max(0.0, (110 - number) * 0.02 * (number >= 103)),
    )
    line.all(3)
    stalled = line.buffer.delay
    assert stalled > 0.1
    line.all(60)
    assert line.buffer.delay < 0.05


def test_another_clock_is_no_jitter() -> None:
    buffer = JitterBuffer(RATE)
    for number in range(50):
        buffer.push(np.zeros(N, np.int16), number * N, number * 0.02)
        buffer.pull(N, number * 0.02 + 0.01)
    for number in range(50, 100):
        buffer.push(np.zeros(N, np.int16), 10_000_000 + number * N, number * 0.02)
        buffer.pull(N, number * 0.02 + 0.01)
    assert buffer.target < 0.06
    assert buffer.concealed == 0


def test_a_frame_of_any_length_is_taken() -> None:
    buffer = JitterBuffer(RATE)
    long = tone(200, 3.0)
    buffer.push(long, 0, 0.0)
    assert 0 < buffer.level <= (MOST + 0.3) * RATE
    heard = np.concatenate([buffer.pull(N, 0.02 * k).copy() for k in range(1, 40)])
    assert steepest(heard) <= 1.2 * steepest(long)


def test_nobody_reads() -> None:
    buffer = JitterBuffer(RATE, 0.01, 0.01)
    for number in range(500):
        buffer.push(tone(200, 0.02), number * N, number * 0.02)
    assert buffer.level < (MOST + 0.3) * RATE
    assert buffer.delay < 2 * MOST
    assert BROKEN < 1
