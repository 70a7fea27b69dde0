"""A process that encodes recordings: run by `encoder`, which says what goes over its standard input and output."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec

from streamsink.child import answer, be_nice
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


if __name__ == "__main__":
    be_nice(19, idle=True)
    answer(reply)
