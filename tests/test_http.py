"""The HTTP side of the port, over real TLS sockets."""

from __future__ import annotations

import asyncio
import json

import pytest

from streamsink.auth import REFUSAL_BODY
from streamsink.status import StatusEvent
from tests.conftest import Serve
from tests.peer import (
    ADMIN_TOKEN,
    STOP,
    TOKEN,
    Listener,
    Peer,
    Running,
    masked,
    media,
    request,
    start,
    upgrade,
)

pytestmark = pytest.mark.endpoint_loop

FORM = "Content-Type: application/x-www-form-urlencoded"
JSON = "Content-Type: application/json"


async def live(running: Running) -> tuple[Peer, Listener]:
    """A stream that has started."""
    peer = await running.stream()
    peer.send(start(peer.sid), media(1))
    return peer, await Listener.of(peer.sid)


def path_of(running: Running) -> str:
    return f"/status/{running.server.access.status_secret}"


# --- What is there ---------------------------------------------------------------------------------------------------


async def test_health(serve: Serve) -> None:
    running = await serve(max_streams=1)
    assert (await running.get("/healthz"))[::2] == (200, b"ok\n")
    assert (await running.get("/readyz"))[::2] == (200, b"ready\n")
    peer, _ = await live(running)
    assert (await running.get("/readyz"))[::2] == (503, b"full\n")
    peer.send(STOP)
    assert await peer.close_code() == 1000
    await running.streams_over()
    assert (await running.get("/readyz"))[::2] == (200, b"ready\n")
    running.server.endpoint.draining = True
    assert (await running.get("/readyz"))[::2] == (503, b"draining\n")
    assert (await running.get("/healthz"))[::2] == (200, b"ok\n")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [f"Authorization: Bearer {TOKEN}"],
        [f"Authorization: Basic {ADMIN_TOKEN}"],
        [f"Authorization: Bearer {ADMIN_TOKEN}", f"Authorization: Bearer {ADMIN_TOKEN}"],
    ],
    ids=["no token", "a stream's token", "Basic", "two headers"],
)
async def test_what_is_the_admins_is_nobody_elses(serve: Serve, headers: list[str]) -> None:
    running = await serve()
    for path in ("/metrics", "/", "/api/v1/streams"):
        response = await running.get(path, *headers)
        assert (response.status, response.body, response.headers["www-authenticate"]) == (401, REFUSAL_BODY, "Bearer")


async def test_the_admin_gets_metrics_and_nothing_else_yet(serve: Serve) -> None:
    running = await serve()
    admin = f"Authorization: Bearer {ADMIN_TOKEN}"
    metrics = await running.get("/metrics", admin)
    assert metrics.status == 200
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\nstreamsink_streams_active 0.0\n" in metrics.body
    assert (await running.get("/", admin)).status == 404
    assert (await running.request(request("DELETE", "/api/v1/streams", admin))).status == 404
    assert (await running.get("/nowhere", admin)).status == 404
    assert (await running.request(request("POST", "/healthz"))).status == 405


# --- Status webhooks -------------------------------------------------------------------------------------------------

CXML = {
    "AccountSid": "account",
    "CallSid": "",
    "ConferenceSid": "conference",
    "StreamSid": "",
    "StreamName": "front desk",
    "StreamEvent": "stream-error",
    "StreamError": "codec_error",
    "StreamTrack": "inbound",
    "Timestamp": "2026-11-20T20:42:18Z",
    "Unique-ID": "unique",
}


def cxml(**fields: str) -> str:
    return "&".join(f"{key}={value.replace(' ', '+')}" for key, value in {**CXML, **fields}.items())


def relay(call: str) -> bytes:
    params = {"call_id": call, "node_id": "node", "control_id": "control", "state": "finished", "name": "front desk"}
    return json.dumps({"event_type": "calling.call.stream", "timestamp": 1.5, "params": params}).encode()


