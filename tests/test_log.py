import asyncio
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog

from streamsink.log import MAX_VALUE, configure, escape
from tests.conftest import LOGGERS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Captured:
    """All that was written to stderr so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Captured]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield Captured(capsys)
    structlog.reset_defaults()
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def only_line(stream: Captured) -> dict[str, object]:
    [line] = stream.getvalue().splitlines()
    record = json.loads(line)
    assert isinstance(record, dict)
    timestamp = datetime.fromisoformat(record.pop("timestamp"))
    assert timestamp.utcoffset() == timedelta(0)
    assert timestamp <= datetime.now(UTC)
    return record


HOSTILE = {
    "newline": ("a\nb", "a\\nb"),
    "carriage return": ("a\rb", "a\\rb"),
    "tab": ("a\tb", "a\\tb"),
    "NUL": ("a\x00b", "a\\x00b"),
    "ANSI colour": ("\x1b[31mred", "\\x1b[31mred"),
    "C1 control sequence introducer": ("\x9b31m", "\\x9b31m"),
    "delete": ("\x7f", "\\x7f"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "paragraph separator": ("a\u2029b", "a\\u2029b"),
    "right-to-left override": ("\u202egnp.exe", "\\u202egnp.exe"),
    "right-to-left isolate": ("\u2067x\u2069", "\\u2067x\\u2069"),
    "zero width": ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
    "lone surrogate": ("\ud800x", "\\ud800x"),
    "language tag": ("\U000e0041", "\\U000e0041"),
}


@pytest.mark.parametrize(("hostile", "harmless"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_printable_is_escaped(hostile: str, harmless: str) -> None:
    assert escape(hostile) == harmless


@pytest.mark.parametrize("text", ["", "plain", "Übergröße 電話 🎧", 'quotes " and \\ backslashes'])
def test_what_is_printable_stays(text: str) -> None:
    assert escape(text) == text


def test_long_strings_are_cut_and_it_is_told_by_how_much() -> None:
    assert escape("x" * MAX_VALUE) == "x" * MAX_VALUE
    assert escape("x" * (MAX_VALUE + 1)) == "x" * MAX_VALUE + "… (1 more)"
    assert escape("\n" * 5000, limit=2) == "\\n\\n… (4998 more)"


@pytest.mark.parametrize(("hostile", "harmless"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("format", ["text", "json"])
def test_no_value_reaches_the_log_unescaped(stderr: Captured, format: str, hostile: str, harmless: str) -> None:
    configure("json" if format == "json" else "text", "info")
    nested = {"list": [hostile, (hostile,)], hostile: {"deep": hostile}}
    log = structlog.get_logger()
    event = f"event {hostile}"
    log.info(event, name=hostile, nested=nested, path=Path(hostile), error=ValueError(hostile))
    logging.getLogger("stdlib").warning("message %s", hostile)
    output = stderr.getvalue()
    assert output.count("\n") == 2
    assert output.replace("\n", "").isprintable()
    if format == "json":
        record = json.loads(output.splitlines()[0])
        del record["timestamp"]
        assert record == {
            "level": "info",
            "event": f"event {harmless}",
            "name": harmless,
            "nested": {"list": [harmless, [harmless]], harmless: {"deep": harmless}},
            "path": harmless,
            "error": harmless,
        }
        assert json.loads(output.splitlines()[1])["event"] == f"message {harmless}"


def test_collections_are_bounded(stderr: Captured) -> None:
    configure("json", "info")
    bottom: list[object] = []
    nested = bottom
    for _ in range(1000):
        nested = [nested]
    structlog.get_logger().info("big", many=list(range(1000)), table={str(n): n for n in range(1000)}, nested=nested)
    record = only_line(stderr)
    assert record["many"] == list(range(32))
    assert record["table"] == {str(n): n for n in range(32)}
    assert len(json.dumps(record["nested"])) < 500


def test_plain_values_keep_their_type(stderr: Captured) -> None:
    configure("json", "debug")
    structlog.get_logger().debug("values", number=1, share=0.5, flag=True, none=None, raw=b"\x00\n")
    assert only_line(stderr) == {
        "level": "debug",
        "event": "values",
        "number": 1,
        "share": 0.5,
        "flag": True,
        "none": None,
        "raw": "b'\\x00\\n'",
    }


def fail(text: str, depth: int = 0) -> None:
    if depth:
        fail(text, depth - 1)
    raise ValueError(text)


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_traceback_cannot_pose_as_a_log_line(stderr: Captured, format: str) -> None:
    configure("json" if format == "json" else "text", "info")
    try:
        fail("bad\n2026-11-20T20:42:18Z [info] all is well\x1b[2J")
    except ValueError:
        structlog.get_logger().exception("it failed", stream_sid="s1")
    output = stderr.getvalue()
    lines = str(only_line(stderr)["exception"]).split("\n") if format == "json" else output.splitlines()[1:]
    assert lines[0] == "| Traceback (most recent call last):"
    assert lines[-2:] == ["| ValueError: bad", "| 2026-11-20T20:42:18Z [info] all is well\\x1b[2J"]
    assert all(line.startswith("| ") for line in lines)


def test_a_long_traceback_keeps_its_end(stderr: Captured) -> None:
    configure("json", "info")
    try:
        fail("\n" * 500 + "the end")
    except ValueError:
        structlog.get_logger().exception("it failed")
    lines = str(only_line(stderr)["exception"]).split("\n")
    assert len(lines) == 61
    assert lines[0].endswith(" more lines)")
    assert lines[-1] == "| the end"


def test_text_has_time_level_event_and_values(stderr: Captured) -> None:
    configure("text", "info")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structlog.get_logger().info("stream started", stream_sid="s1", name="two words")
    timestamp, rest = stderr.getvalue().split(" ", 1)
    assert datetime.fromisoformat(timestamp).utcoffset() == timedelta(0)
    assert rest == "[info     ] stream started name='two words' stream_sid=s1\n"


def test_colour_only_on_a_terminal(stderr: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure("text", "info")
    structlog.get_logger().info("hello", name="\x1b[2J")
    assert "\x1b[" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
    assert stderr.getvalue() == ""


def test_levels(stderr: Captured) -> None:
    configure("json", "warning")
    log = structlog.get_logger()
    log.info("no")
    logging.getLogger("stdlib").info("no")
    log.warning("yes")
    assert only_line(stderr) == {"level": "warning", "event": "yes"}


def test_values_of_the_context_are_in_every_line(stderr: Captured) -> None:
    configure("json", "info")
    with structlog.contextvars.bound_contextvars(stream_sid="s1"):
        logging.getLogger("stdlib").warning("one")
    assert only_line(stderr) == {"level": "warning", "event": "one", "stream_sid": "s1"}


def test_servers_below_us_are_quiet_until_something_is_wrong(stderr: Captured) -> None:
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = [logging.StreamHandler()]
    configure("json", "debug")
    logging.getLogger("uvicorn.access").error("GET / 200")
    for name in ("uvicorn.error", "websockets.server", "asyncio"):
        logging.getLogger(name).info("chatter")
    assert stderr.getvalue() == ""
    logging.getLogger("uvicorn.error").error("cannot bind")
    assert only_line(stderr) == {"level": "error", "event": "cannot bind"}


def test_what_a_task_throws_away_is_one_line_of_ours(stderr: Captured) -> None:
    configure("json", "info")

    async def throw() -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "lost\nin a task", "exception": ValueError("x")})

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(throw())
    record = only_line(stderr)
    assert (record["level"], record["event"], record["exception"]) == ("error", "lost\\nin a task", "| ValueError: x")
