"""The real process: how it starts, what it says, and how it ends."""

from __future__ import annotations

import ast
import asyncio
import gc
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from streamsink.auth import ADMIN_TOKEN_FILE, STATUS_SECRET_FILE, STREAM_TOKEN_FILE
from streamsink.config import Settings
from streamsink.errors import ConfigError
from streamsink.server import Server
from tests.peer import LISTENER, PATIENCE, STOP, TOKEN, Listener, Peer, media, request, start, upgrade
from tests.process import Process, Spawn, processes, readiness

pytestmark = pytest.mark.endpoint_loop


@pytest.fixture
async def spawn(tmp_path: Path) -> AsyncIterator[Spawn]:
    async with processes(tmp_path) as spawn:
        yield spawn


@pytest.fixture
def serve(spawn: Spawn) -> Spawn:
    async def serve(*flags: str, **environment: str) -> Process:
        process = await spawn("--port", "0", "--host", "127.0.0.1", *flags, **environment)
        await process.listening()
        return process

    return serve


def whole_recording(process: Process, frames: int, code: int) -> None:
    """One recording lies there, closed, of so many frames."""
    wav, sidecar = process.recordings()[::-1]
    assert wav == sidecar.removesuffix(".json") + ".wav"
    samples, rate = soundfile.read(process.folder / "recordings" / wav)
    assert (len(samples), rate) == (160 * frames, 8000)
    told = process.sidecar()
    assert (told["complete"], told["close_code"], told["duration_seconds"]) == (True, code, frames * 0.02)


# --- The end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_draining_lets_a_live_stream_finish(serve: Spawn, number: signal.Signals) -> None:
    process = await serve()
    token = process.kept(STREAM_TOKEN_FILE)
    peer = await process.stream(token)
    process.process.send_signal(number)
    await process.drains()
    assert (await process.request(request("GET", "/readyz"))).body == b"draining\n"
    assert (await process.request(request("GET", "/healthz"))).status == 200
    refused = await process.request(upgrade("/", token))
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    admin = f"Authorization: Bearer {process.kept(ADMIN_TOKEN_FILE)}"
    metrics = await process.request(request("GET", "/metrics", admin))
    assert b'streamsink_handshakes_refused_total{reason="draining"} 1.0\n' in metrics.body
    webhook = f"/status/{process.kept(STATUS_SECRET_FILE)}?StreamEvent=stream-stopped&StreamSid={peer.sid}"
    assert (await process.request(request("GET", webhook))).status == 204
    peer.send(media(2), media(3), STOP)
    assert await peer.close_code() == 1000
    status, _, log = await process.ended()
    assert status == 0
    assert "Traceback" not in log
    assert f"stream={peer.sid}" in next(line for line in log.splitlines() if "stream status" in line)
    whole_recording(process, 3, 1000)