@pytest.mark.parametrize("way", ["cxml by GET", "cxml by POST", "relay by POST"])
async def test_a_webhook_reaches_its_live_stream(serve: Serve, way: str) -> None:
    running = await serve()
    other, deaf = await live(running)
    peer, listener = await live(running)
    path = path_of(running)
    if way == "cxml by GET":
        response = await running.get(f"{path}?{cxml(StreamSid=peer.sid)}")
    elif way == "cxml by POST":
        response = await running.request(request("POST", path, FORM, body=cxml(StreamSid=peer.sid).encode()))
    else:
        response = await running.request(request("POST", path, JSON, body=relay(f"call-{peer.sid}")))
    assert (response.status, response.body) == (204, b"")
    (event,) = listener.statuses
    assert deaf.statuses == []
    if way == "relay by POST":
        wanted = StatusEvent(
            event="finished",
            shape="relay",
            call_sid=f"call-{peer.sid}",
            name="front desk",
            timestamp="1.5",
            fields={
                "event_type": "calling.call.stream",
                "timestamp": "1.5",
                "params.call_id": f"call-{peer.sid}",
                "params.node_id": "node",
                "params.control_id": "control",
                "params.state": "finished",
                "params.name": "front desk",
            },
        )
    else:
        wanted = StatusEvent(
            event="stream-error",
            shape="cxml",
            stream_sid=peer.sid,
            name="front desk",
            error="codec_error",
            timestamp="2026-11-20T20:42:18Z",
            fields={**CXML, "StreamSid": peer.sid},
        )
    assert event == wanted
    assert f"stream={peer.sid}" in running.log or way == "relay by POST"
    assert "stream status" in running.log
    assert running.server.access.status_secret not in running.log
    for stream in (other, peer):
        stream.send(STOP)
        assert await stream.close_code() == 1000


async def test_a_webhook_of_no_live_stream_is_taken_all_the_same(serve: Serve) -> None:
    running = await serve()
    peer, listener = await live(running)
    response = await running.get(f"{path_of(running)}?{cxml(StreamSid='gone')}")
    assert response.status == 204
    assert listener.statuses == []
    assert "live=False" in running.log
    await peer.close()


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([FORM], b"StreamSid=x"),
        ([JSON], b'{"event_type":'),
        ([JSON], b"[1]"),
        ([JSON], b"[" * 10_000),
        ([FORM], b"\xff\x00" * 100),
        ([], b"x"),
    ],
    ids=["no event", "broken JSON", "an array", "nested", "no text", "anything"],
)
async def test_a_webhook_that_is_none_is_refused_and_counted(serve: Serve, headers: list[str], body: bytes) -> None:
    running = await serve()
    response = await running.request(request("POST", path_of(running), *headers, body=body))
    assert response.status == 400
    assert await running.counters("messages_bad") == {'messages_bad_total{reason="status"}': 1.0}


async def test_a_wrong_secret_finds_nothing(serve: Serve) -> None:
    running = await serve()
    for secret in ("", "wrong", "%ff", "..", "%C3%BC"):
        for method in ("GET", "POST"):
            response = await running.request(request(method, f"/status/{secret}?{cxml()}", FORM))
            assert (response.status, response.body) == (404, b"Not Found")
    assert "stream status" not in running.log


# --- Limits ----------------------------------------------------------------------------------------------------------


def chunked(size: int, step: int = 4096) -> bytes:
    chunk = b"%x\r\n" % step + b"x" * step + b"\r\n"
    return chunk * (size // step) + b"0\r\n\r\n"


@pytest.mark.parametrize("no_tls", [False, True], ids=["TLS", "no TLS"])
@pytest.mark.parametrize("by", ["announced", "sent", "chunked", "pipelined"])
async def test_a_body_beyond_64_kib_is_refused(serve: Serve, by: str, no_tls: bool) -> None:
    running = await serve(no_tls=no_tls)
    healthy = await running.healthy()
    head = request("POST", path_of(running), FORM)[:-2]
    peer = await running.connect()
    if by == "announced":
        peer.send(head + b"Content-Length: 65537\r\n\r\n")
    elif by == "sent":
        peer.send(head + b"Content-Length: 65537\r\n\r\n" + b"x" * 65537)
    elif by == "chunked":
        peer.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(81920))
    else:
        peer.send(request("GET", "/healthz") + head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(81920))
        assert (await peer.response()).status == 200
    response = await peer.response()
    assert (response.status, response.body) == (413, b"a request's body may have 65536 bytes\n")
    assert await peer.ended() == b""
    await healthy.finish()
    assert await running.counters("messages_bad", "handshakes") == {}


