"""What a message costs on its way through streamsink, stage by stage, in µs of one core: no socket, no TLS.

In: a WebSocket frame is cut out and unmasked, parsed (JSON, base64, validation), placed on the track's clock (loss,
duplicates, flood), decoded and dispatched to a processor's `on_frame`. Out: `play()` queues, a frame is encoded,
serialised (base64, JSON) and written (WebSocket header, transport). The whole way runs through a real `Connection`
with a transport that drops what it gets; parse, decode, dispatch, encode, serialise and write are also timed alone,
and what they leave of the whole is framing and placing, or queueing. Resampling to 16 kHz comes on top where a
processor asks for that rate.

The floor is the least that could be done in Python with the same codec: in, msgspec decoding a struct of the payload
alone, decoding and one call; out, encoding, base64 between two constants and one call.

Each figure is the median over blocks of calls, the empty loop's time taken off; p99 is over the blocks too.
"""

from __future__ import annotations

import asyncio
import binascii
import itertools
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from benchmarks.load import masked_frame
from streamsink import log, wire
from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec, Resampler
from streamsink.config import Settings
from streamsink.connection import Connection
from streamsink.endpoint import Endpoint
from streamsink.metrics import Metrics
from streamsink.plugins import Plugin
from streamsink.processor import Chain, Processor
from streamsink.stream import Stream

CODECS = ("PCMU", "PCMA@40i", "G722", "L16@16000h", "L16@24000h@40i")
RATE = 16_000
"""Hz; what the resampling stage makes."""
BLOCK = 100
"""Calls timed together."""
FRAMES = 1000
"""Different messages; after the last comes the first again, which streamsink takes for a new count."""

_ENCODINGS = {"PCMU": "audio/x-mulaw", "PCMA": "audio/x-alaw", "G722": "audio/G722", "L16": "audio/x-L16"}
_UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@dataclass(frozen=True)
class Timing:
    """What calls took, in µs: the median of blocks, and the 99th percentile."""

    p50: float
    p99: float


def timed(call: Callable[[], object], blocks: int) -> Timing:
    """Time a call in blocks, the empty loop taken off."""
    loop = _seconds(lambda: None, blocks)
    p50, p99 = np.percentile(_seconds(call, blocks), [50, 99]) - np.median(loop)
    return Timing(float(p50) * 1e6, float(p99) * 1e6)


def _seconds(call: Callable[[], object], blocks: int) -> list[float]:
    times = []
    for _ in range(blocks):
        began = time.perf_counter()
        for _ in itertools.repeat(None, BLOCK):
            call()
        times.append((time.perf_counter() - began) / BLOCK)
    return times


class Sink(Processor):
    """Takes frames and does nothing."""

    def __init__(self) -> None:
        self.started: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
        self.reached = asyncio.Event()
        self.frames = 0

    async def on_start(self, stream: Stream) -> None:
        """Pass the stream on, to play on it."""
        self.started.set_result(stream)

    def on_frame(self, frame: Frame) -> None:
        """Count; the first comes late, since what arrives during on_start is held."""
        self.frames += 1
        if self.frames == 1:
            self.reached.set()


class Nowhere(asyncio.Transport):
    """A transport that drops what it gets."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Drop it."""

    def is_closing(self) -> bool:
        """Never."""
        return False

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer to limit."""


class BareMedia(msgspec.Struct):
    """The one field without which there is no audio."""

    payload: bytes


class BareMessage(msgspec.Struct):
    """A media message of which nothing else is read."""

    media: BareMedia


def audio(spec: CodecSpec) -> Samples:
    """A second of something like speech: noise that swells; a codec's cost may hang on its input."""
    noise = np.random.default_rng(1).normal(0, 1, spec.rate)
    swell = 1500 * (1 + np.sin(np.arange(spec.rate) * 2 * np.pi * 4 / spec.rate))
    samples: Samples = (noise * swell).astype(np.int16)
    return samples


