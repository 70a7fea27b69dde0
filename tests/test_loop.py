import asyncio
import importlib
import os
import resource
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
from structlog.testing import capture_logs

from streamsink.loop import new_event_loop, raise_open_file_limit, tune
from streamsink.tls import self_signed, server_context


@pytest.fixture(params=["uvloop and aiofastnet", "uvloop", "asyncio and aiofastnet", "asyncio"])
def factory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., asyncio.AbstractEventLoop]:
    """Make loops as on a machine that has only these."""
    real = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name in ("uvloop", "aiofastnet") and name not in request.param:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    return new_event_loop


class Echo(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, since neither uvloop's nor aiofastnet's transports derive from asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@pytest.fixture
def context(tmp_path: Path) -> ssl.SSLContext:
    return server_context(*self_signed(tmp_path)[:2])


def address(server: asyncio.Server) -> tuple[str, int]:
    host, port = server.sockets[0].getsockname()[:2]
    return host, port


def test_the_best_that_is_installed_is_taken() -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        loop = runner.get_loop()
        assert type(loop).__module__ == "uvloop"
        assert loop.create_connection.func.__module__.startswith("aiofastnet")  # type: ignore[attr-defined]


def test_a_client_that_connects_and_says_nothing_is_cut_off(
    factory: Callable[..., asyncio.AbstractEventLoop], context: ssl.SSLContext
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=context)
        reader, writer = await asyncio.open_connection(*address(server))
        async with asyncio.timeout(50):
            assert await reader.read() == b""
        writer.close()
        server.close()

    # Without the deadline this would take the event loops' own 60 s.
    with asyncio.Runner(loop_factory=lambda: factory(tls_handshake_deadline=0.2)) as runner:
        runner.run(main())


def test_tls_works_on_a_bound_socket_and_by_host(
    factory: Callable[..., asyncio.AbstractEventLoop], context: ssl.SSLContext, tmp_path: Path
) -> None:
    client = ssl.create_default_context(cafile=self_signed(tmp_path).cert)

    async def echoed(server: asyncio.Server) -> bytes:
        reader, writer = await asyncio.open_connection(*address(server), ssl=client, server_hostname="localhost")
        writer.write(b"x" * 100_000)
        async with asyncio.timeout(50):
            data = await reader.readexactly(100_000)
        writer.close()
        await writer.wait_closed()
        server.close()
        return data

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await echoed(await loop.create_server(Echo, "127.0.0.1", 0, ssl=context)) == b"x" * 100_000
        bound = socket.create_server(("127.0.0.1", 0))
        assert await echoed(await loop.create_server(Echo, sock=bound, ssl=context)) == b"x" * 100_000

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_a_server_without_tls_takes_no_deadline(factory: Callable[..., asyncio.AbstractEventLoop]) -> None:
    async def main() -> bytes:
        server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*address(server))
        writer.write(b"hello")
        async with asyncio.timeout(50):
            data = await reader.readexactly(5)
        writer.close()
        await writer.wait_closed()
        server.close()
        return data

    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(main()) == b"hello"


CLIENT = """
import socket, sys
sys.stdin.readline()
connections = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(60)]
echoed = 0
for connection in connections:
    connection.settimeout(20)
    try:
        connection.sendall(b"x")
        echoed += len(connection.recv(1))
    except ConnectionError:
        pass
print(echoed)
"""


def test_connections_beyond_the_open_file_limit_are_turned_away_and_later_ones_served() -> None:
    reported: list[dict[str, object]] = []

    async def main() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        bound = socket.create_server(("127.0.0.1", 0), backlog=100)
        server = await loop.create_server(Echo, sock=bound)
        counts = []
        for limit in (40, soft):
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", CLIENT, str(address(server)[1])),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            taken = os.dup(0)
            os.close(taken)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, taken + limit), hard))
            async with asyncio.timeout(40):
                output, _ = await client.communicate(b"\n")
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            counts.append(int(output))
        server.close()
        return counts[0], counts[1]

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with capture_logs() as logs, asyncio.Runner(loop_factory=new_event_loop) as runner:
            limited, unlimited = runner.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 0 < limited < 60
    assert unlimited == 60
    assert reported == []
    assert [(line["log_level"], line["event"].partition(":")[0]) for line in logs] == [
        ("error", "turned connections away")
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="the names of these options are Linux's")
def test_an_accepted_socket_is_tuned() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            tune(accepted)
            tcp = ("TCP_NODELAY", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            options = {name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in tcp}
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert options == {
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": 30,
        "TCP_KEEPINTVL": 10,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 60_000,
    }


def test_a_system_without_an_option_is_tuned_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    with socket.socket() as sock:
        tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


def test_the_limit_of_open_files_is_raised_as_far_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        assert [raise_open_file_limit(), raise_open_file_limit()] == [hard, hard]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
