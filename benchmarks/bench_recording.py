"""What recording costs: streams in one process at 50 frames a second each, by `record`, and inline on the loop.

For each format streams are recorded for a while, PCMU frames of 20 ms handed over by the event loop, while calls end
and others begin, each on average a minute long; beside them the same with soundfile writing each frame on the loop. CPU
is the process's and that of those it has started, encoding and all: with it goes the number of streams that one core
can record without end.

Stall is how long the event loop, the one the endpoint runs on, takes to come to what has happened: another process
writes the time to a pipe, at random moments about 2 ms apart, and the loop tells how old it is when it reads it. Beside
it that of the same loop, in the same process, just before, while it hands over frames that nobody records: what the
machine and handing over cost. All on one core, and whoever writes the time on another.

Then processes that record are killed, repaired, and what they had been given is compared with what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import soundfile

from benchmarks.load import cpu_seconds
from streamsink import log
from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec, Resampler
from streamsink.delivery import Delivery
from streamsink.disk import DiskSpace
from streamsink.loop import SWITCH_INTERVAL, new_event_loop
from streamsink.processors.record import Record
from streamsink.processors.repair import JUST_MADE, repair
from streamsink.stem import reserve

STREAMS = 300
PTIME = 0.02
CALL = 60.0
"""Seconds after which, on average, one call has taken another's place."""
FORMATS = ("wav", "flac", "opus")
INLINE = {"wav": ("WAV", "PCM_16", 8000), "flac": ("FLAC", "PCM_16", 8000), "opus": ("OGG", "OPUS", 48_000)}
IDLE = 6.0
"""Seconds for which the loop without recording is measured."""
_BUCKET = "bench"
_WARM = 0.5
"""Seconds before what is measured."""
_TIME = struct.Struct("<d")


class Measured(NamedTuple):
    """One way of recording."""

    cpu: float
    """Seconds of CPU for a second of one stream."""
    stall_p999: float
    """Seconds."""
    stall_max: float
    idle_p999: float
    """The stall of the loop that only hands over frames, in the same process."""
    idle_max: float
    recorded: int
    """Files that were made, in which all is that was to be."""