async def test_the_deadline_of_draining_closes_what_is_left(serve: Spawn) -> None:
    process = await serve("--drain-seconds", "0.5")
    peer = await process.stream(process.kept(STREAM_TOKEN_FILE))
    process.process.terminate()
    assert await peer.close_code() == 1001
    status, _, log = await process.ended()
    assert status == 0
    assert "Traceback" not in log
    whole_recording(process, 1, 1001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_draining(serve: Spawn, number: signal.Signals) -> None:
    process = await serve()
    peer = await process.stream(process.kept(STREAM_TOKEN_FILE))
    silent = await process.connect()
    process.process.send_signal(number)
    await process.drains()
    process.process.send_signal(number)
    assert await peer.close_code() == 1001
    status, _, log = await process.ended()
    assert status == 0
    assert await silent.ended() == b""
    assert "Traceback" not in log
    whole_recording(process, 1, 1001)


async def test_a_killed_process_can_be_started_again_on_its_port(serve: Spawn, spawn: Spawn) -> None:
    process = await serve()
    token = process.kept(STREAM_TOKEN_FILE)
    peer = await process.stream(token)
    process.process.kill()
    assert await peer.close_code() == 1006
    assert (await process.ended())[0] == -signal.SIGKILL
    again = await spawn("--port", str(process.port), "--host", "127.0.0.1")
    await again.listening()
    assert again.port == process.port
    peer = await again.stream(token)
    peer.send(STOP)
    assert await peer.close_code() == 1000
    again.process.terminate()
    assert (await again.ended())[0] == 0


async def test_a_port_in_use_is_one_sentence(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await spawn("--no-tls", "--port", str(port), "--host", "127.0.0.1", "--log-level", "error")
        status, said, log = await process.ended()
    assert (status, said) == (1, "")
    assert log == (
        f"streamsink: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "choose another with --host and --port\n"
    )


class Signalled(Server):
    """A server in this process that is told to end as soon as it listens."""

    def started(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def settings(folder: Path, **given: Any) -> Settings:
    return Settings.model_validate(
        {
            "port": 0,
            "host": "127.0.0.1",
            "state": folder,
            "recordings": folder,
            "no_auth": True,
            "no_tls": True,
            **given,
        }
    )


def test_a_program_may_run_a_server_of_its_own(tmp_path: Path, read_log: Callable[[], str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interval = sys.getswitchinterval()
    Signalled(settings(tmp_path)).run()
    assert [line.split("] ")[1] for line in read_log().splitlines() if "[info " in line] == [
        "draining seconds=60.0 streams=0",
        "stopped",
    ]
    assert signal.getsignal(signal.SIGTERM) == before
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (interval, 0)


def test_where_a_server_says_it_is(tmp_path: Path) -> None:
    for given, url, public in (
        ({}, "ws://127.0.0.1:{}/", "ws://127.0.0.1:{}/"),
        ({"host": "0.0.0.0"}, "ws://0.0.0.0:{}/", f"ws://{socket.gethostname()}:{{}}/"),
        ({"no_tls": False}, "wss://127.0.0.1:{}/", "wss://127.0.0.1:{}/"),
        ({"public_url": "wss://example.com/agent"}, "ws://127.0.0.1:{}/", "wss://example.com/agent"),
    ):
        server = Server(settings(tmp_path, **given))
        server.bind()
        assert (server.url, server.public_url) == (url.format(server.port), public.format(server.port))
        with pytest.raises(ConfigError, match=f"port {server.port}: Address already in use; choose another"):
            Server(settings(tmp_path, port=server.port)).bind()
        assert server._socket is not None
        server._socket.close()


async def test_a_stream_of_a_server_in_this_process_may_finish_too(tmp_path: Path, read_log: Callable[[], str]) -> None:
    server = Server(settings(tmp_path, processors=[LISTENER]))
    server.bind()
    assert server.url == f"ws://127.0.0.1:{server.port}/"
    serving = asyncio.create_task(server.serve())
    peer = await (await Peer.connect(server.port, None)).upgraded("/", None)
    peer.send(start(peer.sid), media(1))
    listener = await Listener.of(peer.sid)
    signal.raise_signal(signal.SIGINT)
    async with asyncio.timeout(PATIENCE):
        while await readiness(await Peer.connect(server.port, None)) != 503:
            pass
    signal.raise_signal(signal.SIGINT)
    assert await peer.close_code() == 1001
    await serving
    assert "Traceback" not in read_log()
    assert (listener.stopped, len(listener.frames)) == ("shutdown", 1)
    await peer.close()


# --- What it says ----------------------------------------------------------------------------------------------------


async def test_it_says_where_it_listens_and_what_to_paste(spawn: Spawn) -> None:
    process = await spawn("--port", "0", "--public-url", "wss://streams.example.com/agent")
    await process.listening()
    token = process.kept(STREAM_TOKEN_FILE)
    peer = await process.stream(token)
    peer.send(STOP)
    assert await peer.close_code() == 1000
    process.process.terminate()
    status, said, _ = await process.ended()
    assert status == 0
    lines = said.splitlines()
    assert lines[0] == f"listening on wss://0.0.0.0:{process.port}/"
    assert "token: state/token" in lines
    statement = ast.parse(said[said.index("stream_obj = ") :]).body[0]
    assert isinstance(statement, ast.Assign)
    assert ast.literal_eval(statement.value) == {
        "url": "wss://streams.example.com/agent",
        "realtime": True,
        "authorization_bearer_token": token,
    }


@pytest.mark.parametrize("by", ["flag", "environment"])
async def test_a_given_token_is_never_shown(serve: Spawn, by: str) -> None:
    admin = "admin-of-the-desk"
    if by == "flag":
        process = await serve("--token", f"desk:{TOKEN}", "--admin-token", admin, "--log-level", "debug")
    else:
        process = await serve(STREAMSINK_TOKENS=f"desk:{TOKEN}", STREAMSINK_ADMIN_TOKEN=admin)
    peer = await process.stream(TOKEN)
    peer.send(STOP)
    assert await peer.close_code() == 1000
    assert (await process.request(request("GET", "/metrics", f"Authorization: Bearer {admin}"))).status == 200
    process.process.terminate()
    status, said, log = await process.ended()
    assert status == 0
    assert "token=desk" in log
    for text in (said, log):
        assert TOKEN not in text
        assert admin not in text
    assert sorted(os.listdir(process.folder / "state")) == ["self-signed.crt", "self-signed.pem", "status-secret"]


async def test_without_tls_and_tokens(serve: Spawn) -> None:
    process = await serve("--no-tls", "--no-auth", "--max-streams", "1")
    assert process.context is None
    peer = await process.stream(None)
    refused = await process.request(upgrade("/", None))
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    peer.send(STOP)
    assert await peer.close_code() == 1000
    process.process.terminate()
    status, said, log = await process.ended()
    assert status == 0
    assert said.startswith(f"listening on ws://127.0.0.1:{process.port}/\n")
    assert "WARNING: --no-auth is on: anyone who reaches this port can stream to it\n" in log
    assert "Traceback" not in log


# --- Software that nobody here wrote ---------------------------------------------------------------------------------


async def test_streamdouble_completes_a_call(serve: Spawn, tmp_path: Path) -> None:
    process = await serve("--no-auth", "--no-tls", "-p", "echo")
    tone = (8000 * np.sin(np.arange(8000) / 5)).astype(np.int16)
    soundfile.write(tmp_path / "caller.wav", tone, 8000)
    caller = await asyncio.create_subprocess_exec(
        *(str(Path(sysconfig.get_path("scripts"), "streamdouble")), "call", f"ws://127.0.0.1:{process.port}/"),
        *("--audio", "caller.wav", "--out", "agent.wav", "--quiet-period", "3", "--json"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE):
        said, complained = await caller.communicate()
    assert caller.returncode == 0, (said, complained)
    heard, rate = soundfile.read(tmp_path / "agent.wav", dtype="int16")
    assert rate == 8000
    assert len(heard) >= len(tone)
    process.process.terminate()
    assert (await process.ended())[0] == 0
