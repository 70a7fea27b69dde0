"""What a room costs and how late it makes its members: jitter buffers, the sum, mix-minus, limiter; no socket or codec.

Each member sends a frame of noise and fetches one, every 20 ms. Per tick of 20 ms: what taking the frames costs, the
tick itself (jitter buffers, resampling, the sum and what each is without their own, the limiter, who is talking), and
fetching. A talker is everybody or one of ten; with all at full scale the limiter works on every output. Medians.

Mouth to ear, in virtual time and without jitter: from when a sample would have been heard had its frame been sent
straight back, to when the member's far end plays it, the 20 ms lead of a live source among it; over many phases
between the clocks of the members and that of the room. By 2000 ppm no clock is off: such a listener slides through all
phases.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import rooms_over_nats
from benchmarks.pulses import PULSE, next_said, pulse
from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec
from streamsink.playback import Playback
from streamsink.room import Mixer
from streamsink.room.mixer import FETCH, TICK
from streamsink.wire import Writer

SIZES = (2, 10, 50, 100)
RATES = (8000, 16_000, 24_000)
SKEWS = (0.0, 2e-4, 2e-3)
"""By how much the listener's clock is slower; by the last one, more than any is, it slides through all phases."""

Sides = tuple[float, float, float]


def cost(members: int, ticks: int, *, talkers: float = 1.0, level: float = 3000.0, mixed: bool = False) -> Sides:
    """Microseconds of a tick, medians: taking frames, the tick, fetching."""
    mixer = Mixer(8000, 0.0)
    rates = [RATES[index % 3] if mixed else 8000 for index in range(members)]
    joined = [mixer.join(str(index), None, rate) for index, rate in enumerate(rates)]
    random = np.random.default_rng(7)
    sounds = [
        random.uniform(-level, level, rate // 50).astype(np.int16)
        if index < max(1, talkers * members)
        else np.zeros(rate // 50, np.int16)
        for index, rate in enumerate(rates)
    ]
    taken = np.zeros((ticks, 3))
    for tick in range(ticks):
        now = tick * TICK
        frames = [
            Frame(sound, rate, Track.INBOUND, tick * len(sound), 0, tick)
            for sound, rate in zip(sounds, rates, strict=True)
        ]
        begin = time.perf_counter()
        for member, frame in zip(joined, frames, strict=True):
            member.hear(frame, now + 0.012)
        after_in = time.perf_counter()
        mixer.advance(now + TICK)
        after_tick = time.perf_counter()
        for member, sound in zip(joined, sounds, strict=True):
            member.source(len(sound), now + TICK + 0.001)
        taken[tick] = np.diff([begin, after_in, after_tick, time.perf_counter()])
    into, ticking, out = np.median(taken[ticks // 5 :], axis=0) * 1e6
    return float(into), float(ticking), float(out)


def cost_table(ticks: int) -> list[str]:
    """What a tick costs, by the number of members."""
    lines = ["| room | members | in µs | tick µs | out µs | of a core |", "|---|--:|--:|--:|--:|--:|"]
    cases: list[tuple[str, float, float, bool]] = [
        ("8 kHz, one of ten talks", 0.1, 3000.0, False),
        ("8 kHz, all talk at full scale", 1.0, 32_767.0, False),
        ("8, 16 and 24 kHz, one of ten talks", 0.1, 3000.0, True),
        ("8, 16 and 24 kHz, all at full scale", 1.0, 32_767.0, True),
    ]
    for name, talkers, level, mixed in cases:
        for members in SIZES:
            sides = cost(members, ticks, talkers=talkers, level=level, mixed=mixed)
            share = sum(sides) / (TICK * 1e6)
            lines.append(f"| {name} | {members} | {' | '.join(f'{side:.0f}' for side in sides)} | {share:.1%} |")
    three = sum(cost(3, ticks))
    lines += ["", f"Rooms of three at 8 kHz on a core, by this alone: {TICK * 1e6 / three:.0f}."]
    return lines


def delays(rates: tuple[int, int], phases: tuple[float, float], seconds: float, skew: float = 0.0) -> list[float]:
    """Seconds by which each burst is heard late.

    Args:
        rates: Hz of who talks and who listens.
        phases: When in a tick the one's frames come and the other joins, in seconds.
        seconds: Length of the call.
        skew: By how much the listener's clock is slower.
    """
    now = phases[1]
    mixer = Mixer(8000, 0.0)
    talker, listener = (mixer.join(str(index), None, rate) for index, rate in enumerate(rates))
    said: list[float] = []
    heard: list[tuple[float, Samples]] = []
    playback = Playback(CodecSpec("L16", rates[1], 20), Writer(""), lambda message: None, lambda: None, lambda: now)
    playback.set_slope(1 + skew)
    playback.on_sent = lambda samples, at: heard.append((at, samples))
    mixer.advance(now)
    playback.play_live(lambda n: listener.source(n, now), mixer.due + FETCH - now)
    for number in range(1, round(seconds / TICK)):
        arrives = number * TICK + phases[0]
        while playback.due is not None and playback.due <= arrives:
            now = playback.due
            playback.advance(now)
        now = arrives
        frame = pulse(rates[0], number)
        if frame.any():
            said.append(now + float(np.argmax(frame > 0)) / rates[0])
        talker.hear(Frame(frame, rates[0], Track.INBOUND, number * len(frame), 0, number), now)
    found: list[float] = []
    for begins, samples in heard:
        loud = np.flatnonzero(samples > PULSE // 2)
        if len(loud) and (not found or begins - found[-1] > 5 * TICK):
            found.append(begins + float(loud[0]) / rates[1])
    return [at - next_said(said, at) for at in found]


def delay_table(seconds: float) -> list[str]:
    """Mouth to ear in the first seconds and later, over pairs of rates and 100 pairs of phases."""
    lines = ["| from, to Hz | clock | first 2 s p50 ms | p99 | later p50 | p99 |", "|---|--:|--:|--:|--:|--:|"]
    for rates, skew in itertools.product(((8000, 8000), (16_000, 8000), (8000, 24_000)), SKEWS):
        first: list[float] = []
        later: list[float] = []
        for k in range(100):
            found = delays(rates, ((k % 10 + 0.5) * TICK / 10, (k // 10 + 0.3) * TICK / 10), seconds, skew)
            first += found[:8]
            later += found[len(found) // 2 :]
        shown = [np.percentile(np.array(each) * 1000, p) for each in (first, later) for p in (50, 99)]
        figures = " | ".join(f"{value:.1f}" for value in shown)
        lines.append(f"| {rates[0]} → {rates[1]} | {skew * 1e6:.0f} ppm | {figures} |")
    return lines


def run(out: Path, quick: bool = False) -> str:
    """Measure, and tell in Markdown."""
    lines = ["## Mixing", "", " ".join((__doc__ or "").split()), ""]
    lines += cost_table(50 if quick else 1000)
    lines += ["", *delay_table(4 if quick else 12), ""]
    lines += [*rooms_over_nats.table(5 if quick else 20, 4 if quick else 20), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(run(Path(), quick="--quick" in sys.argv))
