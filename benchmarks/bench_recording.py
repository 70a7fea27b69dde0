"""What recording costs: streams in one process at 50 frames a second each, written by `record`, and inline on the loop.

For each format streams are recorded for a while, PCMU frames of 20 ms handed over by the event loop; beside them the
same with soundfile writing each frame on the loop. CPU is the process's, encoding at the end and all, and with it the
number of streams that one core can record without end. Stall is how late a timer of 5 ms fires while recording; beside
it that of the same loop without recording, for a timer is late by up to 1 ms by itself and more on a shared machine,
and the part that is recording's own: no more than what the process's other threads computed since the last time.
Then processes that record are killed, repaired, and what they had been given is compared with what is there.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import soundfile

from streamsink import log
from streamsink.loop import SWITCH_INTERVAL

STREAMS = 300
PTIME = 0.02
FORMATS = ("wav", "flac", "opus")
INLINE = {"wav": ("WAV", "PCM_16", 8000), "flac": ("FLAC", "PCM_16", 8000), "opus": ("OGG", "OPUS", 8000)}


class Measured(NamedTuple):
    """One way of recording."""

    cpu: float
    """Seconds of CPU for a second of one stream."""
    stall_p999: float
    """Seconds."""
    stall_max: float
    own_p999: float
    """Of the stall, what the process's other threads account for."""
    own_max: float
    idle_p999: float
    """The stall of the loop that only hands over frames, in the same process."""
    idle_max: float


class Late(NamedTuple):
    """How late a timer was, each time, and what of it other threads of the process account for; seconds."""

    all: list[float]
    own: list[float]


