"""When recordings are written and brought to the disk for good: often enough, and never many at once."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from streamsink.processors import recording, writer
from streamsink.processors.record import Record
from streamsink.processors.writer import FLUSH_INTERVAL, Writer
from tests.streams import counting, frame, make_stream


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Live:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.at = [clock.now]
        self.over = False

    def flush(self) -> bool:
        self.at.append(self.clock.now)
        return not self.over

    def longest(self) -> float:
        return max(after - before for before, after in zip(self.at, [*self.at[1:], self.clock.now], strict=True))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(writer, "time", made)
    return made


def run(writing: Writer, clock: Clock, milliseconds: int) -> int:
    """Let time pass; returns the most that were written in a millisecond."""
    most = 0
    for _ in range(milliseconds):
        clock.now += 0.001
        lives = cast("list[Live]", list(writing._live))
        before = sum(len(live.at) for live in lives)
        if writing._next <= clock.now:
            writing._flush()
        most = max(most, sum(len(live.at) for live in lives) - before)
    return most


def test_streams_that_begin_together_are_written_one_after_the_other(clock: Clock) -> None:
    writing = Writer()
    lives = [Live(clock) for _ in range(300)]
    for live in lives:
        writing.add(live)
    assert run(writing, clock, 2000) == 1
    assert max(live.longest() for live in lives) <= FLUSH_INTERVAL + 0.002
    assert min(len(live.at) for live in lives) >= 4


def test_each_is_written_in_time_while_others_come_and_go(clock: Clock) -> None:
    writing = Writer()
    first = Live(clock)
    writing.add(first)
    run(writing, clock, 700)
    assert len(first.at) == 2
    late = [Live(clock) for _ in range(200)]
    for live in late:
        live.at = [clock.now]
        writing.add(live)
        run(writing, clock, 1)
    run(writing, clock, 700)
    # All but one end at once: that one's turn must not wait for theirs.
    for live in late[:-1]:
        live.over = True
    run(writing, clock, 1500)
    assert list(writing._live) in ([first, late[-1]], [late[-1], first])
    assert max(live.longest() for live in (first, late[-1])) <= FLUSH_INTERVAL + 0.002
    first.over = late[-1].over = True
    run(writing, clock, 1000)
    assert not writing._live
    # The next one begins afresh.
    writing.add(again := Live(clock))
    run(writing, clock, 499)
    assert len(again.at) == 1
    run(writing, clock, 2)
    assert len(again.at) == 2


def test_a_disk_that_hung_is_not_made_up_for(clock: Clock) -> None:
    writing = Writer()
    lives = [Live(clock) for _ in range(10)]
    for live in lives:
        writing.add(live)
    run(writing, clock, 1000)
    clock.now += 60
    # Everybody is late, and has a turn at once, but for the rounds that were missed none.
    assert run(writing, clock, 1) == 10
    assert run(writing, clock, 400) == 1


async def test_what_is_written_is_on_the_disk_for_good_after_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    synced: list[tuple[float, int]] = []
    fdatasync = os.fdatasync

    def noted(fd: int) -> None:
        fdatasync(fd)
        synced.append((clock.now, os.fstat(fd).st_size))

    monkeypatch.setattr(os, "fdatasync", noted)
    processor = Record()
    await processor.on_start(make_stream(tmp_path))
    live = processor._recording
    began = clock.now
    for step in range(120):
        clock.now += 0.5
        processor.on_frame(frame(counting(0, 4000), step * 4000))
        # The writing thread comes to it by itself, too; here it does at the time of this clock.
        await writer.writer.run(lambda: _flushed(live))
        async with asyncio.timeout(20):
            while live._syncing:  # noqa: ASYNC110
                await asyncio.sleep(0)
    await processor.on_stop("stop")
    times = [began, *(at for at, _ in synced), clock.now]
    assert max(after - before for before, after in pairwise(times)) <= 10.0
    # And it was the audio of until then that was brought there.
    assert all(size >= 44 + (at - began) * 16_000 for at, size in synced)


def _flushed(live: recording.Recording) -> None:
    live.flush()
