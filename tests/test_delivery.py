"""Delivery as a whole: recordings go where they belong and who asked is told, whatever fails or dies meanwhile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from streamsink.delivery import Delivery, verify, work
from streamsink.errors import ConfigError
from tests.peer import PATIENCE
from tests.receiver import Receiver, receiving
from tests.stores import BUCKET, S3, GoogleStorage
from tests.streams import SECRET
from tests.test_child import wait_for_the_end_of

STEM = "20261120T204218Z_desk"
SIDECAR = {
    "stream_sid": "7d56",
    "call_sid": "76ac",
    "account_sid": "b08d",
    "name": "desk",
    "codec": "PCMU@8000h@20i",
    "started_at": "2026-11-20T20:42:18.250000Z",
    "duration_seconds": 1.5,
    "custom_parameters": {"card": "hunter2"},
    "complete": True,
}
TOLD = {key: SIDECAR[key] for key in work._TOLD}


class Here:
    """A recordings folder and its delivery, which is in more of a hurry than the real one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        self.delivery = self.fresh()

    def fresh(self) -> Delivery:
        self.delivery = Delivery(self.folder, lambda: SECRET, first_wait=0.01, longest_wait=0.05)
        return self.delivery

    def record(self, stem: str = STEM, size: int = 5000, **endings: bytes) -> dict[str, bytes]:
        """What ``record`` leaves: for each name its content."""
        files = {f"{stem}.wav": b"RIFF" + os.urandom(size), f"{stem}.json": json.dumps(SIDECAR).encode()}
        files |= {f"{stem}.{ending.replace('_', '.')}": content for ending, content in endings.items()}
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        return files

    def deliver(self, **options: Any) -> None:
        self.delivery.expect(self.folder, STEM, **options).arrived()

    def settled(self) -> None:
        """Wait until nothing is to be done."""
        until(lambda: not len(self.delivery._queue))

    @property
    def queued(self) -> list[str]:
        return sorted(path.name for path in (self.folder / ".delivery").iterdir() if path.name != "lock")

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    made = Here(tmp_path / "recordings")
    yield made
    made.delivery.close(0)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def described(files: dict[str, bytes], to: str | None = None) -> list[dict[str, Any]]:
    """As a webhook tells of files."""
    return [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        | ({"url": f"{to}/{name}"} if to else {})
        for name, content in files.items()
    ]


def test_nothing_runs_where_nothing_is_delivered(here: Here) -> None:
    here.delivery.start()
    assert here.delivery._threads == []
    assert list(here.folder.iterdir()) == []


def test_a_recording_is_uploaded_and_told_of(here: Here, receiver: Receiver, tmp_path: Path) -> None:
    files = here.record(transcript_jsonl=b"{}\n", vtt=b"WEBVTT\n", srt=b"1\n")
    # What is not this recording's stays.
    (here.folder / f"{STEM}.notes.txt").write_bytes(b"mine")
    (here.folder / f"{STEM}_2.wav").write_bytes(b"RIFF")
    to = (tmp_path / "kept").as_uri()
    here.deliver(upload=to, keep_local=False, on_complete=receiver.url)
    (told,) = receiver.wait()
    here.settled()
    order = [f"{STEM}.wav", f"{STEM}.transcript.jsonl", f"{STEM}.vtt", f"{STEM}.srt", f"{STEM}.json"]
    assert told.pop("id") == receiver.requests[0].headers["X-Streamsink-Delivery"]
    assert told == {
        "event": "recording",
        "stem": STEM,
        **TOLD,
        "files": described({name: files[name] for name in order}, to),
    }
    headers = receiver.requests[0].headers
    signature = headers["X-Streamsink-Signature"]
    assert verify(SECRET, headers["X-Streamsink-Timestamp"], signature, receiver.requests[0].body)
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == files
    assert here.names == [f"{STEM}.notes.txt", f"{STEM}_2.wav"]
    assert here.queued == []


def test_local_files_stay_unless_told_otherwise(here: Here, tmp_path: Path) -> None:
    files = here.record()
    here.deliver(upload=(tmp_path / "kept").as_uri())
    here.settled()
    assert here.names == sorted(files)


