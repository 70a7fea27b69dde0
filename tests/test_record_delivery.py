"""What is recorded is delivered, and nothing is recorded on a disk that is nearly full."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from streamsink.config import Pipeline, Settings
from streamsink.delivery import verify
from streamsink.errors import ConfigError, ProcessorError
from streamsink.processors.record import Record
from streamsink.server import Server
from tests.conftest import Serve
from tests.peer import LISTENER, PATIENCE, STOP, media, start
from tests.receiver import receiving
from tests.stores import BUCKET, S3
from tests.streams import SECRET, counting, frame, make_stream

STEM = "20261120T204218Z_front_desk"


def queued(folder: Path) -> list[str]:
    return [path.name for path in (folder / ".delivery").glob("*.json")]


async def test_a_call_is_recorded_uploaded_and_told_of(
    serve: Serve, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamsink.server.DELIVERY_SECONDS", PATIENCE)
    with receiving() as receiver:
        to = f"s3://{BUCKET}/{tmp_path.name}"
        spec = f"record:upload={to},keep_local=false,on_complete={receiver.url}"
        running = await serve(processors=[spec, LISTENER], webhook_secret=SECRET)
        peer = await running.stream()
        peer.send(start("upload", streamName="front desk"), *(media(number) for number in range(1, 51)), STOP)
        assert await peer.close_code() == 1000
        await running.streams_over()
        (told,) = await asyncio.to_thread(receiver.wait)
        assert (told["event"], told["stream_sid"], told["duration_seconds"]) == ("recording", "upload", 1.0)
        assert told["complete"] is True
        audio, sidecar = told["files"]
        assert (audio["url"], sidecar["url"]) == (f"{to}/{told['stem']}.wav", f"{to}/{told['stem']}.json")
        with s3.store(tmp_path.name).open(f"{told['stem']}.wav") as file:
            assert hashlib.sha256(file.read()).hexdigest() == audio["sha256"]
        assert [path.name for path in running.recordings.iterdir()] == [".delivery"]
        request = receiver.requests[0]
        timestamp, signature = request.headers["X-Streamsink-Timestamp"], request.headers["X-Streamsink-Signature"]
        assert verify(SECRET, timestamp, signature, request.body)
        await running.server.stop()
        assert queued(running.recordings) == []


async def test_who_asks_for_no_delivery_gets_none_of_it(tmp_path: Path) -> None:
    stream = make_stream(tmp_path)
    threads = {thread.name for thread in threading.enumerate()}
    processor = Record()
    await processor.on_start(stream)
    processor.on_frame(frame(counting(0, 160)))
    await processor.on_stop("stop")
    assert not (tmp_path / ".delivery").exists()
    assert not [thread for thread in threading.enumerate() if thread.name not in threads and "upload" in thread.name]


async def test_a_recording_that_cannot_begin_is_not_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(tmp_path)
    processor = Record(upload="file:///nowhere")

    def full(*args: object, **options: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("streamsink.processors.sidecar.write", full)
    await processor.on_start(stream)
    await processor.on_stop("stop")
    assert queued(tmp_path) == []
    stream.delivery.close(0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"upload": "ftp://host/x"},
            "the scheme is 'ftp'; wanted s3://bucket/prefix, gs://bucket/prefix or file:///folder",
        ),
        ({"on_complete": "http://example.com/"}, "could be read on its way; wanted https://host/path"),
    ],
)
def test_what_cannot_be_delivered_is_told_when_the_endpoint_starts(
    options: dict[str, str], problem: str, tmp_path: Path
) -> None:
    spec = "record:" + ",".join(f"{key}={value}" for key, value in options.items())
    with pytest.raises(ProcessorError) as caught:
        Server(Settings(state=tmp_path, recordings=tmp_path, no_tls=True, processors=[spec]))
    assert problem in str(caught.value)
    assert ".py" not in str(caught.value)


def test_a_missing_package_is_told_when_the_endpoint_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    spec = Pipeline(processors=["record:upload=gs://bucket/calls"])
    with pytest.raises(ProcessorError, match=r"needs the package gcsfs: pip install 'streamsink\[gcs\]'"):
        Server(Settings(state=tmp_path, recordings=tmp_path, no_tls=True, pipelines={"default": spec}))


# --- Room on the disk ------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    free: int


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def say(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free))

    return say


async def test_below_the_least_room_no_recording_begins_and_the_call_goes_on(
    serve: Serve, full: Callable[[int], None], read_log: Callable[[], str]
) -> None:
    running = await serve(min_free=200_000_000)
    full(199_000_000)
    for sid in ("first", "second"):
        peer = await running.stream()
        peer.send(start(sid), media(1), media(2), STOP)
        assert await peer.close_code() == 1000
    await running.streams_over()
    assert not running.recordings.exists()
    assert running.log.count("no new recordings: the disk is nearly full") == 1
    assert (await running.counters("recordings_refused", "frames_received")) == {
        "recordings_refused_total": 2.0,
        'frames_received_total{codec="PCMU"}': 4.0,
    }
    full(200_000_000)
    peer = await running.stream()
    peer.send(start("third"), media(1), STOP)
    assert await peer.close_code() == 1000
    await running.streams_over()
    assert len(list(running.recordings.glob("*.wav"))) == 1


def test_an_endpoint_does_not_start_without_room(tmp_path: Path, full: Callable[[int], None]) -> None:
    full(199_000_000)
    with pytest.raises(ConfigError, match="199 MB free, at least 200 MB are wanted"):
        Server(Settings(state=tmp_path, recordings=tmp_path / "recordings", no_tls=True))
    Server(Settings(state=tmp_path, recordings=tmp_path / "recordings", no_tls=True, min_free=0))


def test_the_command_says_so_in_a_sentence(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "streamsink", "serve", "--no-tls", "--port", "0", "--min-free", "900T"],
        cwd=tmp_path,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("streamsink: recordings: ")
    assert ran.stderr.endswith(" or ask for less with --min-free (0 for none)\n")
    assert ran.stderr.count("\n") == 1