class _Way(ABC):
    """Records streams somehow."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder

    @abstractmethod
    async def begin(self, number: int) -> Any:
        """A stream begins; returns what stands for it."""

    @abstractmethod
    def frame(self, stream: Any, samples: Samples, step: int) -> None:
        """20 ms of it have come."""

    @abstractmethod
    async def end(self, stream: Any) -> None:
        """It ends."""

    def rest(self) -> float:
        """Wait until all is done that need not be done by then; returns the CPU seconds of other processes."""
        return 0.0

    @abstractmethod
    def whole(self) -> int:
        """How many files are as they should be."""


class _Stream(SimpleNamespace):
    """What `record` sees of a stream."""

    @property
    def stem(self) -> str:
        return reserve(self.recordings, self.started_at, self.sid)


class _Recorded(_Way):
    """By `record`, as the endpoint does."""

    options: Mapping[str, Any] = {}

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.delivery = Delivery(folder, lambda: "")

    async def begin(self, number: int) -> Record:
        processor = Record(format=self.name, **self.options)  # type: ignore[arg-type]
        stream: Any = _Stream(
            sid=str(number),
            call_sid=None,
            account_sid=None,
            name=None,
            codec=CodecSpec.parse("PCMU"),
            tracks=(Track.INBOUND,),
            may_speak=False,
            recordings=self.folder,
            processors=["record"],
            custom_parameters={},
            started_at=datetime.now(UTC),
            close_code=1000,
            close_reason="",
            members=(),
            disk=DiskSpace(0),
            delivery=self.delivery,
        )
        await processor.on_start(stream)
        return processor

    def frame(self, stream: Record, samples: Samples, step: int) -> None:
        stream.on_frame(Frame(samples, 8000, Track.INBOUND, step * 160, 0, step))

    async def end(self, stream: Record) -> None:
        await stream.on_stop("stop")

    def rest(self) -> float:
        while list(self.folder.glob("*.part")):
            # Encoding goes on.
            time.sleep(0.05)
        return sum(cpu_seconds(int(pid)) for pid in _children())

    def whole(self) -> int:
        sidecars = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        return sum(sidecar["complete"] and sidecar["format"] == self.name for sidecar in sidecars)


class _Uploaded(_Recorded):
    """The same, and each file is uploaded to S3 while others are recorded."""

    options: Mapping[str, Any] = {"upload": f"s3://{_BUCKET}/calls"}

    def rest(self) -> float:
        while list(self.folder.glob(".delivery/*.json")):
            time.sleep(0.05)
        cpu = super().rest()
        self.delivery.close(10)
        return cpu


class _Inline(_Way):
    """By soundfile, on the event loop."""

    async def begin(self, number: int) -> tuple[soundfile.SoundFile, Resampler | None]:
        container, subtype, rate = INLINE[self.name]
        file = soundfile.SoundFile(self.folder / f"{number}.x", "w", rate, 1, subtype, format=container)
        return file, None if rate == 8000 else Resampler(8000, rate)

    def frame(self, stream: tuple[soundfile.SoundFile, Resampler | None], samples: Samples, step: int) -> None:
        file, resampler = stream
        file.write(samples if resampler is None else resampler.push(samples))

    async def end(self, stream: tuple[soundfile.SoundFile, Resampler | None]) -> None:
        stream[0].close()

    def whole(self) -> int:
        return sum(soundfile.info(path).frames > 0 for path in self.folder.iterdir())


WAYS: dict[str, type[_Way]] = {"record": _Recorded, "upload": _Uploaded, "inline": _Inline}


def _children() -> list[str]:
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


@contextlib.contextmanager
def _listening(stalls: list[float]) -> Iterator[None]:
    """Have the running loop read the times that come over standard input, and note how old they are."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        now = time.monotonic()
        stalls.extend(now - told for (told,) in _TIME.iter_unpack(os.read(0, 4096)))

    loop.add_reader(0, read)
    try:
        yield
    finally:
        loop.remove_reader(0)


def _tell() -> None:
    """Write the time again and again, until nobody reads it."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng = random.Random(1)
    due = time.monotonic()
    with contextlib.suppress(BrokenPipeError):
        while True:
            due = max(due + rng.uniform(0.001, 0.003), time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            os.write(1, _TIME.pack(time.monotonic()))


async def _paced(streams: int, seconds: float, feed: Callable[[int, int], object]) -> list[float]:
    """Call ``feed(stream, step)`` for each stream each 20 ms, spread evenly; returns how late the loop was."""
    loop = asyncio.get_running_loop()
    stalls: list[float] = []
    with _listening(stalls):
        slots = 10
        began = loop.time()
        for slot in range(round((_WARM + seconds) / PTIME) * slots):
            await asyncio.sleep(max(0.0, began + slot * PTIME / slots - loop.time()))
            if slot == round(_WARM / PTIME) * slots:
                stalls.clear()
            for stream in range(slot % slots, streams, slots):
                feed(stream, slot // slots)
    return stalls


def _samples() -> Samples:
    noise = np.random.default_rng(1).normal(0, 1500, 8000)
    return noise.astype(np.int16)


async def _calls(way: _Way, streams: int, seconds: float) -> list[float]:
    """Record so many calls at any time; returns how late the loop was meanwhile."""
    samples = _samples()
    live = [await way.begin(number) for number in range(streams)]
    steps = [0] * streams
    renewing: set[asyncio.Future[None]] = set()
    begun = streams

    async def renew(number: int) -> None:
        nonlocal begun
        begun += 1
        before, live[number], steps[number] = live[number], await way.begin(begun), 0
        await way.end(before)

    def feed(stream: int, step: int) -> None:
        at = steps[stream] * 160 % 7840
        way.frame(live[stream], samples[at : at + 160].copy(), steps[stream])
        steps[stream] += 1
        if (step + stream * CALL / PTIME / streams) % (CALL / PTIME) < 1:
            # Tasks that nobody holds may be collected.
            future = asyncio.ensure_future(renew(stream))
            renewing.add(future)
            future.add_done_callback(renewing.discard)

    stalls = await _paced(streams, seconds, feed)
    await asyncio.gather(*renewing)
    await asyncio.gather(*(way.end(stream) for stream in live))
    return stalls


def measure(way: str, name: str, streams: int, seconds: float) -> Measured:
    """Record in a process of its own, on one core, while another tells it the time."""
    command = [sys.executable, "-m", "benchmarks.bench_recording"]
    store: AbstractContextManager[dict[str, str]] = contextlib.nullcontext({})
    if way == "upload":
        store = _store()
    with store as environment, subprocess.Popen([*command, "tell"], stdout=subprocess.PIPE) as telling:
        try:
            done = subprocess.run(
                [*command, way, name, str(streams), str(seconds)],
                check=True,
                env={**os.environ, **environment},
                stdin=telling.stdout,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            telling.kill()
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def _store() -> Iterator[dict[str, str]]:
    """An S3-compatible server with a bucket, in a process on the other core; gives the environment that names it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cores = os.sched_getaffinity(0)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        os.sched_setaffinity(server.pid, {max(cores)})
        try:
            while True:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                try:
                    connection.request("PUT", f"/{_BUCKET}")
                    assert connection.getresponse().status == 200
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
                finally:
                    connection.close()
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "eu-west-1",
            }
        finally:
            server.kill()