@pytest.mark.parametrize("way", ["announced", "chunked"])
async def test_a_body_of_64_kib_is_taken(serve: Serve, way: str) -> None:
    running = await serve()
    body = f"StreamEvent=stream-started&StreamName={'n' * 65536}".encode()[:65536]
    if way == "announced":
        response = await running.request(request("POST", path_of(running), FORM, body=body))
    else:
        head = request("POST", path_of(running), FORM, "Transfer-Encoding: chunked")
        pieces = [body[start : start + 8192] for start in range(0, 65536, 8192)]
        response = await running.request(
            head + b"".join(b"2000\r\n" + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
        )
    assert response.status == 204


@pytest.mark.parametrize("first", [b"", request("GET", "/healthz")], ids=["alone", "pipelined"])
async def test_a_slow_body_is_given_up(serve: Serve, first: bytes) -> None:
    running = await serve()
    healthy = await running.healthy()
    with running.head_deadline(1.0):
        peer = await running.connect()
        peer.send(first + request("POST", path_of(running), FORM)[:-2] + b"Content-Length: 100\r\n\r\nhalf")
        if first:
            assert (await peer.response()).status == 200
        response = await peer.response()
    assert (response.status, response.headers["connection"]) == (408, "close")
    assert await peer.ended() == b""
    await healthy.finish()


@pytest.mark.parametrize("head", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
async def test_a_slow_head_is_given_up(serve: Serve, head: bytes) -> None:
    running = await serve()
    healthy = await running.healthy()
    with running.head_deadline(1.0):
        peer = await running.connect()
        peer.send(head)
        assert (await peer.response()).status == 408
    assert await peer.ended() == b""
    await healthy.finish()
    assert await running.counters("handshakes") == {'handshakes_refused_total{reason="timeout"}': 1.0}


async def test_a_head_that_trickles_in_has_no_more_time(serve: Serve) -> None:
    running = await serve(head_deadline=0.3)
    peer = await running.connect()
    loop = asyncio.get_running_loop()
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000
    position = 0

    def trickle() -> None:
        nonlocal position
        if not peer.writer.transport.is_closing():
            peer.send(head[position : position + 1])
            position += 1
            loop.call_later(0.02, trickle)

    trickle()
    assert (await peer.response()).status == 408
    assert position < 1000


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n folded: b\r\nX\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n",
        request("POST", "/healthz", "Transfer-Encoding: chunked") + b"zz\r\n",
    ],
    ids=[
        "zeros",
        "a word",
        "no Host",
        "two Hosts",
        "two lengths",
        "a negative length",
        "no colon",
        "a head too long",
        "a chunk without a size",
    ],
)
async def test_what_is_no_http_is_refused(serve: Serve, data: bytes) -> None:
    running = await serve()
    healthy = await running.healthy()
    response = await running.request(data)
    assert response.status == 400
    await healthy.finish()
    assert await running.counters("handshakes") == {'handshakes_refused_total{reason="invalid"}': 1.0}


async def test_a_body_that_breaks_after_its_answer_is_no_error(serve: Serve) -> None:
    running = await serve()
    peer = await running.connect()
    peer.send(request("POST", "/healthz", "Transfer-Encoding: chunked"))
    assert (await peer.response()).status == 405
    peer.send(b"zz\r\n")
    assert (await peer.response()).status == 400
    assert await peer.ended() == b""


async def test_an_upgrade_to_something_else_is_a_plain_request(serve: Serve) -> None:
    running = await serve()
    assert (await running.get("/healthz", "Connection: Upgrade", "Upgrade: h2c")).status == 200


async def test_a_client_that_leaves_within_its_body_is_no_error(serve: Serve) -> None:
    running = await serve()
    peer = await running.connect()
    peer.send(request("POST", path_of(running), FORM)[:-2] + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
    # The body is being waited for.
    assert (await peer.response()).status == 100
    peer.reset()
    tasks = running.server._uvicorn.server_state.tasks  # type: ignore[union-attr]
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert "Traceback" not in running.log


# --- One connection, many requests -----------------------------------------------------------------------------------


async def test_a_connection_is_kept_and_requests_may_be_pipelined(serve: Serve) -> None:
    running = await serve()
    peer = await running.connect()
    for _ in range(2):
        peer.send(request("GET", "/healthz"))
        assert (await peer.response())[::2] == (200, b"ok\n")
    posted = request("POST", path_of(running), FORM, body=cxml().encode())
    peer.send(request("GET", "/healthz"), posted, request("GET", "/readyz"), posted, request("GET", "/nowhere"))
    assert [(await peer.response()).status for _ in range(5)] == [200, 204, 200, 204, 404]


async def test_a_kept_connection_may_end_in_an_upgrade(serve: Serve) -> None:
    running = await serve()
    peer = await running.connect()
    # All in one segment, the frames too.
    peer.send(request("GET", "/healthz"), upgrade(), start(peer.sid), media(1), masked(b"x", 9))
    assert (await peer.response()).status == 200
    assert (await peer.response()).status == 101
    assert await peer.frame() == (10, b"x")
    listener = await Listener.of(peer.sid)
    peer.send(media(2), STOP)
    assert await peer.close_code() == 1000
    assert [frame.start for frame in listener.frames] == [0, 160]


async def test_a_client_that_asks_to_close_is_let_go(serve: Serve) -> None:
    running = await serve()
    peer = await running.connect()
    peer.send(request("GET", "/healthz", "Connection: close"))
    assert (await peer.response()).status == 200
    assert await peer.ended() == b""
