from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile

from streamsink import disk
from streamsink.audio import Samples, Track
from streamsink.processor import Chain
from streamsink.processors import record, recording, writer
from streamsink.processors import sidecar as sidecars
from streamsink.processors.record import Record
from streamsink.processors.segment import Segment
from streamsink.processors.sidecar import Gap, Sidecar
from streamsink.processors.wav import WavPart
from streamsink.stream import Stream
from tests.streams import Counts, counting, frame, make_stream

STEM = "20261120T204218Z_front_desk"
BOTH = (Track.INBOUND, Track.OUTBOUND)


SIDECAR: dict[str, Any] = {
    "stream_sid": "7d56",
    "call_sid": None,
    "account_sid": None,
    "name": None,
    "codec": "PCMU",
    "sample_rate": 8000,
    "started_at": "2026-11-20T20:42:18Z",
    "duration_seconds": 0.0,
    "custom_parameters": {},
    "gaps": [],
    "sha256": None,
    "processors": ["record"],
    "close_code": None,
    "close_reason": "",
    "complete": False,
}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(50):
        # A file grows without telling anybody.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def read(path: Path) -> Samples:
    samples: Samples = soundfile.read(path, dtype="int16")[0]
    return samples


def sidecar(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def frames_in(part: Path) -> int:
    """As the header has it: libsndfile would read on behind one that says 0."""
    if not part.exists() or part.stat().st_size < 44:
        return -1
    with wave.open(str(part)) as file:
        return int(file.getnframes())


def continued(directory: Path) -> list[Path]:
    return sorted(directory.glob("*~*.wav")) or sorted(directory.glob("*~*.part"))


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def started(stream: Stream, **options: Any) -> Record:
    processor = Record(**options)
    await processor.on_start(stream)
    return processor


async def ended(stream: Stream, processor: Record, code: int = 1000, reason: str = "stop") -> None:
    stream.close_code, stream.close_reason = code, reason
    await processor.on_stop("stop")


async def test_a_stream_becomes_a_wav_file_and_a_sidecar_that_tells_the_truth(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, custom_parameters={"customer": "42", "tags": ["a", 1.5, None]})
    processor = await started(stream)
    for start in range(0, 16_000, 160):
        processor.on_frame(frame(counting(start, 160), start))
    await ended(stream, processor)

    assert names(tmp_path) == [f"{STEM}.json", f"{STEM}.wav"]
    wav = tmp_path / f"{STEM}.wav"
    assert read(wav).tolist() == counting(0, 16_000).tolist()
    with wave.open(str(wav)) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 16_000)
    assert list(sidecar(tmp_path / f"{STEM}.json").items()) == [
        ("stream_sid", "7d56"),
        ("call_sid", "76ac"),
        ("account_sid", "b08d"),
        ("name", "front desk"),
        ("codec", "PCMU@8000h@20i"),
        ("sample_rate", 8000),
        ("started_at", "2026-11-20T20:42:18.250000Z"),
        ("duration_seconds", 2.0),
        ("custom_parameters", {"customer": "42", "tags": ["a", 1.5, None]}),
        ("gaps", []),
        ("sha256", hashlib.sha256(wav.read_bytes()).hexdigest()),
        ("processors", ["record"]),
        ("close_code", 1000),
        ("close_reason", "stop"),
        ("complete", True),
        ("format", "wav"),
        (
            "files",
            [{"name": wav.name, "channels": [["inbound"]], "sha256": hashlib.sha256(wav.read_bytes()).hexdigest()}],
        ),
        ("segment", 1),
        ("start_seconds", 0.0),
        ("missing_seconds", 0.0),
        ("pauses", []),
        ("trim", False),
        ("trimmed", None),
        ("error", None),
        ("continues", False),
        ("members", []),
    ]
    assert modes(tmp_path) == {0o600}


async def test_the_header_is_byte_for_byte_what_libsndfile_writes(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=BOTH, codec="L16@24000h")
    processor = await started(stream)
    processor.on_frame(frame(counting(1, 480), sample_rate=24000))
    await ended(stream, processor)
    ours = tmp_path / f"{STEM}.wav"
    theirs = tmp_path / "theirs.wav"
    soundfile.write(theirs, soundfile.read(ours, dtype="int16")[0], 24000, "PCM_16")
    assert ours.read_bytes() == theirs.read_bytes()