def _on_the_endpoint_s_loop(work: Awaitable[list[float]]) -> list[float]:
    async def run() -> list[float]:
        return await work

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


def _child(way: str, name: str, streams: int, seconds: float) -> None:
    log.configure("text", "error")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # As `serve` does.
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL)
    samples = _samples()
    # Until somebody tells the time.
    os.read(0, 4096)
    idle = _on_the_endpoint_s_loop(_paced(streams, min(seconds, IDLE), lambda stream, step: samples[:160].copy()))
    with tempfile.TemporaryDirectory() as folder:
        recording = WAYS[way](name, Path(folder))
        before = time.process_time()
        stalls = _on_the_endpoint_s_loop(_calls(recording, streams, seconds))
        others = recording.rest()
        cpu = (time.process_time() - before + others) / (streams * (_WARM + seconds))
        figures = [value for late in (stalls, idle) for value in (float(np.percentile(late, 99.9)), max(late))]
        print(json.dumps([cpu, *figures, recording.whole()]))


def kills(count: int) -> tuple[int, int]:
    """Kill so many recording processes; returns the files and the most bytes that one of them lacks."""
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
        "| | format | CPU a stream, ms a second | streams a core | stall p99.9 / worst, ms | by itself | files |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in FORMATS:
        ways = {"record": "`record`", "inline": "soundfile on the loop"}
        if name == "wav":
            ways["upload"] = "`record`, each file uploaded to S3"
        for way, words in ways.items():
            m = measure(way, name, streams, seconds)
            lines.append(
                f"| {words} | {name} | {m.cpu * 1000:.2f} | {1 / m.cpu:.0f} "
                f"| {m.stall_p999 * 1000:.2f} / {m.stall_max * 1000:.2f} "
                f"| {m.idle_p999 * 1000:.2f} / {m.idle_max * 1000:.2f} | {m.recorded} |"
            )
    files, worst = kills(4 if quick else 20)
    killed = f"{files} files of killed processes: {worst} bytes of one lost at most ({worst / 16000:.2f} s)"
    table = "\n".join(lines)
    head = f"{streams} streams for {seconds:g} s, on one core"
    return f"## Recording\n\n{textwrap.dedent(__doc__).strip()}\n\n{head}:\n\n{table}\n\n{killed}\n"


if __name__ == "__main__":
    if sys.argv[1] == "tell":
        _tell()
    else:
        _child(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
