"""The load: echo streams at 50 messages a second each, over TLS, from a process of its own.

``python -m benchmarks.load --port PORT --pid PID --streams 250`` plays the platform's part for PCMU streams of 20 ms
frames and prints one JSON object: turnaround, what was lost, what the server's process used, and what this one did.

So that the load is not what limits, every stream sends the same frame at the same step: all are rendered and masked
before. Phases are spread evenly over the 20 ms on absolute deadlines, late by the millisecond an epoll wait takes at
most. A reply is matched to the oldest frame that is out, and must contain the audio that was sent. The loop that does
this is C (load.c), compiled when the load starts.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import dataclasses
import json
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiofastnet
import numpy as np
from websockets.speedups import apply_mask

PTIME = 0.020
"""Seconds between two frames of a stream."""
PAYLOAD = base64.b64encode(bytes(37 * i % 127 for i in range(160)))
"""20 ms of PCMU as base64. Without 0x7F, the other name of zero, which no decoder and encoder keep."""

_FIRST = 100_000
"""Where the counters in the frames begin: high, so that every frame has the same length."""
_MASK = b"\x37\xfa\x21\x3d"
_HEAD = 8
"""Bytes of a client's frame before its text: two, two of length, four of mask."""


@dataclasses.dataclass
class Step:
    """What was seen with one number of streams."""

    streams: int
    seconds: float
    messages: int
    """Echoes in the measured stretch."""
    lost: int
    """Frames never echoed, warm-up included."""
    cut: int
    """Streams the server ended."""
    wrong: int
    """Replies without the audio that was sent."""
    p50_ms: float
    p99_ms: float
    p999_ms: float
    worst_ms: float
    server_cpu_us: float
    """CPU of the server's process, user and system, per message echoed."""
    server_share: float
    """CPU of the server's process per second."""
    load_share: float
    """CPU of the load's process per second: near 1, the load is what limits."""
    load_late_ms: float
    """99th percentile of how late after its deadline a frame was sent."""
    rss: int
    """Resident memory of the server, bytes."""


@dataclasses.dataclass
class Result:
    """A whole run against one server."""

    rss_start: int
    """Resident memory of the server after one stream has come and gone, bytes."""
    steps: list[Step]
    rss_end: int
    """The same after the last stream has ended, bytes."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads: its CPU clock, to the nanosecond (Linux)."""
    return time.clock_gettime((~pid << 3) | 2)  # the kernel's CPUCLOCK_SCHED of that process


def resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def masked_frame(text: bytes) -> bytes:
    """A text as a WebSocket frame of a client (RFC 6455 §5.2)."""
    size = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + struct.pack("!H", len(text))
    return b"\x81" + size + _MASK + apply_mask(text, _MASK)


def media_text(step: int) -> bytes:
    """The message all streams send at a step."""
    return (
        b'{"event":"media","sequenceNumber":"%d","media":{"track":"inbound","chunk":"%d","timestamp":"%d","payload":"%b"}}'
        % (_FIRST + step, _FIRST + step, 20 * (_FIRST + step), PAYLOAD)
    )


def start_text(sid: str) -> bytes:
    """The start message of a stream."""
    start = {
        "streamSid": sid,
        "accountSid": "b08dacad-6bf8-4ea3-a3fd-b5e2ab5ef7cb",
        "callSid": "76ac3b6f-2b5d-4a29-9f0e-3ab3d4b4c7ab",
        "tracks": ["inbound"],
        "customParameters": {},
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
    }
    return json.dumps({"event": "start", "sequenceNumber": "1", "start": start}, separators=(",", ":")).encode()


def build_loop(folder: Path) -> ctypes.CDLL:
    """Compile load.c into a folder and load it.

    Raises:
        RuntimeError: Python's OpenSSL is not a library of its own, so there is none to link.
        subprocess.CalledProcessError: There is no C compiler, or it failed.
    """
    openssl = aiofastnet.OPENSSL_DYN_LIBS
    if openssl is None:
        raise RuntimeError("the load needs libssl, but this Python has OpenSSL built in; use one that links it")
    source = Path(__file__).with_name("load.c")
    library = folder / "load.so"
    options = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run(["cc", *options, source, "-o", library, openssl.libssl, openssl.libcrypto], check=True)
    loop = ctypes.CDLL(str(library))
    loop.load_new.restype = ctypes.c_void_p
    for name in ("load_run", "load_drain", "load_wrong", "load_cut"):
        getattr(loop, name).restype = ctypes.c_long
    return loop