async def _paced(streams: int, seconds: float, feed: Any) -> Late:
    """Call ``feed(stream, step)`` for each stream each 20 ms, spread evenly; returns how late the loop was."""
    loop = asyncio.get_running_loop()
    late = Late([], [])

    def others() -> float:
        return time.process_time() - time.thread_time()

    before = others()
    began = loop.time()
    due = began + 0.005
    timer: asyncio.TimerHandle

    def tick() -> None:
        nonlocal due, timer, before
        behind, now = max(0.0, loop.time() - due), others()
        late.all.append(behind)
        late.own.append(min(behind, now - before))
        before = now
        due += 0.005
        timer = loop.call_at(due, tick)

    timer = loop.call_at(due, tick)
    slots = 10
    for slot in range(round(seconds / PTIME) * slots):
        await asyncio.sleep(max(0.0, began + slot * PTIME / slots - loop.time()))
        for stream in range(slot % slots, streams, slots):
            feed(stream, slot // slots)
    timer.cancel()
    return late


def _samples() -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(1).normal(0, 1500, 8000)
    return noise.astype(np.int16)


async def _record(name: str, streams: int, seconds: float, folder: Path) -> Late:
    from datetime import UTC, datetime

    from streamsink.audio import Frame, Track
    from streamsink.codec import CodecSpec
    from streamsink.disk import DiskSpace
    from streamsink.processors.record import Record
    from streamsink.stem import reserve

    samples = _samples()
    processors = []
    for number in range(streams):
        stem = reserve(folder, datetime.now(UTC), f"s{number}")
        stream: Any = SimpleNamespace(
            sid=str(number),
            call_sid=None,
            account_sid=None,
            name=None,
            codec=CodecSpec.parse("PCMU"),
            tracks=(Track.INBOUND,),
            may_speak=False,
            recordings=folder,
            processors=["record"],
            stem=stem,
            custom_parameters={},
            started_at=datetime.now(UTC),
            close_code=1000,
            close_reason="",
            members=(),
            disk=DiskSpace(0),
        )
        processor = Record(format=name)  # type: ignore[arg-type]
        await processor.on_start(stream)
        processors.append(processor)

    def feed(stream: int, step: int) -> None:
        at = step * 160 % 7840
        piece = samples[at : at + 160].copy()
        processors[stream].on_frame(Frame(piece, 8000, Track.INBOUND, step * 160, 0, step))

    late = await _paced(streams, seconds, feed)
    await asyncio.gather(*(processor.on_stop("stop") for processor in processors))
    return late


async def _inline(name: str, streams: int, seconds: float, folder: Path) -> Late:
    container, subtype, rate = INLINE[name]
    samples = _samples()
    files = [
        soundfile.SoundFile(folder / f"{number}.x", "w", rate, 1, subtype, format=container)
        for number in range(streams)
    ]

    def feed(stream: int, step: int) -> None:
        at = step * 160 % 7840
        files[stream].write(samples[at : at + 160])

    late = await _paced(streams, seconds, feed)
    for file in files:
        file.close()
    return late


def measure(way: str, name: str, streams: int, seconds: float) -> Measured:
    """Record in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_recording", way, name, str(streams), str(seconds)],
        check=True,
        capture_output=True,
        text=True,
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _child(way: str, name: str, streams: int, seconds: float) -> None:
    log.configure("text", "error")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # As `serve` does.
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL)
    samples = _samples()
    idle = asyncio.run(_paced(streams, min(seconds, 6.0), lambda stream, step: samples[:160].copy())).all
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        run_one = _record if way == "record" else _inline
        late = asyncio.run(run_one(name, streams, seconds, Path(folder)))
        while list(Path(folder).glob("*.part")):
            # Encoding goes on.
            time.sleep(0.05)
        cpu = (time.process_time() - before) / (streams * seconds)
    stalls = [value for series in (*late, idle) for value in (float(np.percentile(series, 99.9)), max(series))]
    measured = Measured(cpu, *stalls)
    print(json.dumps(measured._asdict()))


def kills(count: int) -> tuple[int, int]:
    """Kill so many recording processes; returns the files and the most bytes that one of them lacks."""
    from streamsink.processors.repair import JUST_MADE, repair

    rng = random.Random(1)
    worst, files = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "tests.recording_child", str(folder), str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for pid in process.stdout.readline().split():
                time.sleep(rng.uniform(0.05, 0.3))
                os.kill(int(pid), signal.SIGKILL)
        for child in range(count):
            fed = np.fromfile(folder / f"fed-{child}", np.int64)
            list(repair(folder / str(child), lambda: time.time() + 2 * JUST_MADE))
            for stream, given in enumerate(fed):
                for path in (folder / str(child)).glob(f"*_{stream}.*"):
                    if path.suffix != ".json":
                        files += 1
                        worst = max(worst, 2 * (int(given) - soundfile.info(path).frames))
    return files, worst


def run(out: Path, quick: bool = False) -> str:
    """Measure; returns Markdown.

    Args:
        out: Not used: there is no plot.
        quick: Fewer streams, for a shorter time.
    """
    log.configure("text", "error")
    streams, seconds = (30, 1.0) if quick else (STREAMS, 20.0)
    lines = [
        "| | format | CPU a stream, ms a second | streams a core | stall p99.9 / worst, ms | recording's own | idle |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in FORMATS:
        for way, words in (("record", "`record`"), ("inline", "soundfile on the loop")):
            m = measure(way, name, streams, seconds)
            lines.append(
                f"| {words} | {name} | {m.cpu * 1000:.2f} | {1 / m.cpu:.0f} "
                f"| {m.stall_p999 * 1000:.2f} / {m.stall_max * 1000:.2f} "
                f"| {m.own_p999 * 1000:.2f} / {m.own_max * 1000:.2f} "
                f"| {m.idle_p999 * 1000:.2f} / {m.idle_max * 1000:.2f} |"
            )
    files, worst = kills(4 if quick else 20)
    killed = f"{files} files of killed processes: {worst} bytes of one lost at most ({worst / 16000:.2f} s)"
    table = "\n".join(lines)
    head = f"{streams} streams for {seconds:g} s, on one core"
    return f"## Recording\n\n{textwrap.dedent(__doc__).strip()}\n\n{head}:\n\n{table}\n\n{killed}\n"


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
