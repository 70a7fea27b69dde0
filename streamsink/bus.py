"""The bus between processes and machines: publish, subscribe, request.

Made for what is stale in a moment: nothing is stored, and what cannot be sent now is dropped. A bus that is lost comes
back by itself; until then its users go on alone, which :attr:`Bus.connected` tells them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import structlog

from streamsink.errors import BusError, ConfigError

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription as NatsSubscription

log = structlog.get_logger(__name__)

MOST_WAITING = 4096
"""Messages that may wait for the socket; beyond them the oldest is dropped."""
RECONNECT_WAIT = 0.25
"""Seconds between two attempts to reach a lost server."""
PING_INTERVAL = 1.0
"""Seconds between pings; two unanswered ones end a connection that only looks alive."""

_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class Message(NamedTuple):
    """What a subscriber gets.

    Attributes:
        subject: Where it was published.
        payload: The octets.
        respond: Answers a request; does nothing where nobody waits for an answer.
    """

    subject: str
    payload: bytes
    respond: Callable[[bytes], None]


Take = Callable[[Message], None]


class Subscription(ABC):
    """A subscriber's interest in a subject."""

    @abstractmethod
    def close(self) -> None:
        """Get no more messages."""


class Bus(ABC):
    """What carries messages between processes; for one event loop.

    A subject is words of ``A-Z a-z 0-9 _ -`` with dots between them. Subscribers are called on the event loop, in the
    order of publishing, the publisher's own too; one that raises is logged and gets the next message all the same.
    """

    @abstractmethod
    async def open(self) -> None:
        """Connect, or go on trying in the background; never fails for a server that cannot be reached."""

    @abstractmethod
    async def close(self) -> None:
        """Disconnect; what is published from now on goes nowhere."""

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether messages reach others now."""

    @abstractmethod
    def publish(self, subject: str, payload: bytes) -> None:
        """Send a message to all subscribers; never blocks, and drops it where the bus is lost.

        Raises:
            ValueError: The subject is none.
        """

    @abstractmethod
    def subscribe(self, subject: str, take: Take) -> Subscription:
        """Get every message that is published from now on, as long as the bus is there.

        Raises:
            ValueError: The subject is none.
        """

    @abstractmethod
    async def request(self, subject: str, payload: bytes, seconds: float) -> bytes:
        """Send a message and wait for the first answer.

        Args:
            subject: Where to.
            payload: The octets.
            seconds: How long to wait.

        Raises:
            BusError: Nobody answered in time, or the bus is lost.
            ValueError: The subject is none.
        """


def open_bus(url: str | None) -> Bus:
    """Make the bus that a URL names.

    Args:
        url: ``nats://host:port`` (``tls://`` with TLS; several with commas between them), or None for a bus within this
            process.

    Raises:
        ConfigError: The URL names none, or its package is not installed.
    """
    if url is None:
        return ProcessBus()
    servers = url.split(",")
    for server in servers:
        parts = urlsplit(server)
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            # Without the rest of it: a URL can hold a password.
            raise ConfigError(f"--bus: got the scheme {parts.scheme!a}; wanted is nats://HOST:PORT or tls://HOST:PORT")
    try:
        import nats  # noqa: F401
    except ImportError:
        raise ConfigError("--bus: the package for NATS is missing: pip install 'streamsink[nats]'") from None
    return NatsBus(servers)


def _check(subject: str) -> None:
    if not _SUBJECT.fullmatch(subject):
        raise ValueError(f"a subject is words of A-Z a-z 0-9 _ - with dots between them, got {subject!a}")


def _deliver(take: Take, message: Message) -> None:
    try:
        take(message)
    except Exception:
        log.exception("a subscriber failed", subject=message.subject)


def _no_answer(payload: bytes) -> None:
    pass


# --- Within one process ----------------------------------------------------------------------------------------------


class ProcessBus(Bus):
    """A bus for endpoints in one process, on one event loop."""

    def __init__(self) -> None:
        self._takers: dict[str, list[_ProcessSubscription]] = {}
        self._open = False

    async def open(self) -> None:
        """There is nothing to wait for."""
        self._open = True

    async def close(self) -> None:
        """Drop what is on its way."""
        self._open = False

    @property
    def connected(self) -> bool:
        """Always, while it is open."""
        return self._open

    def publish(self, subject: str, payload: bytes) -> None:
        """Hand it to every subscriber, soon."""
        _check(subject)
        self._send(Message(subject, payload, _no_answer))

    def subscribe(self, subject: str, take: Take) -> Subscription:
        """Get every message from now on."""
        _check(subject)
        subscription = _ProcessSubscription(self, subject, take)
        self._takers.setdefault(subject, []).append(subscription)
        return subscription

    async def request(self, subject: str, payload: bytes, seconds: float) -> bytes:
        """Ask, and wait for the first answer."""
        _check(subject)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def respond(octets: bytes) -> None:
            if not answer.done():
                answer.set_result(octets)

        self._send(Message(subject, payload, respond))
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            raise BusError(f"nobody answered on {subject} within {seconds:g} s") from None

    def _send(self, message: Message) -> None:
        if self._open:
            loop = asyncio.get_running_loop()
            for subscription in self._takers.get(message.subject, ()):
                # Soon, not now: a subscriber may publish, and nobody expects to be called from inside its own call.
                loop.call_soon(subscription.deliver, message)

    def forget(self, subscription: _ProcessSubscription) -> None:
        """A subscription was closed."""
        takers = self._takers.get(subscription.subject, [])
        if subscription in takers:
            takers.remove(subscription)
            if not takers:
                del self._takers[subscription.subject]


class _ProcessSubscription(Subscription):
    def __init__(self, bus: ProcessBus, subject: str, take: Take) -> None:
        self._bus = bus
        self.subject = subject
        self._take: Take | None = take

    def deliver(self, message: Message) -> None:
        if self._take is not None:
            _deliver(self._take, message)

    def close(self) -> None:
        self._take = None
        self._bus.forget(self)


# --- NATS ------------------------------------------------------------------------------------------------------------


class NatsBus(Bus):
    """A bus over core NATS (https://docs.nats.io/nats-concepts/core-nats): at most once, nothing stored.

    Args:
        servers: URLs.
    """

    def __init__(self, servers: list[str]) -> None:
        from nats.aio.client import Client

        self._servers = servers
        self._client: Client = Client()
        # What is to be done on the connection, in order: a subscription stands before what follows it.
        self._outbox: deque[Callable[[], Awaitable[object]]] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = self._closing = False
        # Messages that were not sent, as the bus was lost or the socket did not keep up.
        self.dropped = 0

    async def open(self) -> None:
        """Connect; a server that is not there within a second is waited for in the background."""
        connecting = asyncio.create_task(self._connect())
        self._tasks = [connecting, asyncio.create_task(self._send(connecting))]
        await asyncio.wait({connecting}, timeout=1.0)
        if not self.connected:
            await self._on_lost()

    async def close(self) -> None:
        """Disconnect, sending what still waits where that is possible."""
        self._closing = True
        with contextlib.suppress(Exception):
            if self.connected:
                async with asyncio.timeout(1.0):
                    while self._outbox:
                        await self._outbox.popleft()()
                    await self._client.flush(1)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    @property
    def connected(self) -> bool:
        """Whether the server is there."""
        return self._client.is_connected

    def publish(self, subject: str, payload: bytes) -> None:
        """Send it soon, or drop it."""
        _check(subject)
        if not self.connected or len(self._outbox) >= MOST_WAITING:
            self.dropped += 1
            return
        self._soon(functools.partial(self._client.publish, subject, payload))

    def subscribe(self, subject: str, take: Take) -> Subscription:
        """Get every message from soon on, also when the connection was lost meanwhile and came back."""
        _check(subject)
        subscription = _NatsSubscription(self, take)
        self._soon(lambda: subscription.open(self._client, subject))
        return subscription

    async def request(self, subject: str, payload: bytes, seconds: float) -> bytes:
        """Ask, and wait for the first answer."""
        from nats.errors import Error

        _check(subject)
        if not self.connected:
            raise BusError("the bus is lost: its server cannot be reached")
        turn = asyncio.Event()

        async def come() -> None:
            turn.set()

        # Behind the subscriptions and messages that wait, as if it were one of them.
        self._soon(come)
        try:
            async with asyncio.timeout(seconds):
                await turn.wait()
            return bytes((await self._client.request(subject, payload, timeout=seconds)).data)
        except (Error, TimeoutError) as error:
            raise BusError(f"no answer on {subject} within {seconds:g} s: {type(error).__name__}") from None

    def later(self, call: Callable[[], Awaitable[object]]) -> None:
        """Do something on the connection, behind what waits."""
        self._soon(call)

    def _soon(self, call: Callable[[], Awaitable[object]]) -> None:
        self._outbox.append(call)
        self._wake.set()

    async def _connect(self) -> None:
        # Returns once it is connected, however long that takes; from then on the client reconnects by itself.
        await self._client.connect(
            self._servers,
            name="streamsink",
            error_cb=_ignore,
            disconnected_cb=self._on_lost,
            reconnected_cb=self._on_found,
            reconnect_time_wait=RECONNECT_WAIT,  # type: ignore[arg-type]
            connect_timeout=2,
            max_reconnect_attempts=-1,
            ping_interval=PING_INTERVAL,  # type: ignore[arg-type]
            max_outstanding_pings=2,
            pending_size=0,
        )
        if self._lost:
            await self._on_found()

    async def _send(self, connecting: asyncio.Task[None]) -> None:
        await asyncio.wait({connecting})
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                try:
                    await self._outbox.popleft()()
                except Exception as error:
                    self.dropped += 1
                    log.debug("not sent on the bus", cause=type(error).__name__)

    async def _on_lost(self) -> None:
        if self._closing:
            return
        self._lost = True
        log.warning("bus lost: rooms go on with the members each process has, until its server can be reached again")

    async def _on_found(self) -> None:
        self._lost = False
        log.info("bus connected")


class _NatsSubscription(Subscription):
    def __init__(self, bus: NatsBus, take: Take) -> None:
        self._bus = bus
        self._take: Take | None = take
        self._inner: NatsSubscription | None = None

    async def open(self, client: Client, subject: str) -> None:
        if self._take is not None:
            self._inner = await client.subscribe(subject, cb=self._on_message)

    async def _on_message(self, message: Msg) -> None:
        if self._take is not None:
            respond = functools.partial(self._bus.publish, message.reply) if message.reply else _no_answer
            _deliver(self._take, Message(message.subject, message.data, respond))

    def close(self) -> None:
        self._take = None
        self._bus.later(self._unsubscribe)

    async def _unsubscribe(self) -> None:
        if self._inner is not None:
            await self._inner.unsubscribe()


async def _ignore(error: Exception) -> None:
    # Each failed attempt to reconnect is one; that the bus is lost was told.
    log.debug("bus error", cause=type(error).__name__)
