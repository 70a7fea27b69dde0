"""The bus: the same tests for both backends, and what only a server that comes and goes can show."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from streamsink import bus as bus_module
from streamsink.bus import Bus, Message, NatsBus, ProcessBus, open_bus
from streamsink.errors import BusError, ConfigError
from tests.nats_server import NatsServer, free_port, needs_nats
from tests.peer import PATIENCE, eventually


class Taker:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()

    def __call__(self, message: Message) -> None:
        self.messages.put_nowait(message)

    async def payload(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return (await self.messages.get()).payload


@pytest.fixture(params=["process", pytest.param("nats", marks=needs_nats)])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    if request.param == "process":
        opened = open_bus(None)
        assert not opened.connected
        await opened.open()
        await eventually(lambda: opened.connected)
        yield opened
        await opened.close()
        assert not opened.connected
        return
    with NatsServer() as server:
        opened = open_bus(server.url)
        await opened.open()
        await eventually(lambda: opened.connected)
        yield opened
        await opened.close()
        assert not opened.connected


async def test_subscribers_get_what_is_published_in_order(bus: Bus) -> None:
    first, second, other = Taker(), Taker(), Taker()
    bus.subscribe("room.a", first)
    bus.subscribe("room.a", second)
    bus.subscribe("room.b", other)
    for number in range(100):
        bus.publish("room.a", bytes([number]))
    bus.publish("room.b", b"b")
    for taker in (first, second):
        assert [await taker.payload() for _ in range(100)] == [bytes([number]) for number in range(100)]
    assert await other.payload() == b"b"
    assert other.messages.empty()


async def test_a_closed_subscription_gets_nothing(bus: Bus) -> None:
    closed, open_ = Taker(), Taker()
    subscription = bus.subscribe("a", closed)
    bus.subscribe("a", open_)
    bus.publish("a", b"1")
    assert await open_.payload() == b"1"
    subscription.close()
    subscription.close()
    bus.publish("a", b"2")
    assert await open_.payload() == b"2"
    assert await closed.payload() == b"1"
    assert closed.messages.empty()
    bus.subscribe("b", closed).close()
    bus.publish("b", b"3")
    bus.publish("a", b"4")
    assert await open_.payload() == b"4"
    assert closed.messages.empty()


async def test_a_request_gets_the_first_answer(bus: Bus) -> None:
    def answer(message: Message) -> None:
        message.respond(b"re:" + message.payload)
        message.respond(b"again")

    bus.subscribe("ask", answer)
    assert await bus.request("ask", b"x", seconds=10) == b"re:x"
    # Nobody waits for an answer to what was published: it goes nowhere.
    taker = Taker()
    bus.subscribe("ask", taker)
    bus.publish("ask", b"y")
    assert await taker.payload() == b"y"


async def test_a_request_that_nobody_answers_fails(bus: Bus) -> None:
    with pytest.raises(BusError, match="nobody"):
        await bus.request("nobody", b"x", seconds=0.05)


async def test_a_subscriber_that_fails_gets_the_next_message(bus: Bus, read_log: Callable[[], str]) -> None:
    taker = Taker()

    def fail(message: Message) -> None:
        taker(message)
        if message.payload == b"1":
            raise ValueError("broken")

    bus.subscribe("a", fail)
    bus.publish("a", b"1")
    bus.publish("a", b"2")
    assert [await taker.payload(), await taker.payload()] == [b"1", b"2"]
    assert "a subscriber failed" in read_log()


@pytest.mark.parametrize("subject", ["", "a b", "a.*", "a.>", ".a", "a.", "a..b", "ä"])
async def test_a_subject_is_words_with_dots(bus: Bus, subject: str) -> None:
    with pytest.raises(ValueError, match="a subject is words"):
        bus.publish(subject, b"")
    with pytest.raises(ValueError, match="a subject is words"):
        bus.subscribe(subject, lambda message: None)
    with pytest.raises(ValueError, match="a subject is words"):
        await bus.request(subject, b"", seconds=1)


async def test_nothing_is_heard_of_a_closed_bus() -> None:
    bus = ProcessBus()
    await bus.open()
    taker = Taker()
    bus.subscribe("a", taker)
    await bus.close()
    bus.publish("a", b"1")
    await asyncio.sleep(0)
    assert taker.messages.empty()


@needs_nats
async def test_a_lost_server_comes_back(read_log: Callable[[], str]) -> None:
    with NatsServer() as server:
        bus = NatsBus([server.url])
        await bus.open()
        await eventually(lambda: bus.connected)
        taker = Taker()
        bus.subscribe("a", taker)
        bus.publish("a", b"before")
        assert await taker.payload() == b"before"

        server.stop()
        await eventually(lambda: not bus.connected)
        dropped = bus.dropped
        bus.publish("a", b"meanwhile")
        assert bus.dropped == dropped + 1
        with pytest.raises(BusError, match="lost"):
            await bus.request("a", b"", seconds=1)
        later = Taker()
        bus.subscribe("later", later)

        server.start()
        await eventually(lambda: bus.connected)
        await eventually(lambda: "bus connected" in read_log())
        bus.publish("a", b"after")
        assert await taker.payload() == b"after"
        bus.subscribe("later", later)
        bus.publish("later", b"1")
        assert await later.payload() == b"1"
        await bus.close()
    assert "bus lost" in read_log()


@needs_nats
async def test_a_server_that_comes_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, read_log: Callable[[], str]
) -> None:
    server = NatsServer()
    bus = NatsBus([server.url])
    await bus.open()
    assert not bus.connected
    assert "bus lost" in read_log()
    taker = Taker()
    bus.subscribe("a", taker)
    with server:
        await eventually(lambda: bus.connected)
        bus.publish("a", b"1")
        assert await taker.payload() == b"1"
        await bus.close()


async def test_a_bus_that_never_connected_closes() -> None:
    bus = NatsBus([f"nats://127.0.0.1:{free_port()}"])
    await bus.open()
    await bus.close()
    assert not bus.connected


@needs_nats
async def test_what_the_socket_does_not_take_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_module, "MOST_WAITING", 10)
    with NatsServer() as server:
        bus = NatsBus([server.url])
        await bus.open()
        await eventually(lambda: bus.connected)
        taker = Taker()
        bus.subscribe("a", taker)
        bus.publish("a", b"0")
        assert await taker.payload() == b"0"
        # Too big for the server: it is dropped, and what follows is not.
        bus.publish("a", bytes(2 << 20))
        for number in range(30):
            bus.publish("a", bytes([number]))
        assert [await taker.payload() for _ in range(9)] == [bytes([number]) for number in range(9)]
        assert bus.dropped == 22
        bus.publish("a", b"last")
        await bus.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [("redis://localhost", "'redis'"), ("nats://", "'nats'"), ("nats://a,http://b", "'http'"), ("x", "''")],
)
def test_a_url_that_names_no_bus_is_refused(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"got the scheme {told}; wanted is nats://HOST:PORT"):
        open_bus(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(ConfigError, match=r"pip install 'streamsink\[nats\]'"):
        open_bus("nats://localhost:4222")
