"""Logging: structlog and the standard library's loggers as one stream on stderr, in which nothing can pose as ours."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MAX_VALUE = 256
"""Longest string value in a log line, in characters."""
_MAX_ITEMS = 32
_MAX_DEPTH = 4
_MAX_TRACEBACK_LINES = 60

# What they tell at info is told by our own lines, with the stream's ids.
_QUIET = ("asyncio", "uvicorn", "uvicorn.error", "websockets", "aiofastnet")


def configure(format: Literal["text", "json"], level: str, worker: int | None = None) -> None:
    """Send every log line to stderr: UTC timestamps, one line each but for tracebacks.

    Args:
        format: ``text`` for people (in colour on a terminal), ``json`` for machines.
        level: The least severe level that is logged: ``debug``, ``info``, ``warning`` or ``error``.
        worker: Number of this process among the endpoint's, which every line tells; None where there is but one.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if worker is not None:
        before.append(lambda logger, name, event: {**event, "worker": worker})
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    renderer: Processor
    if format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            # Escaping comes last, so that it sees all that is rendered, whoever logged it.
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, escape_values, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(threshold)
    for name in _QUIET:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(max(threshold, logging.WARNING))
    # One line a request would be one a webhook and a health check.
    access = logging.getLogger("uvicorn.access")
    access.handlers = []
    access.propagate = False
    access.setLevel(logging.CRITICAL + 1)


def escape(text: str, limit: int = MAX_VALUE) -> str:
    """Make a peer's string harmless in a log: one line, no terminal codes, nothing that reorders or hides text.

    Whatever `str.isprintable` calls unprintable (controls, line and paragraph separators, bidirectional marks, lone
    surrogates) becomes a backslash escape.

    Args:
        text: Anything.
        limit: Longest part that is kept, in characters before escaping; how many are left out is told.
    """
    left_out = len(text) - limit
    if left_out > 0:
        text = text[:limit]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return f"{text}… ({left_out} more)" if left_out > 0 else text


def escape_values(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Escape and bound every string of a log line, at any depth; a structlog processor."""
    # A traceback keeps its lines, and each is marked, for an exception's text may hold what looks like a log line.
    traceback = event.pop("exception", None)
    escaped: EventDict = {escape(str(key)): _harmless(value, _MAX_DEPTH) for key, value in event.items()}
    if traceback is not None:
        escaped["exception"] = "\n".join(f"| {escape(line)}" for line in _bounded_lines(str(traceback)))
    return escaped


def _bounded_lines(traceback: str) -> list[str]:
    lines = traceback.split("\n")
    if len(lines) <= _MAX_TRACEBACK_LINES:
        return lines
    # The innermost frames and the exception itself stand last.
    left_out = len(lines) - _MAX_TRACEBACK_LINES
    return [f"… ({left_out} more lines)", *lines[left_out:]]


def _harmless(value: object, depth: int) -> object:
    if isinstance(value, str):
        return escape(str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if not depth and isinstance(value, Mapping | list | tuple | set | frozenset):
        # To say what is in it would take as many calls as it is deep.
        return f"<{type(value).__name__} too deep>"
    if isinstance(value, Mapping):
        return {escape(str(key)): _harmless(item, depth - 1) for key, item in list(value.items())[:_MAX_ITEMS]}
    if isinstance(value, list | tuple | set | frozenset):
        return [_harmless(item, depth - 1) for item in list(value)[:_MAX_ITEMS]]
    return escape(str(value))