class Load:
    """All streams to one server.

    Args:
        loop: load.c, compiled.
        port: Where the server listens, on 127.0.0.1.
        token: The bearer token to send.
        pid: The server's process.
        longest: Seconds of load there will be in all.
        patience: Seconds after which what has not come back is lost.
    """

    def __init__(self, loop: ctypes.CDLL, port: int, token: str, pid: int, longest: float, patience: float) -> None:
        self._loop = loop
        self._port = port
        self._token = token
        self._pid = pid
        self._patience = patience
        frames = [masked_frame(media_text(step)) for step in range(int(longest / PTIME))]
        audio = _HEAD + media_text(0).index(PAYLOAD)
        masked_audio = frames[0][audio : audio + len(PAYLOAD)]
        self._kept = (b"".join(frames), masked_audio)  # C holds on to them
        size = len(frames[0])
        self._c = ctypes.c_void_p(
            loop.load_new(self._kept[0], len(self._kept[0]), size, PAYLOAD, masked_audio, len(PAYLOAD))
        )
        self._count = 0

    def run(self, counts: list[int], warmup: float, seconds: float, settle: float) -> Result:
        """Grow through the numbers of streams given, measuring at each, then end them all.

        Args:
            counts: Numbers of streams, rising.
            warmup: Seconds of load before each measured stretch.
            seconds: Length of a measured stretch.
            settle: Seconds the server has, after the last stream, to give memory back.

        Raises:
            ConnectionError: The server did not take a stream.
        """
        self._connect(1)
        self._measure(0.1, 0.1)
        self._end()
        time.sleep(1)
        rss_start = resident_bytes(self._pid)
        steps = []
        for count in counts:
            self._connect(count)
            steps.append(self._measure(warmup, seconds))
        self._end()
        time.sleep(settle)
        return Result(rss_start, steps, resident_bytes(self._pid))

    def _connect(self, count: int) -> None:
        """Open streams until there are `count`."""
        while self._count < count:
            self._open(f"7d56a2c1-0000-4000-8000-{self._count:012d}")
            self._count += 1

    def _open(self, sid: str) -> None:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 30, 0))
        stream = self._loop.load_open(self._c, connection.detach())
        if stream < 0:
            raise ConnectionError("the server did not complete the TLS handshake")
        self._write(
            stream,
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            b"Authorization: Bearer %b\r\n\r\n" % self._token.encode(),
        )
        answer = ctypes.create_string_buffer(4096)
        head = b""
        while b"\r\n\r\n" not in head:
            got = self._loop.load_read(self._c, stream, answer, len(answer))
            if got <= 0:
                raise ConnectionError("the server closed during the upgrade")
            head += answer.raw[:got]
        if not head.startswith(b"HTTP/1.1 101"):
            raise ConnectionError(f"the server answered {head.splitlines()[0]!r} to the upgrade, not 101")
        self._write(stream, masked_frame(b'{"event":"connected","protocol":"Call","version":"0.2.0"}'))
        self._write(stream, masked_frame(start_text(sid)))

    def _write(self, stream: int, data: bytes) -> None:
        self._loop.load_write(self._c, stream, data, len(data))

    def _measure(self, warmup: float, seconds: float) -> Step:
        room = int(2 * self._count * max(warmup, seconds) / PTIME) + 1000
        turnarounds, lateness = np.full(room, np.nan), np.full(room, np.nan)
        self._loop.load_begin(self._c, ctypes.c_double(PTIME))
        self._play(warmup, turnarounds, lateness)
        lateness.fill(np.nan)
        began, server_began, load_began = time.perf_counter(), cpu_seconds(self._pid), time.process_time()
        messages = self._play(seconds, turnarounds, lateness)
        took = time.perf_counter() - began
        server, load = cpu_seconds(self._pid) - server_began, time.process_time() - load_began
        rss = resident_bytes(self._pid)
        self._play(0, turnarounds[:0], lateness[:0], whole=True)
        lost = self._loop.load_drain(self._c, ctypes.c_double(self._patience))
        seen = turnarounds[:messages] if messages else np.full(1, np.inf)
        p50, p99, p999, worst = (float(value) * 1000 for value in np.percentile(seen, [50, 99, 99.9, 100]))
        return Step(
            streams=self._count,
            seconds=took,
            messages=messages,
            lost=lost,
            cut=self._loop.load_cut(self._c),
            wrong=self._loop.load_wrong(self._c),
            p50_ms=p50,
            p99_ms=p99,
            p999_ms=p999,
            worst_ms=worst,
            server_cpu_us=server / max(1, messages) * 1e6,
            server_share=server / took,
            load_share=load / took,
            load_late_ms=float(np.nanpercentile(lateness, 99)) * 1000,
            rss=rss,
        )

    def _play(self, seconds: float, turnarounds: Any, lateness: Any, whole: bool = False) -> int:
        """Send and read for some seconds; returns the number of echoes, whose turnarounds (s) are written."""
        double = ctypes.POINTER(ctypes.c_double)
        count: int = self._loop.load_run(
            self._c,
            ctypes.c_double(seconds),
            whole,
            turnarounds.ctypes.data_as(double),
            lateness.ctypes.data_as(double),
            ctypes.c_long(len(turnarounds)),
        )
        return count

    def _end(self) -> None:
        """End all streams as the platform does: stop, then what the server has not closed in 1 s is closed."""
        for stream in range(self._count):
            self._write(stream, masked_frame(b'{"event":"stop","sequenceNumber":"999"}'))
        self._loop.load_end(self._c, ctypes.c_double(1))
        self._count = 0


def main(argv: list[str]) -> None:
    """Run the load and print its result as JSON."""
    parser = argparse.ArgumentParser(description="Load an endpoint with echo streams.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True, help="the server's process, whose CPU and memory are read")
    parser.add_argument("--token", default="", help="bearer token")
    parser.add_argument("--streams", type=int, nargs="+", required=True, help="numbers of streams, rising")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds measured at each number of streams")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds until what does not come back is lost")
    parser.add_argument("--settle", type=float, default=0.0, help="seconds to give memory back at the end")
    options = parser.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    longest = 1 + (options.warmup + options.seconds + 1) * len(options.streams)
    with tempfile.TemporaryDirectory() as folder:
        load = Load(build_loop(Path(folder)), options.port, options.token, options.pid, longest, options.patience)
        result = load.run(options.streams, options.warmup, options.seconds, options.settle)
    json.dump(dataclasses.asdict(result), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