async def open_stream(spec: CodecSpec, clock: Callable[[], float]) -> tuple[Connection, Sink, Stream]:
    """A connection that has been upgraded and told the stream's start, with one processor on it."""
    sinks: list[Sink] = []

    class Kept(Sink):
        def __init__(self) -> None:
            super().__init__()
            sinks.append(self)

    endpoint = Endpoint(
        Settings(no_auth=True), {"default": [Plugin("sink", Kept, {})]}, Metrics(), asyncio.get_running_loop()
    )
    endpoint.clock = clock
    cls = type("BenchConnection", (Connection,), {"endpoint": endpoint, "tokens": None})
    config: Any = None
    state: Any = SimpleNamespace(connections=set())
    connection: Connection = cls(config, state, {})
    connection.connection_made(Nowhere())
    connection.data_received(_UPGRADE)
    writer = wire.PlatformWriter("7d56a2c1-0000-4000-8000-000000000000")
    connection.data_received(masked_frame(writer.connected()))
    connection.data_received(
        masked_frame(writer.start(account_sid="a", call_sid="c", encoding=_ENCODINGS[spec.name], sample_rate=spec.rate))
    )
    return connection, sinks[0], await sinks[0].started


async def stages(spec: CodecSpec, blocks: int) -> dict[str, Timing]:
    """Time every stage of both ways for one codec."""
    now = itertools.count(0, spec.ptime / 1000)
    time_now = [next(now)]
    connection, sink, stream = await open_stream(spec, lambda: time_now[0])

    samples = audio(spec)
    encoder = spec.encoder()
    pieces = [samples[at : at + spec.frame_samples] for at in range(0, len(samples), spec.frame_samples)]
    payloads = [encoder.encode(piece) for piece in pieces]
    writer = wire.PlatformWriter(stream.sid)
    texts = [writer.media(payloads[i % len(payloads)], chunk=i + 1, timestamp_ms=i * spec.ptime) for i in range(FRAMES)]
    frames = itertools.cycle(masked_frame(text) for text in texts)
    text = itertools.cycle(texts)
    payload = itertools.cycle(payloads)
    piece = itertools.cycle(pieces)

    def whole_in() -> None:
        time_now[0] = next(now)
        connection.data_received(next(frames))

    def whole_out() -> None:
        time_now[0] = next(now)
        stream.play(next(piece), spec.rate)

    whole_in()
    await sink.reached.wait()

    chain_sink = Sink()
    chain = Chain([("sink", chain_sink)], Metrics())
    chain.start(stream)
    frame = Frame(pieces[0], spec.rate, Track.INBOUND, 0, 0, 0)
    chain.frame(frame)
    await chain_sink.reached.wait()

    decoder = spec.decoder()
    resampler = Resampler(spec.rate, RATE) if spec.rate != RATE else None
    endpoint_writer = wire.Writer(stream.sid)
    bare = msgspec.json.Decoder(BareMessage)
    bare_text = itertools.cycle(texts)
    before = b'{"event":"media","streamSid":"' + stream.sid.encode() + b'","media":{"payload":"'
    nowhere = Nowhere()
    reply = endpoint_writer.media(payloads[0])

    def floor_in() -> None:
        sink.on_frame(decoder.decode(bare.decode(next(bare_text)).media.payload))  # type: ignore[arg-type]

    def floor_out() -> None:
        nowhere.write(before + binascii.b2a_base64(encoder.encode(next(piece)), newline=False) + b'"}}')

    timings = {
        "in": timed(whole_in, blocks),
        "parse": timed(lambda: wire.decode(next(text)), blocks),
        "decode": timed(lambda: decoder.decode(next(payload)), blocks),
        "dispatch": timed(lambda: chain.frame(frame), blocks),
        "floor in": timed(floor_in, blocks),
        "out": timed(whole_out, blocks),
        "encode": timed(lambda: encoder.encode(next(piece)), blocks),
        "serialise": timed(lambda: endpoint_writer.media(payloads[0]), blocks),
        "write": timed(lambda: connection.send(reply), blocks),
        "floor out": timed(floor_out, blocks),
    }
    if resampler is not None:
        timings["resample"] = timed(lambda: resampler.push(next(piece)), blocks)
    reached = sink.frames, chain_sink.frames
    if min(reached) < BLOCK * blocks:
        raise RuntimeError(f"of {BLOCK * blocks} frames each way to a processor only {reached} arrived")
    connection.connection_lost(None)
    await chain.stop("stop")
    return timings


