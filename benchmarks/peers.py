"""The servers streamsink is compared with: ``python -m benchmarks.peers NAME --cert PEM --key PEM``.

Each echoes every media message of every stream over TLS, with the messages of the wire protocol:

- ``common``: what most people write. `websockets.serve`, json, base64, audioop, the standard event loop.
- ``picows``: the work streamsink does (token check, msgspec, G.711 to a numpy array and back) on `picows`, a WebSocket
  server in Cython, on uvloop and aiofastnet. Without streamsink's guards, metrics, processors and play-out.
- ``floor``: a bare `asyncio.Protocol` on the same loop that sends back the bytes it reads. It parses nothing, so what
  it costs is TLS, sockets and the loop: what no endpoint in Python can go below.

A server prints ``listening on wss://127.0.0.1:PORT`` and runs until it is terminated.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import hmac
import http
import json
import ssl
import sys
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import aiofastnet
import msgspec
import numpy as np
import uvloop

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # audioop, which audioop-lts replaces from 3.13 on
    import audioop

Serve = Callable[[ssl.SSLContext, str], Awaitable[asyncio.AbstractServer]]
"""Starts a server on a free port of 127.0.0.1, given its TLS context and the token to ask for."""


async def serve_common(tls: ssl.SSLContext, token: str) -> asyncio.AbstractServer:
    """The server most people would write."""
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.http11 import Request, Response

    def check(connection: ServerConnection, request: Request) -> Response | None:
        if hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {token}"):
            return None
        return connection.respond(http.HTTPStatus.UNAUTHORIZED, "")

    async def echo(connection: ServerConnection) -> None:
        sid = ""
        async for text in connection:
            message = json.loads(text)
            if message["event"] == "start":
                sid = message["start"]["streamSid"]
            elif message["event"] == "media":
                samples = audioop.ulaw2lin(base64.b64decode(message["media"]["payload"]), 2)
                payload = base64.b64encode(audioop.lin2ulaw(samples, 2)).decode()
                await connection.send(json.dumps({"event": "media", "streamSid": sid, "media": {"payload": payload}}))
            elif message["event"] == "stop":
                return

    return (await serve(echo, "127.0.0.1", 0, ssl=tls, process_request=check)).server


class _Connected(msgspec.Struct, tag_field="event", tag="connected"):
    pass


class _StartBody(msgspec.Struct, rename="camel"):
    stream_sid: str


class _Start(msgspec.Struct, tag_field="event", tag="start"):
    start: _StartBody


class _Audio(msgspec.Struct):
    payload: bytes


class _Media(msgspec.Struct, tag_field="event", tag="media"):
    media: _Audio


class _Stop(msgspec.Struct, tag_field="event", tag="stop"):
    pass


class _Reply(msgspec.Struct, tag_field="event", tag="media", rename="camel"):
    stream_sid: str
    media: _Audio


async def serve_picows(tls: ssl.SSLContext, token: str) -> asyncio.AbstractServer:
    """The same work on a WebSocket server in Cython."""
    import picows

    decode = msgspec.json.Decoder(_Connected | _Start | _Media | _Stop).decode
    encode = msgspec.json.Encoder().encode
    text = picows.WSMsgType.TEXT

    class Echo(picows.WSListener):
        sid = ""

        def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
            if frame.msg_type != text:
                return
            message = decode(frame.get_payload_as_bytes())
            if type(message) is _Media:
                samples = np.frombuffer(audioop.ulaw2lin(message.media.payload, 2), np.int16)
                payload = audioop.lin2ulaw(samples.data, 2)
                transport.send(text, encode(_Reply(self.sid, _Audio(payload))))
            elif type(message) is _Start:
                self.sid = message.start.stream_sid
            elif type(message) is _Stop:
                transport.send_close(picows.WSCloseCode.OK)
                transport.disconnect()

    def accept(request: picows.WSUpgradeRequest) -> Any:
        if hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {token}"):
            return Echo()
        response = picows.WSUpgradeResponse.create_error_response(http.HTTPStatus.UNAUTHORIZED)
        return picows.WSUpgradeResponseWithListener(response, None)

    return await picows.ws_create_server(accept, "127.0.0.1", 0, ssl=tls)


class _Floor(asyncio.Protocol):
    """Answers the upgrade without reading it, then sends back what comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport | aiofastnet.Transport)
        self.transport = transport
        self.write: Callable[[bytes], None] = self._upgrade

    def data_received(self, data: bytes) -> None:
        self.write(data)

    def _upgrade(self, _request: bytes) -> None:
        self.write = self.transport.write
        self.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")


async def serve_floor(tls: ssl.SSLContext, _token: str) -> asyncio.AbstractServer:
    """A bare TLS echo on the loop streamsink uses."""
    return await aiofastnet.create_server(asyncio.get_running_loop(), _Floor, "127.0.0.1", 0, ssl=tls)


PEERS: dict[str, tuple[Serve, Callable[[], asyncio.AbstractEventLoop]]] = {
    "common": (serve_common, asyncio.new_event_loop),
    "picows": (serve_picows, uvloop.new_event_loop),
    "floor": (serve_floor, uvloop.new_event_loop),
}
"""Each peer by name: what starts it and the event loop it runs on."""


async def _run(serve: Serve, tls: ssl.SSLContext, token: str) -> None:
    server = await serve(tls, token)
    host, port = server.sockets[0].getsockname()[:2]  # type: ignore[attr-defined]  # typeshed has it on Server only
    gc.freeze()
    print(f"listening on wss://{host}:{port}", flush=True)
    await asyncio.Event().wait()


def main(argv: list[str]) -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser(description="Run a server to compare with.")
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--cert", required=True, help="certificate, PEM")
    parser.add_argument("--key", required=True, help="its key, PEM")
    parser.add_argument("--token", default="", help="the bearer token to ask for")
    options = parser.parse_args(argv)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(options.cert, options.key)
    serve, loop_factory = PEERS[options.name]
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_run(serve, tls, options.token))


if __name__ == "__main__":
    main(sys.argv[1:])
