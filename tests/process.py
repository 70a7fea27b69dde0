"""The real process, `streamsink serve`, for tests to start, talk to and end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from streamsink.tls import CERTIFICATE_FILE
from tests.peer import PATIENCE, Peer, Response, media, request, start

ROOT = Path(__file__).parent.parent


async def readiness(peer: Peer) -> int:
    """The status of /readyz."""
    peer.send(request("GET", "/readyz"))
    status = (await peer.response()).status
    await peer.close()
    return status


class Process:
    """`streamsink serve` as a process of its own, in a folder of its own."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.process = process
        self.said: list[str] = []
        self.port = 0
        self.context: ssl.SSLContext | None = None
        self._peers: list[Peer] = []

    async def listening(self) -> None:
        """Wait until it has said where it listens."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = (await self.process.stdout.readline()).decode()
        self.said.append(line)
        told = re.fullmatch(r"listening on (wss?)://[^/]*:(\d+)/\n", line)
        assert told, line + (await self.process.communicate())[1].decode()
        self.port = int(told[2])
        if told[1] == "wss":
            self.context = ssl.create_default_context(cafile=self.folder / "state" / CERTIFICATE_FILE)

    async def connect(self) -> Peer:
        peer = await Peer.connect(self.port, self.context)
        self._peers.append(peer)
        return peer

    async def request(self, data: bytes) -> Response:
        peer = await self.connect()
        peer.send(data)
        response = await peer.response()
        await peer.close()
        return response

    async def stream(self, token: str | None) -> Peer:
        """A stream that has started."""
        peer = await (await self.connect()).upgraded("/", token)
        peer.send(start(peer.sid, name="call"), media(1))
        return peer

    async def drains(self) -> None:
        """Wait until it takes no more streams."""
        async with asyncio.timeout(PATIENCE):
            while await readiness(await self.connect()) != 503:
                pass

    async def ended(self) -> tuple[int, str, str]:
        """Its exit status and what it said in all on stdout and on stderr."""
        async with asyncio.timeout(PATIENCE):
            stdout, stderr = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, "".join(self.said) + stdout.decode(), stderr.decode()

    def kept(self, name: str) -> str:
        """What lies in a file of the state folder, which nobody else may read."""
        path = self.folder / "state" / name
        assert path.stat().st_mode & 0o777 == 0o600
        return path.read_text().strip()

    def recordings(self) -> list[str]:
        return sorted(os.listdir(self.folder / "recordings"))

    def sidecar(self) -> dict[str, Any]:
        (path,) = (self.folder / "recordings").glob("*.json")
        sidecar: dict[str, Any] = json.loads(path.read_text())
        return sidecar

    async def close(self) -> None:
        for peer in self._peers:
            await peer.close()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()


class Spawn(Protocol):
    """Starts the process; with flags, and with environment variables."""

    async def __call__(self, *flags: str, **environment: str) -> Process: ...


@asynccontextmanager
async def processes(folder: Path) -> AsyncIterator[Spawn]:
    """Starts processes in a folder; what still runs at the end is killed."""
    async with AsyncExitStack() as stack:

        async def spawn(*flags: str, **environment: str) -> Process:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAMSINK_")}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "streamsink", "serve", "--state", "state", *flags),
                cwd=folder,
                env={**clean, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **environment},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            started = Process(folder, process)
            stack.push_async_callback(started.close)
            return started

        yield spawn
