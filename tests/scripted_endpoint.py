"""An endpoint that does what a test says, for the simulator to call, and a peer that does hardly anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from streamsink.audio import Samples


def tone(samples: int, rate: int = 8000) -> Samples:
    return (8000 * np.sin(np.arange(samples) * 2 * np.pi * 440 / rate)).astype(np.int16)


def write_sound(folder: Path) -> Path:
    """0.3 s, 15 frames of 20 ms."""
    path = folder / "tone.wav"
    soundfile.write(path, tone(2400), 8000, subtype="PCM_16")
    return path


class Endpoint:
    """A scripted endpoint that keeps what it was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self.streams: list[list[dict[str, Any]]] = []

    def payloads(self, stream: int = 0) -> list[str]:
        return [message["media"]["payload"] for message in self.streams[stream] if message["event"] == "media"]


@contextlib.asynccontextmanager
async def endpoint(
    certificate: Path | None,
    answer: Callable[[ServerConnection, dict[str, Any]], Awaitable[None]] | None = None,
    refuse: tuple[HTTPStatus, str] | None = None,
    **settings: Any,
) -> AsyncIterator[Endpoint]:
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)

    async def stream(connection: ServerConnection) -> None:
        messages: list[dict[str, Any]] = []
        this.streams.append(messages)
        try:
            async for text in connection:
                messages.append(json.loads(text))
                if answer is not None:
                    await answer(connection, messages[-1])
        except ConnectionClosed:
            pass

    def look(connection: ServerConnection, request: Request) -> Response | None:
        this.requests.append(request)
        return connection.respond(*refuse) if refuse is not None else None

    server: Server
    async with serve(stream, "127.0.0.1", 0, ssl=context, process_request=look, compression=None, **settings) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        this = Endpoint(f"{'wss' if certificate else 'ws'}://localhost:{port}/")
        yield this


async def echo(connection: ServerConnection, message: dict[str, Any]) -> None:
    if message["event"] == "media":
        await connection.send(json.dumps({"event": "media", "media": {"payload": message["media"]["payload"]}}))


class RawPeer:
    """Takes the upgrade if it is to, sends some bytes, and then nothing but its last word when the call is closed."""

    def __init__(self, *, accept: bool, then: bytes, last: bytes | None) -> None:
        self.accept = accept
        self.then = then
        self.last = last
        self.called = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = ServerProtocol()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if self.accept and isinstance(event, Request):
                        protocol.send_response(protocol.accept(event))
                        writer.write(b"".join(protocol.data_to_send()) + self.then)
                    elif isinstance(event, Frame):
                        self.called.set()
                if protocol.close_rcvd is not None:
                    self.hung_up.set()
                    if self.last is not None:
                        writer.write(self.last)
                        break
            writer.close()
            await writer.wait_closed()
        self.gone.set()