# Frames as (track, start, samples, lost) and the gaps they make, in samples at 8 kHz.
IN, OUT = Track.INBOUND, Track.OUTBOUND
GAPS: dict[str, tuple[list[tuple[Track, int, int, int]], list[tuple[str, float, float]]]] = {
    "none": ([(IN, 0, 160, 0), (IN, 160, 160, 0)], []),
    "one frame": ([(IN, 0, 160, 0), (IN, 320, 160, 160)], [("inbound", 0.02, 0.02)]),
    "several": (
        [(IN, 0, 160, 0), (IN, 320, 160, 160), (IN, 480, 160, 0), (IN, 8000, 160, 7360)],
        [("inbound", 0.02, 0.02), ("inbound", 0.08, 0.92)],
    ),
    "a minute": ([(IN, 0, 160, 0), (IN, 480_000, 160, 479_840)], [("inbound", 0.02, 59.98)]),
    "a late start is none": ([(IN, 4000, 160, 0)], []),
    "a late second track is none": ([(IN, 0, 160, 0), (OUT, 160, 160, 0)], []),
    "each track has its own": (
        [(IN, 0, 160, 0), (OUT, 0, 160, 0), (OUT, 320, 160, 160), (IN, 800, 160, 640)],
        [("outbound", 0.02, 0.02), ("inbound", 0.02, 0.08)],
    ),
    "frames of odd lengths": (
        [(IN, 0, 1, 0), (IN, 1, 319, 0), (IN, 480, 80, 160)],
        [("inbound", 0.04, 0.02)],
    ),
}


@pytest.mark.parametrize("case", GAPS)
async def test_losses_and_late_starts_are_silence_of_the_right_length(case: str, tmp_path: Path) -> None:
    frames, gaps = GAPS[case]
    stream = make_stream(tmp_path, tracks=BOTH)
    processor = await started(stream)
    end = max(start + n for _, start, n, _ in frames)
    wanted = np.zeros((end, 2), np.int16)
    for track, start, n, lost in frames:
        samples = counting(start + 1, n)
        processor.on_frame(frame(samples, start, track=track, lost=lost))
        wanted[start : start + n, 0 if track is IN else 1] = samples
    await ended(stream, processor)
    assert np.array_equal(read(tmp_path / f"{STEM}.wav"), wanted)
    told = sidecar(tmp_path / f"{STEM}.json")
    assert told["gaps"] == [{"track": t, "start_seconds": s, "seconds": n} for t, s, n in gaps]
    assert told["duration_seconds"] == end / 8000
    assert told["complete"] is True


@pytest.mark.parametrize(
    ("tracks", "channels"), [((IN,), 1), ((OUT,), 1), (BOTH, 2), ((OUT, IN), 2), ((Track.MIX,), 1)]
)
async def test_the_tracks_settle_the_channels(tracks: tuple[Track, ...], channels: int, tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=tracks)
    processor = await started(stream)
    for number, track in enumerate(sorted(tracks, key=list(Track).index)):
        processor.on_frame(frame(np.full(160, number + 1, np.int16), track=track))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").reshape(160, -1).tolist() == [list(range(1, channels + 1))] * 160


async def test_stereo_stays_aligned_when_one_track_runs_ahead_and_the_other_comes_late(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, tracks=BOTH)
    processor = await started(stream)
    wav = tmp_path / f"{STEM}.wav.part"
    rng = np.random.default_rng(7)
    left, right = rng.integers(-32768, 32768, (2, 80_000), np.int16)
    # Ten seconds of one are on disk before the first of the other comes.
    for start in range(0, 80_000, 160):
        processor.on_frame(frame(left[start : start + 160], start))
    await until(lambda: wav.stat().st_size == 44 + 80_000 * 4)
    for start in range(0, 80_000, 320):
        processor.on_frame(frame(right[start : start + 320], start, track=Track.OUTBOUND))
    await ended(stream, processor)
    assert np.array_equal(read(tmp_path / f"{STEM}.wav"), np.stack([left, right], axis=1))


async def test_a_stream_without_audio_has_an_empty_wav_and_a_sidecar(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, name=None, sid="../7d56", codec="G722")
    processor = await started(stream)
    await ended(stream, processor, 1008, "no media")
    stem = "20261120T204218Z__7d56"
    info = soundfile.info(tmp_path / f"{stem}.wav")
    assert (info.frames, info.samplerate, info.channels) == (0, 16000, 1)
    told = sidecar(tmp_path / f"{stem}.json")
    assert (told["duration_seconds"], told["close_code"], told["close_reason"], told["complete"]) == (
        0.0,
        1008,
        "no media",
        True,
    )


