"""Outgoing audio keeps the pace of a far end whose clock is not ours."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from streamsink.codec import CodecSpec
from streamsink.playback import Playback
from streamsink.slope import LIMIT, SAMPLE_EVERY, Slope
from streamsink.wire import Writer

PTIME = 0.04


class Listener:
    """A far end that talks and listens by a clock of its own, on a time that is turned here.

    Args:
        ppm: How much faster its clock is.
        follow: Whether the playback is told.
        late: Seconds by which each frame of its own is late.
    """

    def __init__(self, ppm: float, follow: bool = True, late: Callable[[], float] = lambda: 0.0) -> None:
        self.now = 0.0
        self.rate = 1 + ppm * 1e-6
        self.slope = Slope()
        self.follow = follow
        self.late = late
        self.playback = Playback(CodecSpec.parse("PCMU@40i"), Writer("s"), self.hear, lambda: None, lambda: self.now)
        # When what it has queued will have been played.
        self.ends = 0.0
        self.dry = 0
        self.leads: list[float] = []

    def hear(self, text: bytes) -> None:
        if self.ends < self.now:
            self.dry += 1
        self.ends = max(self.ends, self.now) + PTIME / self.rate
        self.leads.append(self.ends - self.now)

    def run(self, seconds: float) -> None:
        minute = np.zeros(60 * 8000, np.int16)
        spoken = arrived = heard_at = queued = 0.0
        while self.now < seconds:
            if queued < self.now + 10:
                self.playback.play(minute, 8000)
                queued += 60
            due = self.playback.due
            assert due is not None
            comes = max(arrived, (spoken + PTIME) / self.rate + self.late())
            if comes <= due:
                spoken += PTIME
                arrived = self.now = max(self.now, comes)
                if self.now >= heard_at:
                    heard_at = self.now + SAMPLE_EVERY
                    if self.slope.observe(self.now, spoken) and self.follow:
                        self.playback.set_slope(self.slope.value)
            else:
                self.now = max(self.now, due)
                self.playback.advance(self.now)


def jitter(seed: int) -> Callable[[], float]:
    """Up to 20 ms on each frame, and now and then a stall of up to a second behind which the rest queues up."""
    dice = random.Random(seed)
    return lambda: dice.random() * (1.0 if dice.random() < 0.001 else 0.02)


@pytest.mark.parametrize("ppm", [200, -200])
def test_an_hour_with_a_clock_that_is_off_leaves_the_lead_as_it_is(ppm: int) -> None:
    listener = Listener(ppm)
    listener.run(3600)
    assert listener.dry == 0
    steady = listener.leads[5:]
    assert min(steady) > 0.095
    assert max(steady) < 0.105
    assert listener.playback.underruns == 0


@pytest.mark.parametrize("ppm", [200, -200])
def test_jitter_and_bursts_do_not_disturb_it(ppm: int) -> None:
    listener = Listener(ppm, late=jitter(ppm))
    listener.run(1200)
    assert listener.dry == 0
    assert min(listener.leads[5:]) > 0.09
    assert max(listener.leads) < 0.11
    assert listener.slope.value - 1 == pytest.approx(ppm * 1e-6, abs=200e-6)


@pytest.mark.parametrize(("ppm", "wrong"), [(200, "runs dry"), (-200, "grows")])
def test_without_it_the_far_end_runs_dry_or_grows(ppm: int, wrong: str) -> None:
    listener = Listener(ppm, follow=False)
    listener.run(800)
    if wrong == "runs dry":
        assert listener.dry > 0
    else:
        assert max(listener.leads) > 0.2


def feed(slope: Slope, begin: float, seconds: float, ppm: float, delay: float = 0.0) -> None:
    count = round(seconds / SAMPLE_EVERY)
    for k in range(count):
        now = begin + k * SAMPLE_EVERY
        slope.observe(now, now * (1 + ppm * 1e-6) - delay)


def test_it_is_one_until_there_is_enough_to_tell() -> None:
    slope = Slope()
    feed(slope, 0, 15, 300)
    assert slope.value == 1.0
    feed(slope, 15, 5, 300)
    assert slope.value == pytest.approx(1.0003, abs=1e-9)


def test_it_follows_a_clock_that_changes() -> None:
    slope = Slope()
    feed(slope, 0, 60, 300)
    feed(slope, 60, 60, 300)
    assert slope.delay == pytest.approx(-300e-6 * 117, abs=1e-3)
    for k in range(240):
        now = 120 + k * SAMPLE_EVERY
        slope.observe(now, now + 120 * 300e-6 - (now - 120) * 100e-6)
    assert slope.value == pytest.approx(0.9999, abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_clock_is_further_off_than_the_limit(sign: int) -> None:
    slope = Slope()
    feed(slope, 0, 60, sign * 2000)
    assert slope.value == pytest.approx(1 + sign * LIMIT)


def test_a_pause_of_the_far_end_is_no_slope() -> None:
    slope = Slope()
    feed(slope, 0, 60, 100)
    # It says nothing for ten seconds and counts on from where it was.
    feed(slope, 70, 60, 100, delay=10.0)
    assert slope.value == pytest.approx(1.0001, abs=1e-6)
    assert slope.delay == pytest.approx(10.0 - 0.0127, abs=2e-3)
