from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from streamsink.simulator import Report, SimulateOptions, run
from streamsink.simulator.command import show
from tests.scripted_endpoint import RawPeer, echo, endpoint, write_sound


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sound(tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"file": None}, "give either a sound FILE"),
        ({"replay": Path("x")}, "give either a sound FILE"),
        ({"file": None, "replay": Path("x"), "streams": 2}, "--streams does not go with --replay"),
        ({"url": "https://localhost/"}, "--url has to begin with wss://"),
        ({"url": "localhost:8443"}, "--url has to begin with wss://"),
        ({"url": "wss://localhost:99999999/"}, "--url cannot be used"),
        ({"url": "wss://me:secret@localhost/"}, "use --token"),
        ({"codec": "OPUS"}, "OPUS"),
        ({"param": ["novalue"]}, "--param wants key=value"),
        ({"streams": 0}, "--streams is 0"),
        ({"seconds": 0.0}, "--seconds is 0"),
        ({"lose": 5.0}, "--lose is 5; it is a share"),
        ({"dtmf": "1x"}, "--dtmf holds 'X'"),
        ({"token": "a\r\nX: y"}, "--token holds a character"),
        ({"save": Path("/nowhere/at/all.wav")}, "there is no folder /nowhere/at"),
        ({"cafile": Path("/nowhere.pem")}, "--cafile /nowhere.pem holds no certificate"),
        ({"url": "wss://localhost/a b"}, "cannot stand in an HTTP request"),
    ],
)
def test_options_that_cannot_be_used_are_told_without_a_traceback(
    sound: Path, options: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(SimulateOptions(**{"file": sound, **options})) == 1
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.err.startswith("streamsink simulate: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_an_interrupt_stops_the_calls_politely(sound: Path, loop: str) -> None:
    program = f"""
import sys, pathlib, {loop}
from streamsink.simulator import SimulateOptions, run
options = SimulateOptions(file=pathlib.Path(sys.argv[1]), url=sys.argv[2],
    loop=True, json=True, streams=2)
sys.exit(run(options, {loop}.new_event_loop))
"""
    heard = asyncio.Event()

    async def listen(connection: ServerConnection, message: dict[str, Any]) -> None:
        if message["event"] == "media" and int(message["media"]["chunk"]) > 15:
            heard.set()

    async with endpoint(None, listen) as there:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", program, str(sound), there.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            async with asyncio.timeout(30):
                await heard.wait()
                process.send_signal(signal.SIGINT)
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert (process.returncode, err.decode()) == (0, "")
    told = json.loads(out)
    assert told["close_code"] == 1000
    assert told["frames_sent"] == len(there.payloads(0)) + len(there.payloads(1))
    assert [messages[-1]["event"] for messages in there.streams] == ["stop", "stop"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_second_interrupt_does_not_wait_for_the_endpoint(sound: Path, loop: str) -> None:
    program = f"""
import sys, pathlib, {loop}
from streamsink.simulator import SimulateOptions, run
options = SimulateOptions(file=pathlib.Path(sys.argv[1]), url=sys.argv[2], loop=True)
sys.exit(run(options, {loop}.new_event_loop))
"""
    peer = RawPeer(accept=True, then=b"", last=None)
    async with await asyncio.start_server(peer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(sound), f"ws://127.0.0.1:{port}/"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            async with asyncio.timeout(30):
                await peer.called.wait()
                process.send_signal(signal.SIGINT)
                await peer.hung_up.wait()
                process.send_signal(signal.SIGINT)
                shown = await process.communicate()
                await peer.gone.wait()
        finally:
            if process.returncode is None:
                process.kill()
    assert (process.returncode, shown) == (130, (b"", b""))


async def test_a_terminal_sees_the_progress_and_the_table(sound: Path) -> None:
    program = """
import sys, pathlib
from streamsink.simulator import SimulateOptions, run, simulation
# What comes back late is not lost.
simulation.GRACE = 20.0
sys.exit(run(SimulateOptions(file=pathlib.Path(sys.argv[1]), url=sys.argv[2], expect_echo=True)))
"""
    terminal, its_end = os.openpty()
    try:
        async with endpoint(None, echo) as there:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, str(sound), there.url),
                stdout=asyncio.subprocess.PIPE,
                stderr=its_end,
                env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            out, _ = await process.communicate()
        shown = os.read(terminal, 65_536)
    finally:
        os.close(terminal)
        os.close(its_end)
    assert process.returncode == 0
    assert b"playing" in shown
    assert out.decode().splitlines()[:4] == [
        "streams          1",
        "frames sent      15",
        "frames received  15",
        "lost             0",
    ]


def test_the_same_failure_of_many_streams_is_told_once(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(streams=3, failures=["cut off"] * 3 + ["lost"])
    show(report, as_json=True)
    shown = capsys.readouterr()
    assert shown.err == "streamsink simulate: cut off (3 streams)\nstreamsink simulate: lost\n"
    assert json.loads(shown.out)["streams"] == 3


def test_a_refused_run_says_so_in_a_sentence(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SimulateOptions(file=sound, url="ws://127.0.0.1:1/")) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("streamsink simulate: no connection to 127.0.0.1:1: ")
    assert shown.err.count("\n") == 1
