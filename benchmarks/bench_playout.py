"""How smoothly streams talk: many play at once from one core, over TLS, while as many are decoded.

Every stream plays PCMU frames of 20 ms and gets as many, which are decoded and handed to its processor. The far end,
on another core, notes when each frame arrives. With a lead of n frames, frame k is due (k - n + 1) × 20 ms after the
first one, on a clock that is set by whichever frame comes soonest. Lateness is how much later a frame comes, so that
it holds the pacer's, the loop's, TLS's and the far end's own. Underruns are those of a far end that plays what it
gets, and has nothing left before the next frame comes. `Stream.play` and streamsink's pacer are beside a task a stream
that sends a frame and sleeps 20 ms, after the same lead; that one drifts, by what it takes to wake up, until its lead
is gone.

Barge-in: what a processor that calls `Stream.clear` on a digit still lets out. Told are the times from that call, in
the endpoint, to the arrival of the `clear` and of the last frame of audio that comes after the call.

``python -m benchmarks.bench_playout [--quick]`` prints Markdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.bench_endpoint import TOKEN, Server, cores, pinned, running
from benchmarks.load import PTIME, cpu_seconds, masked_frame, media_text, start_text
from streamsink.loop import new_event_loop

STREAMS = (1, 100, 300)
LEADS_MS = (60, 100)
PACERS = {"streamsink": "benchmarks.talkers:Talker", "sleep(0.02)": "benchmarks.talkers:Sleeper:lead_ms={lead}"}
PHASES = 20
"""What comes in is spread over this many steps of a frame's time."""
WARMUP = 1.0
"""Seconds in which streams begin to talk, and as many that all of them do, before anything counts."""


@dataclass(frozen=True)
class Smoothness:
    """What the far end saw of one pacer with one number of streams.

    Attributes:
        frames: Frames in the measured stretch.
        p50_ms: Their lateness; likewise the others.
        underruns: Times that a stream had nothing left to play in that stretch.
        dry_streams: Streams to which that happened.
        cpu_us: CPU of the endpoint's process a stream and second, in µs.
        silenced_ms: From `clear()` to the last frame of audio, a stream each; 0 where none came after it.
        cleared_ms: From `clear()` to the arrival of the message, likewise.
    """

    frames: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    worst_ms: float
    underruns: int
    dry_streams: int
    cpu_us: float
    silenced_ms: Sequence[float] = ()
    cleared_ms: Sequence[float] = ()


class FarEnd(asyncio.Protocol):
    """One stream's platform: notes when what comes."""

    def __init__(self) -> None:
        self.upgraded = asyncio.get_running_loop().create_future()
        self.silent = asyncio.get_running_loop().create_future()
        self.arrivals: list[float] = []
        self.clear_at = 0.0
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport: Any = transport

    def send(self, frame: bytes) -> None:
        """Send what is framed already."""
        self.transport.write(frame)

    def data_received(self, data: bytes) -> None:
        """The answer to the upgrade, then frames (RFC 6455 §5.2: a server's are not masked)."""
        now = time.monotonic()
        data = self._rest + data
        if not self.upgraded.done():
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return
            if b" 101 " in head.partition(b"\r\n")[0]:
                self.upgraded.set_result(None)
            else:
                self.upgraded.set_exception(RuntimeError(head.decode("latin-1")))
        at, size = 0, len(data)
        while size - at >= 4:
            length, body = data[at + 1], at + 2
            if length == 126:
                length, body = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            if body + length > size:
                break
            if data[at] == 0x81:
                self.message(data[body : body + length], now)
            at = body + length
        self._rest = data[at:]

    def message(self, text: bytes, now: float) -> None:
        """One message of the endpoint's."""
        if text.startswith(b'{"event":"media"'):
            self.arrivals.append(now)
        elif text.startswith(b'{"event":"clear"'):
            self.clear_at = now
        elif text.startswith(b'{"event":"mark"') and not self.silent.done():
            self.silent.set_result(float(msgspec.json.decode(text)["mark"]["name"]))


def lateness(arrivals: Sequence[float], lead: int, since: float) -> list[float]:
    """Seconds by which each frame that came after ``since`` was late, with so many frames of lead."""
    against = [at - max(0, number - lead + 1) * PTIME for number, at in enumerate(arrivals)]
    soonest = min(against)
    return [each - soonest for each, at in zip(against, arrivals, strict=True) if at >= since]


def underruns(arrivals: Sequence[float], since: float) -> int:
    """How often a far end that plays what it gets had nothing left, from ``since`` on."""
    dry, ends = 0, arrivals[0]
    for at in arrivals:
        dry += at > ends and at >= since
        ends = max(at, ends) + PTIME
    return dry


