"""A process that encodes recordings: run by `encoder`, which says what goes over its standard input and output."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec

from streamsink.child import answer, be_nice, end_with_owner, is_deserted
from streamsink.processors.formats import Order, make

TELL = 0.5
"""Seconds between two signs of life."""


def reply(message: Any) -> Iterator[object]:
    """Answer one order as `encoder` describes."""
    told = time.monotonic()
    try:
        for made in make(msgspec.convert(message, Order)):
            if made is not None:
                yield msgspec.to_builtins(made)
            elif time.monotonic() - told >= TELL:
                told = time.monotonic()
                yield None
    except OSError as error:
        yield [error.errno, error.strerror or str(error)]
    except Exception as error:
        yield [None, f"{type(error).__name__}: {error}"]


def reply_unless_deserted(message: Any) -> Iterator[object]:
    """Begin nothing for who has died: whoever mends what it left makes the same files."""
    if not is_deserted():
        yield from reply(message)


if __name__ == "__main__":
    end_with_owner()
    be_nice(19, idle=True)
    answer(reply_unless_deserted)