async def test_a_live_file_is_private_locked_and_playable_up_to_the_last_flush(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    part = tmp_path / f"{STEM}.wav.part"
    assert names(tmp_path) == [f"{STEM}.json.part", f"{STEM}.wav.part"]
    assert modes(tmp_path) == {0o600}
    told = sidecar(tmp_path / f"{STEM}.json.part")
    assert (told["stream_sid"], told["sha256"], told["complete"]) == ("7d56", None, False)
    with part.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    processor.on_frame(frame(counting(0, 4000)))
    await until(lambda: frames_in(part) == 4000)
    assert read_part(part).tolist() == counting(0, 4000).tolist()
    await ended(stream, processor)


def read_part(path: Path) -> Samples:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


CRASH = """
import asyncio, sys
from pathlib import Path
from streamsink.audio import Track
from streamsink.processors.record import Record
from streamsink.processors.segment import Segment
from streamsink.processors.sidecar import Gap, Sidecar
from streamsink.processors.wav import WavPart
from tests.streams import counting, frame, make_stream

async def main():
    processor = Record()
    await processor.on_start(make_stream(Path(sys.argv[1]), tracks=(Track.INBOUND, Track.OUTBOUND)))
    for start in range(0, 16_000, 160):
        processor.on_frame(frame(counting(start, 160), start))
        processor.on_frame(frame(counting(start + 7, 160), start, track=Track.OUTBOUND))
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_process_leaves_a_file_that_plays(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CRASH, str(tmp_path))
    part = tmp_path / f"{STEM}.wav.part"
    try:
        await until(lambda: frames_in(part) == 16_000)
    finally:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
    assert names(tmp_path) == [f"{STEM}.json.part", f"{STEM}.wav.part"]
    assert read_part(part).reshape(-1, 2).tolist() == list(map(list, zip(range(16_000), range(7, 16_007), strict=True)))
    # Nobody holds the lock any more: whoever repairs may take it.
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert sidecar(tmp_path / f"{STEM}.json.part")["complete"] is False


async def test_a_thousand_recordings_at_once_share_a_few_threads(tmp_path: Path) -> None:
    streams = [make_stream(tmp_path, sid=f"s{i}", name=None) for i in range(1000)]
    # The first recording of the process starts them.
    first = await started(streams[0])
    threads = set(threading.enumerate())
    processors = [first, *await asyncio.gather(*map(started, streams[1:]))]
    for number, processor in enumerate(processors):
        for start in (0, 160, 480):
            processor.on_frame(frame(np.full(160, number, np.int16), start))
    assert set(threading.enumerate()) <= threads
    await asyncio.gather(*map(ended, streams, processors))
    assert set(threading.enumerate()) <= threads
    assert len(names(tmp_path)) == 2000
    for number in range(1000):
        samples = read(tmp_path / f"20261120T204218Z_s{number}.wav")
        assert samples.tolist() == [number] * 320 + [0] * 160 + [number] * 160


async def test_the_stem_is_reserved_off_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names_of_threads = []
    stem = vars(Stream)["stem"].fget

    def asked(stream: Stream) -> str:
        names_of_threads.append(threading.current_thread().name)
        return str(stem(stream))

    monkeypatch.setattr(Stream, "stem", property(asked))
    stream = make_stream(tmp_path)
    await ended(stream, await started(stream))
    assert names_of_threads == ["streamsink-record"]


async def test_threads_that_ask_for_the_stem_at_once_get_the_same(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    together = threading.Barrier(8, timeout=50)

    def ask() -> str:
        together.wait()
        return stream.stem

    with ThreadPoolExecutor(8) as pool:
        assert [asked.result() for asked in [pool.submit(ask) for _ in range(8)]] == [STEM] * 8
    assert names(tmp_path) == [f"{STEM}.json.part"]


async def test_the_rate_asked_for_is_the_files_rate(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    chain = Chain([("record", Record(sample_rate=16000)), ("record", Record())], Counts())
    chain.start(stream)
    for start in range(0, 8000, 160):
        chain.frame(frame(np.full(160, 1000, np.int16), start, lost=0))
    await chain.stop("stop")
    # The second recording of one stream makes a stem of its own.
    assert names(tmp_path) == [f"{STEM}.json", f"{STEM}.wav", f"{STEM}_2.json", f"{STEM}_2.wav"]
    rates = {}
    for stem in (STEM, f"{STEM}_2"):
        info = soundfile.info(tmp_path / f"{stem}.wav")
        rates[sidecar(tmp_path / f"{stem}.json")["sample_rate"]] = (info.samplerate, info.frames)
    assert rates == {16000: (16000, 16000), 8000: (8000, 8000)}


async def test_a_directory_of_its_own(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "default")
    processor = await started(stream, directory=tmp_path / "own")
    await ended(stream, processor)
    assert names(tmp_path) == ["own"]
    assert names(tmp_path / "own") == [f"{STEM}.json", f"{STEM}.wav"]
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700


async def test_a_track_nobody_announced_makes_the_recording_incomplete(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    processor.on_frame(frame(counting(0, 160)))
    processor.on_frame(frame(counting(0, 160), track=Track.OUTBOUND))
    processor.on_frame(frame(counting(160, 160), 160, track=Track.OUTBOUND))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == counting(0, 160).tolist()
    assert sidecar(tmp_path / f"{STEM}.json")["complete"] is False


# --- Disks that are slow ---------------------------------------------------------------------------------------------


class SlowDisk:
    """Every fsync of a file waits for as many more as there are finishing threads, that of a folder for ``renamed``."""

    def __init__(self) -> None:
        self.together = threading.Barrier(writer.FINISHERS, timeout=50)
        self.renamed = threading.Event()
        self.folders = 0
        self._fsync = os.fsync

    def fsync(self, fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            self.together.wait()
        else:
            self.folders += 1
            assert self.renamed.wait(50)
        self._fsync(fd)


async def test_recordings_are_finished_side_by_side_and_share_the_folders_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    # Only what ends a file asks for the disk.
    monkeypatch.setattr(recording, "SYNC_INTERVAL", 1e9)
    streams = [make_stream(tmp_path, sid=f"s{i}", name=None) for i in range(writer.FINISHERS)]
    processors = await asyncio.gather(*map(started, streams))
    ending = asyncio.gather(*map(ended, streams, processors))
    await until(lambda: len(list(tmp_path.glob("*.json"))) == writer.FINISHERS)
    disk.renamed.set()
    await ending
    assert {name.partition(".")[2] for name in names(tmp_path)} == {"json", "wav"}
    assert len(names(tmp_path)) == 2 * writer.FINISHERS
    # The first and the one that began after all had their names; more only where threads came late to ask.
    assert disk.folders < writer.FINISHERS


async def test_live_streams_go_on_to_disk_while_others_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: held(stuck))
    streams = [make_stream(tmp_path, sid=f"s{i}", name=None) for i in range(2 * writer.FINISHERS)]
    processors = await asyncio.gather(*map(started, streams))
    live = make_stream(tmp_path)
    processor = await started(live)
    ending = asyncio.gather(*map(ended, streams, processors))
    processor.on_frame(frame(counting(0, 4000)))
    await until(lambda: frames_in(tmp_path / f"{STEM}.wav.part") == 4000)
    assert not ending.done()
    # Nor does a new one wait.
    late = await started(make_stream(tmp_path, name="late"))
    stuck.set()
    await ending
    await ended(live, processor)
    await late.on_stop("stop")
    assert len(names(tmp_path)) == 2 * (2 * writer.FINISHERS + 2)


GIVEN_UP = """
import asyncio, os, sys, threading
from pathlib import Path
from streamsink.processors import record, recording, writer
from streamsink.processors import sidecar as sidecars
from streamsink.processors.record import Record
from tests.streams import counting, frame, make_stream

fsync = os.fsync
writer.STALLED = float(sys.argv[2])

def slow(fd):
    # The main thread ends first, then what it gave up on gets to the disk; or never.
    threading.main_thread().join()
    if writer.STALLED < 1:
        threading.Event().wait()
    fsync(fd)

os.fsync = slow

async def main():
    processors = [Record() for _ in range(20)]
    for number, processor in enumerate(processors):
        await processor.on_start(make_stream(Path(sys.argv[1]), sid=f"s{number}", name=None))
        processor.on_frame(frame(counting(number, 160)))
    ending = [asyncio.ensure_future(processor.on_stop("shutdown")) for processor in processors]
    done, pending = await asyncio.wait(ending, timeout=0.1)
    assert len(pending) == 20
    for task in pending:
        task.cancel()

asyncio.run(main())
"""


async def give_up(directory: Path, stalled: float) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", GIVEN_UP, str(directory), str(stalled)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    return await process.wait(), out.decode(), err.decode()


async def test_what_was_given_up_on_is_finished_before_the_process_exits(tmp_path: Path) -> None:
    status, out, err = await give_up(tmp_path, 20.0)
    assert (status, err) == (0, "")
    assert out.count("recorded") == 20
    assert names(tmp_path) == sorted(f"20261120T204218Z_s{n}.{ending}" for n in range(20) for ending in ("json", "wav"))
    for number in range(20):
        stem = f"20261120T204218Z_s{number}"
        assert read(tmp_path / f"{stem}.wav").tolist() == counting(number, 160).tolist()
        assert sidecar(tmp_path / f"{stem}.json")["complete"] is True


async def test_a_disk_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    status, out, err = await give_up(tmp_path, 0.1)
    assert (status, err) == (0, "")
    assert "the disk hangs" in out
    assert [name for name in names(tmp_path) if name.endswith(".wav.part")] == sorted(
        f"20261120T204218Z_s{n}.wav.part" for n in range(20)
    )


# --- Disks that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file of this process grows beyond a million bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield 1_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


@pytest.fixture
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RETRY", 0.0)


async def test_a_file_that_cannot_grow_ends_and_the_next_goes_on(
    tmp_path: Path, file_size_limit: int, retry_at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, before = Counts(), writer.failures.count
    streams = [make_stream(tmp_path, name=name) for name in ("long", "short")]
    chains = [Chain([("record", Record())], counts) for _ in streams]
    for chain, stream in zip(chains, streams, strict=True):
        chain.start(stream)
    long, short = chains
    for start in range(0, 600_000, 8000):
        long.frame(frame(counting(start, 8000), start))
    short.frame(frame(counting(0, 8000)))
    await until(lambda: (tmp_path / "20261120T204218Z_long.json").exists())
    long.frame(frame(counting(600_000, 8000), 600_000))
    short.frame(frame(counting(8000, 8000), 8000))
    await asyncio.gather(*(chain.stop("stop") for chain in chains))

    assert counts.errors == []
    assert writer.failures.count == before + 1
    assert capsys.readouterr().out.count("recording stopped") == 1
    assert names(tmp_path) == [
        f"20261120T204218Z_{n}.{ending}" for n in ("long", "long~002", "short") for ending in ("json", "wav")
    ]
    assert read(tmp_path / "20261120T204218Z_short.wav").tolist() == counting(0, 16_000).tolist()
    assert sidecar(tmp_path / "20261120T204218Z_short.json")["complete"] is True
    # What did fit is there, the header tells the truth about it, and so does the sidecar.
    samples = read(tmp_path / "20261120T204218Z_long.wav")
    assert len(samples) == (file_size_limit - 44) // 2
    assert samples.tolist() == counting(0, len(samples)).tolist()
    told = sidecar(tmp_path / "20261120T204218Z_long.json")
    assert (told["complete"], told["error"]) == (False, "File too large")
    assert told["duration_seconds"] == len(samples) / 8000
    # The next file tells where it goes on, and what is in none.
    assert read(tmp_path / "20261120T204218Z_long~002.wav").tolist() == counting(600_000, 8000).tolist()
    told = sidecar(tmp_path / "20261120T204218Z_long~002.json")
    assert (told["segment"], told["start_seconds"], told["error"]) == (2, 75.0, None)
    assert (told["missing_seconds"], told["complete"]) == ((600_000 - len(samples)) / 8000, False)


async def test_a_full_disk_ends_the_file_and_one_with_room_again_gets_the_next(
    tiny_disk: Path, retry_at_once: None
) -> None:
    counts = Counts()
    chain = Chain([("record", Record())], counts)
    chain.start(make_stream(tiny_disk))
    part = tiny_disk / f"{STEM}.wav.part"
    (tiny_disk / "filler").write_bytes(bytes(900 * 1024))
    chain.frame(frame(counting(0, 8000)))
    await until(lambda: frames_in(part) == 8000)
    chain.frame(frame(counting(8000, 80_000), 8000))
    await until(lambda: (tiny_disk / f"{STEM}.json").exists())
    samples = read(tiny_disk / f"{STEM}.wav")
    assert len(samples) > 8000
    assert samples.tolist() == counting(0, len(samples)).tolist()
    told = sidecar(tiny_disk / f"{STEM}.json")
    wav = (tiny_disk / f"{STEM}.wav").read_bytes()
    assert (told["complete"], told["sha256"]) == (False, hashlib.sha256(wav).hexdigest())
    assert told["error"] == "No space left on device"
    # The call goes on, and the recording fails again.
    chain.frame(frame(counting(88_000, 8000), 88_000))
    (tiny_disk / "filler").unlink()
    for start in range(96_000, 480_000, 8000):
        chain.frame(frame(counting(start, 8000), start))
        if continued(tiny_disk):
            break
        await asyncio.sleep(0.05)
    await chain.stop("stop")
    assert counts.errors == []
    (after,) = continued(tiny_disk)
    told = sidecar(after.with_name(f"{after.stem}.json"))
    start = round(told["start_seconds"] * 8000)
    assert read(after)[:8000].tolist() == counting(start, 8000).tolist()
    assert told["missing_seconds"] == (start - len(samples)) / 8000


async def test_a_disk_that_is_full_from_the_start_leaves_nothing_until_it_has_room(
    tiny_disk: Path, retry_at_once: None
) -> None:
    (tiny_disk / "filler").write_bytes(bytes(1024 * 1024))
    stream = make_stream(tiny_disk)
    processor = await started(stream)
    processor.on_frame(frame(counting(0, 160)))
    await until(lambda: not processor._pending)
    await writer.writer.run(lambda: None)
    assert names(tiny_disk) == [f"{STEM}.json.part", "filler"]
    (tiny_disk / "filler").unlink()
    processor.on_frame(frame(counting(160, 160), 160))
    await ended(stream, processor)
    assert read(tiny_disk / f"{STEM}.wav").tolist() == counting(160, 160).tolist()
    told = sidecar(tiny_disk / f"{STEM}.json")
    assert (told["segment"], told["missing_seconds"], told["complete"]) == (1, 0.02, False)


async def test_a_sidecar_that_cannot_be_written_leaves_nothing_but_a_stem_that_others_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ended(stream := make_stream(tmp_path / "first"), await started(stream))
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("msgspec.json.format", unwritable)
    for sid, processors in (("alone", ("record",)), ("shared", ("record", "notes"))):
        stream = make_stream(tmp_path / "full", name=None, sid=sid, processors=processors)
        await ended(stream, await started(stream))
    stream = make_stream(tmp_path, processors=("record", "notes"))
    await ended(stream, await started(stream, directory=tmp_path / "full"))
    assert names(tmp_path / "full") == ["20261120T204218Z_shared.json.part"]
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def unwritable(text: bytes, *, indent: int) -> bytes:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_failure_at_the_very_end_is_told(tmp_path: Path, file_size_limit: int) -> None:
    stream = make_stream(tmp_path)
    processor = await started(stream)
    processor.on_frame(frame(counting(0, file_size_limit)))
    await ended(stream, processor)
    told = sidecar(tmp_path / f"{STEM}.json")
    assert (told["complete"], told["error"]) == (False, "File too large")


async def test_a_folder_that_is_a_file_is_told_and_the_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for options in ({}, {"directory": tmp_path / "file"}):
        stream = make_stream(tmp_path / "file")
        processor = await started(stream, **options)
        processor.on_frame(frame(counting(0, 160)))
        await ended(stream, processor)
    assert capsys.readouterr().out.count("recording stopped") == 2
    assert (tmp_path / "file").read_bytes() == b"mine"


async def test_a_folder_that_vanishes_fails_this_recording_alone(tmp_path: Path) -> None:
    here, gone = make_stream(tmp_path / "here"), make_stream(tmp_path / "gone")
    fine, lost = await started(here), await started(gone)
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()
    lost.on_frame(frame(counting(0, 160)))
    before = writer.failures.count
    await ended(gone, lost)
    assert writer.failures.count > before
    fine.on_frame(frame(counting(0, 160)))
    await ended(here, fine)
    assert read(tmp_path / "here" / f"{STEM}.wav").tolist() == counting(0, 160).tolist()


def held(stuck: threading.Event) -> None:
    assert stuck.wait(50)


async def hold(stuck: threading.Event) -> asyncio.Future[None]:
    """Keep the thread that writes from writing; from now on, until the event."""
    begun = threading.Event()

    def job() -> None:
        begun.set()
        held(stuck)

    waiting = writer.writer.run(job)
    await until(begun.is_set)
    return waiting


async def test_what_a_disk_does_not_keep_up_with_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_PENDING", 10)
    stream = make_stream(tmp_path)
    processor = await started(stream)
    stuck = threading.Event()
    waiting = await hold(stuck)
    for start in range(0, 2000, 160):
        processor.on_frame(frame(counting(start, 160), start))
    stuck.set()
    await waiting
    await until(lambda: not processor._pending)
    processor.on_frame(frame(counting(2080, 160), 2080))
    await ended(stream, processor)
    wanted = counting(0, 2240)
    wanted[1600:2080] = 0
    assert read(tmp_path / f"{STEM}.wav").tolist() == wanted.tolist()
    told = sidecar(tmp_path / f"{STEM}.json")
    assert told["gaps"] == [{"track": "inbound", "start_seconds": 0.2, "seconds": 0.06}]
    assert told["complete"] is False


async def test_what_the_far_end_heard_is_a_gap_too_where_the_disk_does_not_keep_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MOST_PENDING", 10)
    stream = make_stream(tmp_path, may_speak=True)
    processor = await started(stream)
    stuck = threading.Event()
    waiting = await hold(stuck)
    processor.on_frame(frame(counting(0, 2240)))
    for start in range(0, 2080, 160):
        processor.on_played(frame(counting(start + 1, 160), start, track=Track.OUTBOUND))
    stuck.set()
    await waiting
    await until(lambda: not processor._heard)
    processor.on_played(frame(counting(2081, 160), 2080, track=Track.OUTBOUND))
    await ended(stream, processor)
    wanted = counting(1, 2240)
    wanted[1600:2080] = 0
    assert read(tmp_path / f"{STEM}.wav")[:, 1].tolist() == wanted.tolist()
    told = sidecar(tmp_path / f"{STEM}.json")
    assert told["gaps"] == [{"track": "played", "start_seconds": 0.2, "seconds": 0.06}]
    assert (told["complete"], told["error"]) == (False, "the disk did not keep up")


async def test_a_disk_that_hangs_at_the_start_costs_nothing_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "START_WAITS", 0.0)
    stuck = threading.Event()
    waiting = writer.writer.run(lambda: held(stuck))
    stream = make_stream(tmp_path)
    processor = await started(stream)
    processor.on_frame(frame(counting(0, 8000)))
    assert names(tmp_path) == []
    assert "the disk is slow" in capsys.readouterr().out
    stuck.set()
    await waiting
    processor.on_frame(frame(counting(8000, 160), 8000))
    await ended(stream, processor)
    assert read(tmp_path / f"{STEM}.wav").tolist() == counting(0, 8160).tolist()
    assert sidecar(tmp_path / f"{STEM}.json")["complete"] is True


async def test_what_a_disk_has_lost_ends_the_file_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry_at_once: None
) -> None:
    """The kernel tells of it once, by whichever fsync comes first."""
    monkeypatch.setattr(recording, "SYNC_INTERVAL", 0.0)
    monkeypatch.setattr(writer, "FLUSH_INTERVAL", 0.01)
    failing = [OSError(errno.EIO, "Input/output error")]
    fdatasync = os.fdatasync

    def lossy(fd: int) -> None:
        # What it loses has to be there.
        if failing and os.fstat(fd).st_size > 44:
            raise failing.pop()
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", lossy)
    before = writer.failures.count
    stream = make_stream(tmp_path)
    processor = await started(stream)
    processor.on_frame(frame(counting(0, 8000)))
    await until(lambda: (tmp_path / f"{STEM}.json").exists())
    processor.on_frame(frame(counting(8000, 8000), 8000))
    await ended(stream, processor)
    told = sidecar(tmp_path / f"{STEM}.json")
    assert (told["complete"], told["error"]) == (False, "Input/output error")
    assert writer.failures.count == before + 1
    (after,) = continued(tmp_path)
    assert read(after).tolist() == counting(8000, 8000).tolist()


async def test_what_a_disk_has_lost_at_the_very_end_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = recording.Recording._prepare

    def lost_meanwhile(self: recording.Recording, segment: Segment) -> None:
        prepare(self, segment)
        segment.lost = OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(recording.Recording, "_prepare", lost_meanwhile)
    stream = make_stream(tmp_path)
    processor = await started(stream)
    processor.on_frame(frame(counting(0, 160)))
    await ended(stream, processor)
    told = sidecar(tmp_path / f"{STEM}.json")
    assert (told["complete"], told["error"]) == (False, "Input/output error")


async def test_a_long_sidecar_survives_a_full_disk(tiny_disk: Path, retry_at_once: None) -> None:
    stream = make_stream(tiny_disk)
    processor = await started(stream)
    for number in range(300):
        processor.on_frame(frame(counting(0, 160), 160 + number * 320, lost=160))
    await until(lambda: not processor._pending)
    await writer.writer.run(lambda: None)
    fill(tiny_disk)
    processor.on_frame(frame(counting(0, 160_000), 96_000))
    await until(lambda: (tiny_disk / f"{STEM}.json").exists())
    await ended(stream, processor)
    told = sidecar(tiny_disk / f"{STEM}.json")
    assert (told["stream_sid"], len(told["gaps"]), told["error"]) == ("7d56", 300, "No space left on device")


def test_a_sidecar_that_finds_no_room_is_left_as_it_was(tiny_disk: Path) -> None:
    path = tiny_disk / f"{STEM}.json.part"
    told = msgspec.convert(SIDECAR, Sidecar)
    sidecars.write(path, told)
    fill(tiny_disk)
    with pytest.raises(OSError, match="No space left"):
        sidecars.write(path, msgspec.structs.replace(told, stream_sid="other", gaps=[Gap("inbound", 1, 2)] * 500))
    assert sidecars.read(path) == told
    # What fits is taken, and a final one too.
    sidecars.write(path, msgspec.structs.replace(told, stream_sid="other", complete=True), final=True)
    assert json.loads(path.read_text())["stream_sid"] == "other"


def test_a_sidecar_tells_of_thousands_of_gaps_a_line_each_and_of_parameters_that_look_like_them(tmp_path: Path) -> None:
    gaps = [Gap("inbound", number / 4, 0.02) for number in range(3)]
    told = msgspec.structs.replace(
        msgspec.convert(SIDECAR, Sidecar), gaps=gaps, custom_parameters={"gaps": [], "x": '\n  "gaps": []'}
    )
    sidecars.write(tmp_path / "x.json", told, final=True)
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert sum(line.startswith('    {"track":"inbound"') for line in lines) == 3
    assert sidecars.read(tmp_path / "x.json") == told


class Room:
    """A disk on which there is so much."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 10**6
        monkeypatch.setattr(disk, "free", lambda folder: self.free)


async def test_no_room_for_the_next_segment_costs_nothing_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry_at_once: None
) -> None:
    room = Room(monkeypatch)
    stream = make_stream(tmp_path, tracks=(Track.INBOUND, Track.OUTBOUND), disk=disk.DiskSpace(1000))
    processor = await started(stream, segment=1)
    processor.on_frame(frame(counting(1, 7000)))
    processor.on_frame(frame(counting(1, 4000), track=Track.OUTBOUND))
    await until(lambda: not processor._pending)
    room.free = 10
    # One voice is past the segment's end, the other within it.
    processor.on_frame(frame(counting(7001, 1500), 7000))
    processor.on_frame(frame(counting(4001, 4000), 4000, track=Track.OUTBOUND))
    await until(lambda: not processor._pending)
    await writer.writer.run(lambda: None)
    room.free = 10**6
    processor.on_frame(frame(counting(1, 500), 8500))
    await until(lambda: not processor._pending)
    # The other voice comes to where no file is, and to the next one.
    processor.on_frame(frame(counting(1, 1000), 8000, track=Track.OUTBOUND))
    await ended(stream, processor)
    first = read(tmp_path / f"{STEM}.wav")
    assert first.T.tolist() == [counting(1, 8000).tolist()] * 2
    told = sidecar(tmp_path / f"{STEM}.json")
    assert (told["complete"], told["error"], told["continues"]) == (True, None, True)
    # The next one tells what is in no file.
    second = sidecar(tmp_path / f"{STEM}~002.json")
    assert (second["start_seconds"], second["missing_seconds"], second["complete"]) == (8500 / 8000, 500 / 8000, False)
    assert read(tmp_path / f"{STEM}~002.wav").T.tolist() == [counting(1, 500).tolist(), counting(501, 500).tolist()]


async def test_a_start_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    stuck = threading.Event()
    waiting = writer.writer.run(lambda: held(stuck))
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    starting = asyncio.create_task(started(make_stream(tmp_path)))
    await until(lambda: writer.writer._owed == 2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    stuck.set()
    await waiting
    await writer.writer.run(lambda: None)
    assert names(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_wav_file_ends_where_its_format_does(tmp_path: Path) -> None:
    last = 2**31 - 22
    part = WavPart(tmp_path / "long.wav", 8000, 1)
    part.write(counting(1, 160), last - 160, 0)
    with pytest.raises(OSError, match="4 GiB"):
        part.write(counting(1, 1), last, 0)
    part.flush()
    part.close()
    with soundfile.SoundFile(part.part) as file:
        assert file.frames == last
        file.seek(last - 161)
        assert file.read(dtype="int16").tolist() == list(range(161))