async def connect(port: int, number: int) -> FarEnd:
    """Open one stream and start it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    _, far_end = await loop.create_connection(FarEnd, "127.0.0.1", port, ssl=context)
    far_end.send(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n"
    )
    await far_end.upgraded
    far_end.send(masked_frame(b'{"event":"connected","protocol":"Call","version":"0.2.0"}'))
    far_end.send(masked_frame(start_text(f"stream-{number}")))
    return far_end


async def talk_to(far_ends: Sequence[FarEnd]) -> None:
    """Send every stream a frame each 20 ms, spread evenly, on absolute deadlines."""
    loop = asyncio.get_running_loop()
    step, begin = 0, loop.time()
    while True:
        frame = masked_frame(media_text(step // PHASES))
        for far_end in far_ends[step % PHASES :: PHASES]:
            far_end.send(frame)
        step += 1
        await asyncio.sleep(begin + step * PTIME / PHASES - loop.time())


async def listen(pid: int, port: int, streams: int, lead: int, seconds: float) -> Smoothness:
    """Have streams talk, then fall silent, and tell how that went."""
    far_ends: list[FarEnd] = []
    talking = None
    digit = masked_frame(b'{"event":"dtmf","dtmf":{"digit":"1","duration":100}}')
    try:
        far_ends += [await connect(port, number) for number in range(streams)]
        talking = asyncio.create_task(talk_to(far_ends))
        for far_end in far_ends:
            # Not all at once: calls do not begin so.
            await asyncio.sleep(WARMUP / streams)
            far_end.send(digit)
        async with asyncio.timeout(30):
            while not all(far_end.arrivals for far_end in far_ends):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(WARMUP)
        since, cpu = time.monotonic(), cpu_seconds(pid)
        await asyncio.sleep(seconds)
        spent, until = cpu_seconds(pid) - cpu, time.monotonic()
        late = np.array([each for far_end in far_ends for each in lateness(far_end.arrivals, lead, since)]) * 1000
        dry = [underruns(far_end.arrivals, since) for far_end in far_ends]
        silenced, cleared = [], []
        for far_end in far_ends:
            far_end.send(digit)
            told = await asyncio.wait_for(far_end.silent, 10)
            await asyncio.sleep(PTIME / 2)
            cleared.append((far_end.clear_at - told) * 1000)
            silenced.append(max(0.0, far_end.arrivals[-1] - told) * 1000)
    finally:
        if talking is not None:
            talking.cancel()
        for far_end in far_ends:
            far_end.transport.abort()
    p50, p99, p999 = np.percentile(late, [50, 99, 99.9])
    return Smoothness(
        frames=len(late),
        p50_ms=float(p50),
        p99_ms=float(p99),
        p999_ms=float(p999),
        worst_ms=float(late.max()),
        underruns=sum(dry),
        dry_streams=sum(1 for each in dry if each),
        cpu_us=spent / (until - since) / streams * 1e6,
        silenced_ms=silenced,
        cleared_ms=cleared,
    )


@contextlib.contextmanager
def endpoint(pacer: str, lead_ms: int) -> Iterator[tuple[int, int]]:
    """Run streamsink with one of `PACERS`; yields its process id and its port."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "streamsink.toml")
        config.write_text(f"playout_lead_ms = {lead_ms}\n")
        spec = PACERS[pacer].format(lead=lead_ms)
        serve = ("-m", "streamsink", "serve", "--host", "127.0.0.1", "--port", "0", "--state", "state", "-p", spec)
        with running(Server(pacer, pacer, serve), ("--config", str(config))) as where:
            yield where


def measure(pacer: str, streams: int, lead_ms: int, seconds: float) -> Smoothness:
    """Run one pacer on one core and listen to it from another."""
    with (
        endpoint(pacer, lead_ms) as (pid, port),
        pinned(cores()[1]),
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        return runner.run(listen(pid, port, streams, round(lead_ms / 1000 / PTIME), seconds))


def table(measured: dict[tuple[int, int, str], Smoothness]) -> str:
    """Lateness, underruns and CPU as a Markdown table."""
    head = ["streams", "lead, ms", "pacer", "late p50 / p99 / p99.9, ms", "worst, ms", "underruns", "streams run dry"]
    head += ["CPU a stream, % of a core"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (streams, lead_ms, pacer), seen in measured.items():
        cells = [
            str(streams),
            str(lead_ms),
            f"`{pacer}`",
            f"{seen.p50_ms:.2f} / {seen.p99_ms:.2f} / {seen.p999_ms:.2f}",
        ]
        cells += [f"{seen.worst_ms:.1f}", str(seen.underruns), str(seen.dry_streams), f"{seen.cpu_us / 1e4:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def barge_in_table(measured: dict[tuple[int, int, str], Smoothness]) -> str:
    """How soon it is silent, as a Markdown table; streamsink's pacer alone."""
    head = ["streams", "lead, ms", "`clear()` to `clear` at the far end p50 / worst, ms"]
    head += ["`clear()` to the last audio worst, ms", "streams that sent any"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (streams, lead_ms, pacer), seen in measured.items():
        if pacer == "streamsink":
            cleared = f"{np.median(seen.cleared_ms):.2f} / {max(seen.cleared_ms):.2f}"
            any_after = sum(1 for each in seen.silenced_ms if each)
            lines.append(f"| {streams} | {lead_ms} | {cleared} | {max(seen.silenced_ms):.2f} | {any_after} |")
    return "\n".join(lines)


def run(out: Path, quick: bool = False) -> str:
    """Measure every pacer, number of streams and lead; returns Markdown.

    Args:
        out: Not used: there is no plot.
        quick: Few streams, for a short time.
    """
    counts, seconds = ((1, 20), 2.0) if quick else (STREAMS, 15.0)
    measured = {
        (streams, lead_ms, pacer): measure(pacer, streams, lead_ms, seconds)
        for streams in counts
        for lead_ms in LEADS_MS
        for pacer in PACERS
    }
    text = textwrap.dedent(__doc__).strip()
    return f"## Talking\n\n{text}\n\n{table(measured)}\n\n### Barge-in\n\n{barge_in_table(measured)}\n"


if __name__ == "__main__":
    print(run(Path(), "--quick" in sys.argv[1:]))