IN = ("parse", "decode", "dispatch")
OUT = ("encode", "serialise", "write")


def way(timings: Mapping[str, Timing], whole: str, parts: tuple[str, ...]) -> list[str]:
    """The cells of one way: its stages, the rest, the whole, the floor, and how many times the floor that is."""
    rest = timings[whole].p50 - sum(timings[part].p50 for part in parts)
    floor = timings[f"floor {whole}"]
    return [
        *(f"{timings[part].p50:.2f}" for part in parts),
        f"{rest:.2f}",
        f"{timings[whole].p50:.2f} / {timings[whole].p99:.2f}",
        f"{floor.p50:.2f}",
        f"{timings[whole].p50 / floor.p50:.1f}",
    ]


def tables(measured: Mapping[str, Mapping[str, Timing]]) -> str:
    """Both ways as Markdown tables."""
    lines = ["### From the wire to `on_frame`, µs a message", ""]
    head = ["codec", *IN, "framing and placing", "whole p50 / p99", "floor", "times the floor", "resample"]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for codec, timings in measured.items():
        resample = f"{timings['resample'].p50:.2f}" if "resample" in timings else "–"
        lines.append("| " + " | ".join([codec, *way(timings, "in", IN), resample]) + " |")
    lines += ["", "### From `play()` to the wire, µs a message", ""]
    head = ["codec", *OUT, "queueing", "whole p50 / p99", "floor", "times the floor"]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join([codec, *way(timings, "out", OUT)]) + " |" for codec, timings in measured.items()]
    return "\n".join(lines)


def plot(measured: Mapping[str, Mapping[str, Timing]], path: Path) -> None:
    """Draw both ways as stacked bars, the floor beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, whole, parts, rest in zip(
        figure.subplots(1, 2, sharey=True), ("in", "out"), (IN, OUT), ("framing and placing", "queueing"), strict=True
    ):
        left = np.zeros(len(measured))
        for part in parts:
            width = np.array([timings[part].p50 for timings in measured.values()])
            axes.barh(list(measured), width, 0.5, left, label=part)
            left += width
        total = np.array([timings[whole].p50 for timings in measured.values()])
        axes.barh(list(measured), np.maximum(total - left, 0), 0.5, left, label=rest)
        floor = [timings[f"floor {whole}"].p50 for timings in measured.values()]
        axes.vlines(floor, np.arange(len(floor)) - 0.35, np.arange(len(floor)) + 0.35, "k", label="floor")
        axes.set(xlabel="µs a message", title={"in": "in, to on_frame", "out": "out, from play()"}[whole])
        axes.legend(fontsize="small")
    axes.invert_yaxis()  # of both, since they share it
    figure.savefig(path, dpi=110)


def run(out: Path, quick: bool = False) -> str:
    """Measure; returns Markdown and writes a plot.

    Args:
        out: Folder for the plot.
        quick: A tenth of the calls.
    """
    log.configure("text", "warning")
    blocks = 20 if quick else 200
    measured = {codec: asyncio.run(stages(CodecSpec.parse(codec), blocks)) for codec in CODECS}
    plot(measured, out / "path.png")
    text = textwrap.dedent(__doc__).strip()
    return f"## The path of a message\n\n{text}\n\n{tables(measured)}\n\n![stages](path.png)\n"


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    print(run(results, "--quick" in sys.argv[1:]))
