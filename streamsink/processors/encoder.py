"""Encoding in a process of its own: it computes for seconds, and what libsndfile does wrong ends no call.

The process is sent an :class:`~streamsink.processors.formats.Order`, one at a time. It answers None now and then, while
it works, and then a :class:`~streamsink.processors.formats.Made`, or what went wrong: ``[errno or None, words]``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from streamsink.child import BlockingChild
from streamsink.errors import ChildDied, NotEncoded
from streamsink.processors.formats import Made, Order

log = structlog.get_logger(__name__)

_ATTEMPTS = 2
"""A process may die of what has nothing to do with this recording."""


class _Encoders(threading.local):
    """Each thread that encodes has a process."""

    child: BlockingChild | None = None


_encoders = _Encoders()


def make(order: Order, moved: Callable[[], None]) -> Made:
    """Have files made, and wait for it.

    What an earlier attempt left under their names is deleted; so is what this one made when it fails.

    Args:
        order: What to make.
        moved: Called now and then while it is being made.

    Raises:
        OSError: The disk is full or broken, or there is no room for a process.
        NotEncoded: It cannot be made.
    """
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            discard(order.parts)
            try:
                return _ask(order, moved)
            except ChildDied as error:
                log.warning("encoding failed", attempt=attempt, cause=str(error))
        raise NotEncoded("the process that encodes died of it")
    except Exception:
        with contextlib.suppress(OSError):
            discard(order.parts)
        raise


def discard(parts: Iterable[str]) -> None:
    """Delete what was made.

    Raises:
        OSError: It cannot be.
    """
    for part in parts:
        Path(part).unlink(missing_ok=True)


def _ask(order: Order, moved: Callable[[], None]) -> Made:
    child = _encoders.child = _encoders.child or BlockingChild("streamsink.processors.encoder_process")
    child.send(msgspec.to_builtins(order))
    try:
        while (said := child.receive()) is None:
            moved()
    except ChildDied:
        _encoders.child = None
        child.close()
        raise
    if isinstance(said, dict):
        return msgspec.convert(said, Made)
    number, words = said
    raise NotEncoded(words) if number is None else OSError(number, words)
