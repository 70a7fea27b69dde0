"""Several processes on one port: they act as one endpoint, and one that dies takes only its own streams along."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from streamsink import siblings as siblings_module
from streamsink.auth import ADMIN_TOKEN_FILE, STATUS_SECRET_FILE, STREAM_TOKEN_FILE
from streamsink.config import Settings
from streamsink.metrics import merged
from streamsink.server import Server
from streamsink.siblings import Hub, Siblings
from tests.peer import (
    ADMIN_TOKEN,
    LISTENER,
    PATIENCE,
    STOP,
    TOKEN,
    Listener,
    Peer,
    Running,
    eventually,
    media,
    request,
    start,
    upgrade,
)
from tests.process import Process, processes

pytestmark = pytest.mark.endpoint_loop


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Starts an endpoint of two workers."""
    async with processes(tmp_path) as spawn:

        async def start(*flags: str) -> Process:
            process = await spawn("--port", "0", "--host", "127.0.0.1", "--workers", "2", *flags)
            await process.listening()
            return process

        yield start


def pids(process: Process) -> list[int]:
    """The workers' process ids: the supervisor's children that are sessions of their own."""
    pid = process.process.pid
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    found = []
    for child in children:
        # One that died may be gone by now.
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(child) == child:
                found.append(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def samples(process: Process, name: str) -> dict[int, float]:
    """What /metrics says of a metric, by worker, once both tell."""
    sums: dict[int, float] = {}
    async with asyncio.timeout(PATIENCE):
        while len(sums) < 2:
            response = await process.request(
                request("GET", "/metrics", f"Authorization: Bearer {process.kept(ADMIN_TOKEN_FILE)}")
            )
            assert response.status == 200
            sums = {}
            for worker, value in re.findall(
                rf'^{name}{{[^}}]*worker="(\d)"}} ([0-9.]+)$', response.body.decode(), re.MULTILINE
            ):
                sums[int(worker)] = sums.get(int(worker), 0.0) + float(value)
    return sums


async def spread(process: Process) -> dict[int, list[Peer]]:
    """Streams on both workers, by whose they are."""
    token = process.kept(STREAM_TOKEN_FILE)
    streams: dict[int, list[Peer]] = {0: [], 1: []}
    async with asyncio.timeout(PATIENCE):
        while not all(streams.values()):
            before = await samples(process, "streamsink_streams_active")
            peer = await process.stream(token)
            after = await samples(process, "streamsink_streams_active")
            (worker,) = [worker for worker in after if after[worker] > before[worker]]
            streams[worker].append(peer)
    return streams


async def test_they_are_one_endpoint(two: Callable[..., Awaitable[Process]]) -> None:
    process = await two()
    streams = await spread(process)
    everyone = [*streams[0], *streams[1]]
    assert sum((await samples(process, "streamsink_frames_received_total")).values()) == len(everyone)

    # A webhook reaches the stream whichever worker took it.
    secret = process.kept(STATUS_SECRET_FILE)
    for peer in (streams[0][0], streams[1][0]) * 4:
        query = f"/status/{secret}?StreamEvent=stream-started&StreamSid={peer.sid}"
        assert (await process.request(request("GET", query))).status == 204
    unknown = f"/status/{secret}?StreamEvent=stream-started&StreamSid=unknown"
    assert (await process.request(request("GET", unknown))).status == 204

    # The same streamSid again closes the older stream, wherever that is.
    older = streams[0][0]
    newer = None
    token = process.kept(STREAM_TOKEN_FILE)
    async with asyncio.timeout(PATIENCE):
        while newer is None:
            before = await samples(process, "streamsink_streams_active")
            peer = await (await process.connect()).upgraded("/", token)
            after = await samples(process, "streamsink_streams_active")
            if after[1] > before[1]:
                newer = peer
            else:
                await peer.close()
    newer.sid = older.sid
    newer.send(start(older.sid), media(1))
    assert await older.close_code() == 1001

    everyone = [newer, *streams[0][1:], *streams[1]]
    process.process.send_signal(signal.SIGTERM)
    for peer in everyone:
        peer.send(STOP)
        assert await peer.close_code() == 1000
    status, _, said = await process.ended()
    assert status == 0
    # A worker that is held up for a second may miss one that is asked for.
    assert said.count("live=True") > 4
    assert said.count("live=True") + said.count("live=False") == 9
    assert "worker=0" in said
    assert "worker=1" in said
    wavs = [name for name in process.recordings() if name.endswith(".wav")]
    assert len(wavs) == len(everyone) + 1
    assert "Traceback" not in said


async def test_the_limit_of_streams_counts_them_all(two: Callable[..., Awaitable[Process]]) -> None:
    process = await two("--max-streams", "3")
    token = process.kept(STREAM_TOKEN_FILE)
    streams = [await process.stream(token) for _ in range(3)]
    statuses: list[int] = []
    async with asyncio.timeout(PATIENCE):
        # The news of a stream takes a moment.
        while statuses[-6:] != [503] * 6:
            statuses.append((await process.request(request("GET", "/readyz"))).status)
    streams[0].send(STOP)
    assert await streams[0].close_code() == 1000
    async with asyncio.timeout(PATIENCE):
        while statuses[-6:] != [200] * 6:
            statuses.append((await process.request(request("GET", "/readyz"))).status)


async def test_a_worker_that_dies_is_started_again(two: Callable[..., Awaitable[Process]]) -> None:
    process = await two()
    streams = await spread(process)
    before = pids(process)
    assert len(before) == 2
    # Whose pid it is shows in whose streams end.
    os.kill(before[0], signal.SIGKILL)
    ended = [asyncio.ensure_future(peers[0].frame()) for peers in streams.values()]
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
    (survivor,) = [streams[number] for number in (0, 1) if not ended[number].done()]
    for future in ended:
        future.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await future
    await eventually(lambda: len(pids(process)) == 2)
    await samples(process, "streamsink_streams_active")
    assert before[0] not in pids(process)
    process.process.send_signal(signal.SIGTERM)
    for peer in survivor:
        peer.send(media(2), STOP)
        assert await peer.close_code() == 1000
    status, _, said = await process.ended()
    assert status == 0
    assert "a worker died and is started again" in said


async def test_workers_do_not_outlive_their_supervisor(two: Callable[..., Awaitable[Process]]) -> None:
    process = await two()
    workers = pids(process)
    process.process.kill()
    # They hold its standard error: it ends when they have.
    assert (await process.ended())[0] == -signal.SIGKILL
    await eventually(lambda: not any(map(alive, workers)))


async def test_a_worker_that_cannot_start_ends_it_all(tmp_path: Path) -> None:
    (tmp_path / "shy.py").write_text(
        "import multiprocessing\n"
        "from streamsink import Processor\n"
        "class Shy(Processor):\n"
        "    def __init__(self):\n"
        "        if multiprocessing.parent_process():\n"
        "            raise ValueError('not here')\n"
    )
    async with processes(tmp_path) as spawn:
        process = await spawn("--port", "0", "--host", "127.0.0.1", "--workers", "2", "-p", "shy.py:Shy")
        status, stdout, stderr = await process.ended()
    assert status == 1
    assert stdout == ""
    assert re.search(r"streamsink: worker \d: .*not here", stderr)
    assert re.search(r"streamsink: worker \d could not start; what it said stands above", stderr)


# --- The messages ----------------------------------------------------------------------------------------------------


class Family:
    """A hub that relays by itself, and its workers' sides."""

    def __init__(self, count: int) -> None:
        self.hub = Hub()
        self.siblings = [Siblings(self.hub.add(number), number, count) for number in range(count)]
        self.orphans: list[int] = []
        self.ready: list[int] = []
        for number, sibling in enumerate(self.siblings):
            sibling.open(lambda number=number: self.orphans.append(number))  # type: ignore[misc]
        for end in self.hub.ends:
            asyncio.get_running_loop().add_reader(end.fileno(), self.relay, end)

    def relay(self, end: object) -> None:
        ready = self.hub.relay(end)  # type: ignore[arg-type]
        if ready is not None:
            self.ready.append(ready)
        if end not in self.hub.ends:
            asyncio.get_running_loop().remove_reader(end)  # type: ignore[arg-type]

    def close(self) -> None:
        for end in self.hub.ends:
            asyncio.get_running_loop().remove_reader(end.fileno())
        for number in range(len(self.siblings)):
            self.hub.remove(number)
        for sibling in self.siblings:
            sibling.close()


@pytest.fixture
async def family() -> AsyncIterator[Family]:
    family = Family(3)
    yield family
    family.close()


async def test_what_one_tells_all_others_hear(family: Family) -> None:
    heard: list[tuple[int, int, object]] = []
    done = asyncio.Event()

    def hear(listener: int, sender: int, body: object) -> None:
        heard.append((listener, sender, body))
        if len(heard) == 2:
            done.set()

    for number, sibling in enumerate(family.siblings):
        sibling.on("news", functools.partial(hear, number))
    family.siblings[0].tell("unheard of")
    family.siblings[0].tell("news", {"a": [1]})
    await done.wait()
    assert sorted(heard, key=str) == [(1, 0, {"a": [1]}), (2, 0, {"a": [1]})]
    family.siblings[1].ready()
    await eventually(lambda: family.ready == [1])


def double(number: int, sender: int, body: int) -> list[int]:
    return [number, 2 * body]


async def test_a_question_is_answered_by_all_others(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings_module, "PATIENCE", PATIENCE)
    for number, sibling in enumerate(family.siblings):
        sibling.on("double", functools.partial(double, number))
    first, second = await asyncio.gather(family.siblings[0].ask("double", 1), family.siblings[2].ask("double", 2))
    assert first == {1: [1, 2], 2: [2, 2]}
    assert second == {0: [0, 4], 1: [1, 4]}
    # Nobody knows this one; and what comes too late is for nobody.
    monkeypatch.setattr(siblings_module, "PATIENCE", 0.01)
    assert await family.siblings[0].ask("riddle") == {}


async def test_a_message_that_cannot_be_sent_is_told(family: Family, read_log: Callable[[], str]) -> None:
    family.siblings[0].tell("news", bytes(16 << 20))
    assert "a message to the other workers was lost" in read_log()


async def test_the_end_of_one_and_of_the_supervisor(family: Family) -> None:
    family.siblings[2].close()
    await eventually(lambda: len(family.hub.ends) == 2)
    family.siblings[2] = Siblings(family.hub.add(2), 2, 3)
    family.siblings[2].open(lambda: family.orphans.append(2))
    family.hub.remove(0)
    await eventually(lambda: family.orphans == [0])


def test_metrics_of_workers_are_told_apart() -> None:
    text = b'# HELP a_total Things.\n# TYPE a_total counter\na_total{kind="x"} 1.0\n'
    other = text.replace(b"1.0", b"2.0") + b"# HELP b Level.\n# TYPE b gauge\nb 3.0\n"
    assert merged({1: other, 0: text}).decode().splitlines() == [
        "# HELP a_total Things.",
        "# TYPE a_total counter",
        'a_total{kind="x",worker="0"} 1.0',
        'a_total{kind="x",worker="1"} 2.0',
        "# HELP b Level.",
        "# TYPE b gauge",
        'b{worker="1"} 3.0',
    ]


async def test_endpoints_share_ids_webhooks_and_the_limit(tmp_path: Path, read_log: Callable[[], str]) -> None:
    family = Family(2)
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "state": tmp_path / "state",
        "recordings": tmp_path / "recordings",
        "tokens": [f"crew:{TOKEN}"],
        "admin_token": ADMIN_TOKEN,
        "processors": [LISTENER],
        "max_streams": 3,
    }
    settings = Settings(**options)
    async with AsyncExitStack() as stack:
        first, second = [
            Running(await stack.enter_async_context(Server(settings, siblings=sibling)), read_log)
            for sibling in family.siblings
        ]
        stack.callback(family.close)
        for running in (first, second):
            stack.push_async_callback(running.disconnect)
        here, there = await first.stream(), await second.stream()
        here.send(start(here.sid), media(1))
        listener = await Listener.of(here.sid)

        # A webhook that came to the wrong one.
        status = f"/status/{second.server.access.status_secret}?StreamEvent=stream-started&StreamSid={here.sid}"
        assert (await second.get(status)).status == 204
        await listener.until(lambda listener: len(listener.statuses) == 1)
        assert "live=True" in read_log()

        # All streams count.
        another = await second.stream()
        await eventually(lambda: first.server.endpoint.full)
        refused = await first.connect()
        refused.send(upgrade())
        assert (await refused.response()).status == 503

        # Whoever is new learns how many there are, and nobody counts its predecessor's.
        second.server.siblings.tell("hello")  # type: ignore[union-attr]
        await eventually(lambda: not first.server.endpoint.full)
        second.server.endpoint.count()
        await eventually(lambda: first.server.endpoint.full)

        # The same streamSid elsewhere.
        there.send(start(here.sid), media(1))
        assert await here.close_code() == 1001
        await another.close()
