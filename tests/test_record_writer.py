"""When recordings are written and brought to the disk for good: often enough, and never many at once."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from streamsink.audio import Track
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
        processor.on_frame(frame(counting(0, 4000), step * 4000))
        clock.now += 0.5
        # The writing thread comes to it by itself, too; here it does at the time of this clock.
        await writer.writer.run(lambda: _flushed(live))
        async with asyncio.timeout(50):
            while live._syncing:  # noqa: ASYNC110
                await asyncio.sleep(0)
    await processor.on_stop("stop")
    times = [began, *(at for at, _ in synced), clock.now]
    assert max(after - before for before, after in pairwise(times)) <= 10.0
    # And it was the audio of until then that was brought there.
    assert all(size >= 44 + (at - began) * 16_000 for at, size in synced)


async def test_every_open_file_and_its_sidecar_are_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files of both segments that are open while one voice is behind, whoever else waits for the disk."""
    monkeypatch.setattr(recording, "SYNC_INTERVAL", 0.0)
    kept: set[str] = set()
    everything = {
        f"20261120T204218Z_front_desk{part}.{ending}.part"
        for part in ("", "~002")
        for ending in ("inbound.wav", "outbound.wav", "json")
    }

    def noted(name: str) -> None:
        sync = getattr(os, name)

        def call(fd: int) -> None:
            sync(fd)
            kept.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name)

        monkeypatch.setattr(os, name, call)

    noted("fsync")
    noted("fdatasync")
    stuck = threading.Event()
    for _ in range(writer.FINISHERS):
        writer.writer.finish(lambda: _held(stuck))
    try:
        processor = Record(layout="separate", segment=1)
        await processor.on_start(make_stream(tmp_path, tracks=(Track.INBOUND, Track.OUTBOUND)))
        processor.on_frame(frame(counting(0, 8100)))
        async with asyncio.timeout(50):
            while kept < everything:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        stuck.set()
    await processor.on_stop("stop")


async def test_a_finished_recording_is_on_the_disk_for_good_name_and_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, write = os.fsync, os.pwrite

    def synced(fd: int) -> None:
        fsync(fd)
        done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")

    def written(fd: int, data: bytes, offset: int) -> int:
        done.append(f"write {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        return write(fd, data, offset)

    processor = Record()
    await processor.on_start(make_stream(tmp_path))
    processor.on_frame(frame(counting(0, 8000)))
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "pwrite", written)
    await processor.on_stop("stop")
    stem = "20261120T204218Z_front_desk"
    # The audio after the last of it, the sidecar after what it tells, the folder after the names.
    last = [step for step in done if step.startswith("fsync")]
    assert [step for step in done if ".wav" in step][-1] == f"fsync {stem}.wav.part"
    assert last[-2:] == [f"fsync {stem}.json.part", f"fsync {tmp_path.name}"]


async def test_what_one_recording_does_wrong_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_log: Callable[[], str]
) -> None:
    bad, good = Record(), Record()
    await bad.on_start(make_stream(tmp_path, name="bad"))
    await good.on_start(make_stream(tmp_path, name="good"))

    def out_of_memory() -> None:
        raise MemoryError

    monkeypatch.setattr(bad._recording, "_take", out_of_memory)
    bad.on_frame(frame(counting(0, 160)))
    async with asyncio.timeout(50):
        while "a recording is not written any more" not in read_log():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    good.on_frame(frame(counting(0, 160)))
    await good.on_stop("stop")
    assert (tmp_path / "20261120T204218Z_good.wav").stat().st_size == 44 + 320
    with pytest.raises(MemoryError):
        await bad.on_stop("stop")


def _held(stuck: threading.Event) -> None:
    assert stuck.wait(50)


def _flushed(live: recording.Recording) -> None:
    live.flush()
