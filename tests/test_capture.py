import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from structlog.testing import capture_logs
from websockets.http11 import Request
from websockets.server import ServerProtocol

from streamsink.capture import FLUSH_INTERVAL, Capture
from tests.peer import TOKEN, upgrade


def head(path: str = "/", token: str | None = TOKEN, *extra: str) -> Request:
    engine = ServerProtocol()
    engine.receive_data(upgrade(path, token, *extra))
    (request,) = engine.events_received()
    assert isinstance(request, Request)
    return request


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(folder: Path, request: Request | None = None) -> Capture:
    capture = Capture.open(folder, request or head(), 100.0)
    assert capture is not None
    return capture


def test_a_capture_is_the_head_and_every_message_with_its_time(tmp_path: Path) -> None:
    capture = opened(tmp_path / "made" / "here", head("/agent"))
    capture.write(b'{"event":"connected"}', 100.25)
    capture.write("grüße\n".encode(), 100.5)
    capture.write(b"\xff\x00", 101.123456789)
    capture.close()
    assert lines(capture.path) == [
        {
            "t": 0.0,
            "head": {
                "path": "/agent",
                "headers": [
                    ["Host", "localhost"],
                    ["Upgrade", "websocket"],
                    ["Connection", "Upgrade"],
                    ["Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="],
                    ["Sec-WebSocket-Version", "13"],
                    ["Authorization", "Bearer ***"],
                ],
            },
        },
        {"t": 0.25, "text": '{"event":"connected"}'},
        {"t": 0.5, "text": "grüße\n"},
        {"t": 1.123457, "base64": "/wA="},
    ]
    assert capture.path.parent == tmp_path / "made" / "here"
    assert capture.path.stat().st_mode & 0o777 == 0o600
    assert capture.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", [f"Basic {TOKEN}", TOKEN, f"bearer  {TOKEN}"])
def test_no_form_of_the_token_is_kept(tmp_path: Path, value: str) -> None:
    capture = opened(tmp_path, head("/", None, f"AUTHORIZATION: {value}", f"authorization: {value}"))
    capture.close()
    assert TOKEN not in capture.path.read_text()


def test_two_captures_are_two_files(tmp_path: Path) -> None:
    captures = [opened(tmp_path) for _ in range(3)]
    for capture in captures:
        capture.close()
    assert len(set(os.listdir(tmp_path))) == 3


def test_a_killed_process_loses_a_second_at_most(tmp_path: Path) -> None:
    capture = opened(tmp_path)
    capture.write(b"one", 100.0 + FLUSH_INTERVAL - 0.01)
    assert lines(capture.path) == []
    capture.write(b"two", 100.0 + FLUSH_INTERVAL)
    assert [line.get("text") for line in lines(capture.path)] == [None, "one", "two"]
    capture.write(b"three", 100.0 + 2 * FLUSH_INTERVAL - 0.01)
    assert len(lines(capture.path)) == 3
    capture.close()
    assert len(lines(capture.path)) == 4


def test_a_folder_that_cannot_be_made_costs_the_capture_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with capture_logs() as logs:
        assert Capture.open(tmp_path / "file" / "folder", head(), 0.0) is None
    assert [(log["event"], log["log_level"], log["cause"]) for log in logs] == [
        ("capture not made", "error", "Not a directory")
    ]


def fail_write(capture: Capture) -> None:
    capture.write(b"x" * 100_000, 100.0)


def fail_flush(capture: Capture) -> None:
    capture.write(b"x", 100.0 + FLUSH_INTERVAL)


def fail_close(capture: Capture) -> None:
    capture.write(b"x", 100.0)
    capture.close()


@pytest.mark.parametrize("fail", [fail_write, fail_flush, fail_close])
def test_a_full_disk_ends_the_capture_and_not_the_stream(tmp_path: Path, fail: Callable[[Capture], None]) -> None:
    # Linux's device that is always full.
    full: BinaryIO = open("/dev/full", "wb")  # noqa: SIM115 - the capture closes it
    capture = Capture(tmp_path / "capture.jsonl", full, 100.0)
    with capture_logs() as logs:
        fail(capture)
        capture.write(b"late", 200.0)
        capture.close()
    assert [(log["event"], log["log_level"], log["cause"]) for log in logs] == [
        ("capture ended: the disk refused it", "error", os.strerror(errno.ENOSPC))
    ]
    assert full.closed