def test_without_an_upload_the_webhook_tells_what_is_here(here: Here, receiver: Receiver) -> None:
    files = here.record()
    here.deliver(on_complete=receiver.url, keep_local=False)
    (told,) = receiver.wait()
    assert told["files"] == described(files)
    assert here.names == sorted(files)


def test_a_sidecar_that_cannot_be_read_costs_only_what_it_says(here: Here, receiver: Receiver) -> None:
    here.record()
    (here.folder / f"{STEM}.json").write_bytes(b"\xff{")
    here.deliver(on_complete=receiver.url)
    (told,) = receiver.wait()
    assert (told["stem"], told["complete"], len(told["files"])) == (STEM, None, 2)


def test_a_transcript_that_is_still_written_is_waited_for(
    here: Here, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = here.record()
    part = here.folder / f"{STEM}.transcript.jsonl.part"
    part.write_bytes(b"{}\n")
    here.deliver(on_complete=receiver.url)
    until(
        lambda: here.delivery._queue._entries != {} and all(e.tries > 2 for e in here.delivery._queue._entries.values())
    )
    assert receiver.requests == []
    part.rename(part.with_suffix(""))
    (told,) = receiver.wait()
    assert len(told["files"]) == len(files) + 1
    # But not for ever: what a crash has left is not finished by waiting.
    part.write_bytes(b"{}\n")
    os.utime(here.folder / f"{STEM}.json", (time.time() - work.PART_SECONDS,) * 2)
    here.deliver(on_complete=receiver.url)
    receiver.wait(2)
    here.settled()
    # And no fault was counted for it.
    assert (b"failed" in scrape(here.delivery)) is False


def scrape(delivery: Delivery) -> bytes:
    registry = CollectorRegistry()
    registry.register(delivery)
    return generate_latest(registry)


def test_what_is_no_longer_here_ends_with_an_error_and_no_loop(here: Here, read_log: Callable[[], str]) -> None:
    here.record()
    (here.folder / f"{STEM}.wav").unlink()
    here.deliver(upload="file:///nowhere")
    here.settled()
    assert "delivery given up" in read_log()
    assert "its files are no longer here" in read_log()
    assert here.queued == []
    assert b'streamsink_deliveries_total{kind="upload",outcome="given_up"} 1.0' in scrape(here.delivery)


def test_a_link_is_no_recording(here: Here, receiver: Receiver, tmp_path: Path) -> None:
    here.record()
    (tmp_path / "secret").write_bytes(b"s3cr3t")
    (here.folder / f"{STEM}.vtt").symlink_to(tmp_path / "secret")
    here.deliver(on_complete=receiver.url)
    (told,) = receiver.wait()
    assert [file["name"] for file in told["files"]] == [f"{STEM}.wav", f"{STEM}.json"]


def test_what_changed_after_its_upload_is_not_deleted(
    here: Here, read_log: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.record()
    wav = here.folder / f"{STEM}.wav"
    save = here.delivery._queue.save

    def changed_meanwhile(taken: Any) -> None:
        save(taken)
        wav.write_bytes(b"RIFF other")

    monkeypatch.setattr(here.delivery._queue, "save", changed_meanwhile)
    here.deliver(upload=(tmp_path / "kept").as_uri(), keep_local=False)
    here.settled()
    assert here.names == [wav.name]
    assert "kept here: it has changed since it was uploaded" in read_log()


def test_a_crash_while_local_files_are_deleted_is_made_good(
    here: Here, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = here.record()
    delete = here.delivery._delete
    crashes = [OSError(errno.EIO, "Input/output error")]

    def half_done(folder: Path, files: list[Any]) -> None:
        if crashes:
            delete(folder, files[:1])
            raise crashes.pop()
        delete(folder, files)

    monkeypatch.setattr(here.delivery, "_delete", half_done)
    to = (tmp_path / "kept").as_uri()
    here.deliver(upload=to, keep_local=False, on_complete=receiver.url)
    (told,) = receiver.wait()
    here.settled()
    assert told["files"] == described(files, to)
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == files
    assert (here.names, here.queued) == ([], [])


def test_nothing_is_deleted_where_the_target_is_the_recordings_folder(here: Here, read_log: Callable[[], str]) -> None:
    files = here.record()
    here.deliver(upload=here.folder.as_uri(), keep_local=False)
    until(lambda: "not delivered" in read_log())
    here.delivery.close(0)
    assert here.names == sorted(files)
    assert "both where recordings are made and where they are to be uploaded" in read_log()


# --- Webhooks --------------------------------------------------------------------------------------------------------


def test_a_webhook_is_sent_until_it_is_taken(here: Here, receiver: Receiver, read_log: Callable[[], str]) -> None:
    receiver.statuses = [500, 302, 404, 429]
    id = here.delivery.post(receiver.url, {"event": "transcript", "text": "hunter2"})
    told = receiver.wait(5)
    here.settled()
    assert told == [{"id": id, "event": "transcript", "text": "hunter2"}] * 5
    assert {request.headers["X-Streamsink-Delivery"] for request in receiver.requests} == {id}
    # At the first, second and fourth try.
    assert read_log().count("not delivered") - read_log().count("[debug") == 3
    assert "hunter2" not in read_log()
    assert "s3cr3t" not in read_log()
    scraped = scrape(here.delivery)
    assert b'streamsink_deliveries_total{kind="post",outcome="failed"} 4.0' in scraped
    assert b'streamsink_deliveries_total{kind="post",outcome="done"} 1.0' in scraped
    assert b"streamsink_deliveries_pending 0.0" in scraped


def test_who_is_gone_is_left_alone(here: Here, receiver: Receiver, read_log: Callable[[], str]) -> None:
    receiver.status = 410
    here.delivery.post(receiver.url, {})
    receiver.wait()
    here.settled()
    assert "HTTP status 410" in read_log()
    assert len(receiver.requests) == 1


def test_a_webhook_nobody_takes_for_a_day_is_given_up(
    here: Here, receiver: Receiver, read_log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.status = 503
    monkeypatch.setattr(work, "WEBHOOK_HOURS", 0)
    here.delivery.post(receiver.url, {})
    receiver.wait()
    here.settled()
    assert "not taken for 0 hours: Refused: HTTP status 503" in read_log()
    assert here.queued == []


def test_a_webhook_cannot_go_just_anywhere(here: Here) -> None:
    with pytest.raises(ConfigError, match="could be read on its way"):
        here.delivery.post("http://example.com/", {})
    with pytest.raises(TypeError):
        here.delivery.post("https://example.com/", {"what": object()})


def test_there_may_not_wait_any_number_of_webhooks(
    here: Here, receiver: Receiver, read_log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MOST_JOBS", 0)
    here.delivery.post(receiver.url, {})
    until(lambda: "webhook dropped: too many wait" in read_log())
    assert b'streamsink_deliveries_total{kind="post",outcome="refused"} 1.0' in scrape(here.delivery)


def test_a_webhook_that_cannot_be_kept_is_told(here: Here, receiver: Receiver, read_log: Callable[[], str]) -> None:
    (here.folder / ".delivery").write_bytes(b"a file in its place")
    here.delivery.post(receiver.url, {})
    until(lambda: "webhook lost: it cannot be kept" in read_log())
    assert "s3cr3t" not in read_log()


def test_a_queue_that_cannot_be_read_is_told(
    here: Here, read_log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(now: float) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(here.delivery._queue, "look", look)
    (here.folder / ".delivery").mkdir()
    here.delivery.start()
    until(lambda: "the delivery queue cannot be read" in read_log())


# --- Ends and starts -------------------------------------------------------------------------------------------------


def test_an_end_lets_go_what_was_not_tried_and_keeps_what_failed(
    here: Here, receiver: Receiver, read_log: Callable[[], str]
) -> None:
    for number in range(20):
        here.delivery.post(receiver.url, {"number": number})
    here.delivery.close(PATIENCE)
    assert sorted(told["number"] for told in receiver.wait(20)) == list(range(20))
    receiver.status = 500
    again = here.fresh()
    again.post(receiver.url, {"number": 20})
    again.close(PATIENCE)
    assert "not delivered yet: the next start goes on with it" in read_log()
    receiver.status = 200
    here.fresh().start()
    here.settled()
    assert receiver.wait()[-1]["number"] == 20


def test_a_recording_whose_process_died_is_delivered_once_it_is_mended(
    here: Here, receiver: Receiver, read_log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOOK", 0.02)
    # One dies while it records, another before its first sample.
    here.delivery.expect(here.folder, STEM, on_complete=receiver.url)
    here.delivery.expect(here.folder, "never", on_complete=receiver.url)
    (here.folder / f"{STEM}.wav.part").write_bytes(b"RIFF")
    here.delivery.close(0)
    here.fresh().start()
    until(lambda: "there is no such recording any more" in read_log())
    assert receiver.requests == []
    # In this order: what has neither name is gone.
    here.record()
    (here.folder / f"{STEM}.wav.part").unlink()
    (told,) = receiver.wait()
    assert told["stem"] == STEM
    here.settled()
    assert here.queued == []


def test_the_recordings_folder_may_be_moved(here: Here, receiver: Receiver, tmp_path: Path) -> None:
    inside = here.folder / "shop"
    inside.mkdir()
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    for folder in (inside, outside):
        here.delivery.expect(folder, STEM, on_complete=receiver.url)
        for name, content in here.record().items():
            (folder / name).write_bytes(content)
    here.delivery.close(0)
    moved = here.folder.rename(tmp_path / "moved")
    there = Here(moved)
    there.delivery.start()
    assert [told["stem"] for told in receiver.wait(2)] == [STEM, STEM]
    there.settled()
    there.delivery.close(0)


def test_a_recording_that_was_not_begun_is_forgotten(here: Here) -> None:
    expected = here.delivery.expect(here.folder, STEM, upload="file:///nowhere")
    expected.withdraw()
    assert here.queued == []


def test_what_cannot_be_noted_is_left_to_the_next_start(here: Here, read_log: Callable[[], str]) -> None:
    expected = here.delivery.expect(here.folder, STEM, upload="file:///nowhere")
    (noted,) = (here.folder / ".delivery").glob("*.json")
    noted.with_name(noted.name.replace("expected", "upload")).mkdir()
    expected.arrived()
    assert "a recording will only be delivered after the next start" in read_log()


def test_who_works_may_find_a_recording_before_it_is_told_of_it(
    here: Here, receiver: Receiver, read_log: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOOK", 0.02)
    here.delivery.post(receiver.url, {})
    receiver.wait()
    # It has the queue, and another process records.
    other = Delivery(here.folder, lambda: SECRET)
    files = here.record()
    expected = other.expect(here.folder, STEM, on_complete=receiver.url)
    told = receiver.wait(2)[1]
    assert told["files"] == described(files)
    expected.arrived()
    here.settled()
    assert "[error" not in read_log()
    other.close(0)


def test_a_recording_that_ends_while_it_is_looked_for_is_found(
    here: Here, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = work._parts

    def finished_meanwhile(folder: Path, stem: str) -> list[Path]:
        found = parts(folder, stem)
        if not (folder / f"{stem}.json").exists():
            here.record()
        return found

    monkeypatch.setattr(work, "_parts", finished_meanwhile)
    here.delivery.expect(here.folder, STEM, on_complete=receiver.url)
    here.delivery.close(0)
    here.fresh().start()
    assert receiver.wait()[0]["stem"] == STEM


DELIVERING = """
import sys
from pathlib import Path
from streamsink.delivery import Delivery

folder, stem, target, url = sys.argv[1:]
delivery = Delivery(Path(folder), lambda: "what-signs-our-webhooks", first_wait=0.01, longest_wait=0.05)
delivery.expect(Path(folder), stem, upload=target, keep_local=False, on_complete=url).arrived()
print("noted", flush=True)
sys.stdin.read()
delivery.close(20)
print([name for name in ("boto3", "botocore", "fsspec", "s3fs") if name in sys.modules])
"""


def start(here: Here, target: str, url: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DELIVERING, str(here.folder), STEM, target, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "noted\n"
    return process


@pytest.mark.parametrize("fault", ["cut", "lost", "500", "damaged"])
def test_a_recording_arrives_in_s3_whatever_fails(
    fault: str, here: Here, s3: S3, receiver: Receiver, tmp_path: Path, read_log: Callable[[], str]
) -> None:
    files = here.record()
    to = f"s3://{BUCKET}/{tmp_path.name}"
    with s3.failing(fault) as faults:
        here.deliver(upload=to, keep_local=False, on_complete=receiver.url)
        (told,) = receiver.wait()
        here.settled()
    assert faults.left == []
    assert told["files"] == described(files, to)
    # The credentials of the test, at debug.
    assert "hunter2" not in read_log()
    assert "AWSPreparedRequest" not in read_log()
    with s3.store(tmp_path.name).open(f"{STEM}.wav") as file:
        assert file.read() == files[f"{STEM}.wav"]
    assert here.names == []


def test_a_recording_arrives_at_google(here: Here, gs: GoogleStorage, receiver: Receiver, tmp_path: Path) -> None:
    files = here.record()
    to = f"gs://{BUCKET}/{tmp_path.name}"
    here.deliver(upload=to, keep_local=False, on_complete=receiver.url)
    (told,) = receiver.wait()
    here.settled()
    assert told["files"] == described(files, to)
    assert (here.names, here.queued) == ([], [])


def test_a_kill_in_the_midst_of_an_upload_costs_nothing(here: Here, s3: S3, receiver: Receiver, tmp_path: Path) -> None:
    files = here.record()
    to = f"s3://{BUCKET}/{tmp_path.name}"
    with s3.failing("held") as faults:
        process = start(here, to, receiver.url)
        assert faults.holding.wait(PATIENCE)
        children = [
            int(pid)
            for path in Path("/proc").glob(f"{process.pid}/task/*/children")
            for pid in path.read_text().split()
        ]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Nobody goes on uploading what the next one begins anew.
        assert len(children) == 1
        wait_for_the_end_of(children[0])
    # It had neither told nor deleted anything.
    assert here.names == sorted(files)
    assert len(here.queued) == 1
    assert receiver.requests == []
    here.delivery.start()
    (told,) = receiver.wait()
    here.settled()
    assert told["files"] == described(files, to)
    assert (here.names, here.queued) == ([], [])


def test_the_process_that_uploads_may_die(
    here: Here, s3: S3, receiver: Receiver, tmp_path: Path, read_log: Callable[[], str]
) -> None:
    files = here.record()
    to = f"s3://{BUCKET}/{tmp_path.name}"
    with s3.failing("held") as faults:
        here.deliver(upload=to, keep_local=False, on_complete=receiver.url)
        assert faults.holding.wait(PATIENCE)
        pid = here.delivery._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        (told,) = receiver.wait()
        here.settled()
    assert told["files"] == described(files, to)
    assert (here.names, here.queued) == ([], [])
    assert "the process of streamsink.delivery.process ended with status -9" in read_log()
    assert here.delivery._process.pid != pid


def test_an_end_does_not_wait_for_ever_for_an_upload(
    here: Here, s3: S3, receiver: Receiver, tmp_path: Path, read_log: Callable[[], str]
) -> None:
    files = here.record()
    with s3.failing("held") as faults:
        here.deliver(upload=f"s3://{BUCKET}/{tmp_path.name}", keep_local=False, on_complete=receiver.url)
        assert faults.holding.wait(PATIENCE)
        pid = here.delivery._process.pid
        assert pid is not None
        here.delivery.close(0)
        wait_for_the_end_of(pid)
    assert here.names == sorted(files)
    assert len(here.queued) == 1
    assert "not delivered yet: the next start goes on with it" in read_log()
    assert "ended with status" not in read_log()


def test_a_process_that_has_uploaded_ends_at_once_and_in_silence(
    here: Here, s3: S3, receiver: Receiver, tmp_path: Path
) -> None:
    here.record()
    process = start(here, f"s3://{BUCKET}/{tmp_path.name}", receiver.url)
    receiver.wait()
    out, err = process.communicate(timeout=PATIENCE)
    # No warning of a connection left open, nor any other.
    assert (process.returncode, err) == (0, "")
    *lines, imported = out.splitlines()
    assert ["[info" in line for line in lines] == [True, True]
    # What takes seconds to import and holds up calls while it works is elsewhere.
    assert imported == "[]"
