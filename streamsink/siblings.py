"""The worker processes of one endpoint among themselves: how many streams each has, whose webhook it is, whose metrics.

Messages are small and rare. Each worker has one end of a socket whose other end the supervisor holds, which passes on
to everybody else what one sends: :class:`Siblings` is the side of a worker, :class:`Hub` that of the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

log = structlog.get_logger(__name__)

LARGEST = 1 << 20
"""Bytes of a message: the metrics of a worker are the largest by far."""
PATIENCE = 1.0
"""Seconds that siblings have to answer."""


_READY = "ready"
"""The one kind that is for the supervisor."""


class _Envelope(msgspec.Struct, array_like=True):
    sender: int
    kind: str
    body: Any
    # Which question it asks or answers; an answer is for the one who asked.
    question: int = 0
    answer_to: int | None = None


_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(_Envelope).decode


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's and a worker's end; messages keep their borders and are sent whole or not at all."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LARGEST)
    return pair


class Siblings:
    """What a worker has of the others; for its event loop.

    Args:
        end: The worker's end of :func:`socket_pair`.
        number: The worker's own number, from 0.
        count: How many workers there are.
    """

    def __init__(self, end: socket.socket, number: int, count: int) -> None:
        self.number = number
        self.count = count
        self._end = end
        self._loop: asyncio.AbstractEventLoop
        self._on: dict[str, Callable[[int, Any], object]] = {}
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[dict[int, Any], asyncio.Event]] = {}

    def on(self, kind: str, call: Callable[[int, Any], object]) -> None:
        """Call this with the sender's number and the body of each message of a kind; what it returns answers it."""
        self._on[kind] = call

    def open(self, orphaned: Callable[[], None]) -> None:
        """Begin to listen.

        Args:
            orphaned: Called when the supervisor is gone.
        """
        self._loop = asyncio.get_running_loop()
        self._orphaned = orphaned
        self._loop.add_reader(self._end.fileno(), self._on_readable)

    def close(self) -> None:
        """Listen no more."""
        self._loop.remove_reader(self._end.fileno())
        self._end.close()

    def ready(self) -> None:
        """Tell the supervisor that this worker listens."""
        self._send(_Envelope(self.number, _READY, None))

    def tell(self, kind: str, body: object = None) -> None:
        """Send a message to all siblings; one that does not read misses it."""
        self._send(_Envelope(self.number, kind, body))

    async def ask(self, kind: str, body: object = None) -> dict[int, Any]:
        """Ask all siblings.

        Returns:
            The answers by the worker's number; a sibling that did not answer within :data:`PATIENCE` is missing.
        """
        question = next(self._numbers)
        answers: dict[int, Any] = {}
        complete = asyncio.Event()
        self._asked[question] = answers, complete
        self._send(_Envelope(self.number, kind, body, question))
        try:
            async with asyncio.timeout(PATIENCE):
                await complete.wait()
        except TimeoutError:
            pass
        finally:
            del self._asked[question]
        return answers

    def _send(self, envelope: _Envelope) -> None:
        try:
            self._end.send(_encode(envelope))
        except OSError as error:
            log.warning("a message to the other workers was lost", kind=envelope.kind, cause=str(error))

    def _on_readable(self) -> None:
        try:
            octets = self._end.recv(LARGEST)
        except BlockingIOError:
            return
        except OSError:
            octets = b""
        if not octets:
            self._loop.remove_reader(self._end.fileno())
            self._orphaned()
            return
        envelope = _decode(octets)
        if envelope.answer_to == self.number and envelope.question in self._asked:
            answers, complete = self._asked[envelope.question]
            answers[envelope.sender] = envelope.body
            if len(answers) == self.count - 1:
                complete.set()
        elif envelope.answer_to is None and envelope.kind in self._on:
            answer = self._on[envelope.kind](envelope.sender, envelope.body)
            if envelope.question:
                self._send(_Envelope(self.number, envelope.kind, answer, envelope.question, envelope.sender))


class Hub:
    """The supervisor's side: passes messages on."""

    def __init__(self) -> None:
        self._ends: dict[int, socket.socket] = {}

    def add(self, number: int) -> socket.socket:
        """Make the socket of a worker, new or started again; returns the worker's end."""
        self.remove(number)
        self._ends[number], theirs = socket_pair()
        return theirs

    def remove(self, number: int) -> None:
        """A worker has ended."""
        if number in self._ends:
            self._ends.pop(number).close()

    @property
    def ends(self) -> list[socket.socket]:
        """What is to be waited for; :meth:`relay` takes what has something to read."""
        return list(self._ends.values())

    def relay(self, end: socket.socket) -> int | None:
        """Pass one message on to all other workers; one that does not read misses it.

        Returns:
            The number of the worker that says it is ready, where the message is that.
        """
        try:
            octets = end.recv(LARGEST)
        except OSError:
            octets = b""
        if not octets:
            # That worker ends; its process tells when it has.
            for number in [number for number, kept in self._ends.items() if kept is end]:
                self.remove(number)
            return None
        envelope = _decode(octets)
        if envelope.kind == _READY:
            return envelope.sender
        for other in self._ends.values():
            if other is not end:
                with contextlib.suppress(OSError):
                    other.send(octets)
        return None
