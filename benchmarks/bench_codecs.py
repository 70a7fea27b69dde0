"""What a codec call costs from Python, in µs, beside every library that can be installed for it.

Each call turns one payload into an int16 array, or one int16 array into a payload, with everything a user would have to
do for that: `np.frombuffer` behind audioop and G722's, packets and frames around PyAV. The libraries take turns, a call
each, so that whatever else the machine does hits all alike; each call is timed by itself and the clock's own cost is
taken off. "FFmpeg's own loop" is PyAV given 10 s at once and divided, so that its cost per call vanishes and what
remains is FFmpeg's C alone; ours still is called from Python for every frame.
"""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import av
import G722
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from streamsink.audio import Samples
from streamsink.codec import CodecSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the standard library's, up to 3.12
    import audioop

mpl.use("agg")
from matplotlib import pyplot as plt

CALLS = 3000
FRAMINGS_MS = (10, 20, 40, 1000)
CODECS = ("PCMU", "PCMA", "G722", "L16@16000h", "L16@16000h big-endian")

OURS = "streamsink"
LOOP = "FFmpeg's own loop"

Call = Callable[[Any], object]
Order = Literal["little", "big"]


def speech_like(rate: int, seconds: float) -> Samples:
    """Three drifting partials that swell and fade four times a second, and a little noise."""
    t = np.arange(int(rate * seconds)) / rate
    voice = sum(np.sin(2 * np.pi * 120 * k * t + np.sin(3 * t)) / k for k in (1, 5, 18))
    noise = np.random.default_rng(1).normal(0, 60, len(t))
    samples: Samples = (6000 * voice * np.abs(np.sin(12 * t)) + noise).astype(np.int16)
    return samples


def timed(calls: Mapping[str, Call], arguments: list[Any]) -> dict[str, NDArray[np.float64]]:
    """µs of each call, the contestants by turns, the clock's own cost taken off."""
    clock = time.perf_counter_ns
    taken: dict[str, list[int]] = {name: [] for name in calls}
    empty = []
    gc.collect()
    gc.disable()
    try:
        turns = list(calls.items())
        for argument in arguments:
            began = clock()
            empty.append(clock() - began)
            turns.append(turns.pop(0))  # another finds the argument cold
            for name, call in turns:
                began = clock()
                call(argument)
                taken[name].append(clock() - began)
    finally:
        gc.enable()
    floor = float(np.median(empty))
    warm = len(arguments) // 10
    return {name: (np.array(each[warm:]) - floor) / 1000 for name, each in taken.items()}


def av_codec(direction: Literal["r", "w"]) -> av.AudioCodecContext:
    """FFmpeg's G.722 by way of PyAV."""
    context = av.CodecContext.create("g722", direction)
    context.layout = "mono"
    if direction == "w":
        context.sample_rate = 16_000
        context.format = av.AudioFormat("s16")
        context.open()
    return context


def av_decode(payload: bytes, context: av.AudioCodecContext) -> list[Samples]:
    """A payload to arrays."""
    return [frame.to_ndarray()[0] for frame in context.decode(av.Packet(payload))]


def av_encode(samples: Samples, context: av.AudioCodecContext) -> bytes:
    """An array to a payload."""
    frame = av.AudioFrame.from_ndarray(samples[None, :], format="s16", layout="mono")
    frame.sample_rate = 16_000
    return b"".join(bytes(packet) for packet in context.encode(frame))


def decoders(name: str, byteorder: Order) -> dict[str, Call]:
    """Who decodes that codec."""
    ours = CodecSpec.parse(name).decoder(byteorder).decode
    if name == "G722":
        library, context = G722.G722(16_000, 64_000), av_codec("r")
        return {OURS: ours, "G722": library.decode, "PyAV": lambda payload: av_decode(payload, context)}
    if name == "PCMU":
        return {OURS: ours, "audioop": lambda payload: np.frombuffer(audioop.ulaw2lin(payload, 2), np.int16)}
    if name == "PCMA":
        return {OURS: ours, "audioop": lambda payload: np.frombuffer(audioop.alaw2lin(payload, 2), np.int16)}
    if byteorder == "big":
        return {OURS: ours, "numpy": lambda payload: np.frombuffer(payload, ">i2").astype(np.int16)}
    return {OURS: ours, "numpy": lambda payload: np.frombuffer(payload, "<i2").copy()}


def encoders(name: str, byteorder: Order) -> dict[str, Call]:
    """Who encodes it."""
    ours = CodecSpec.parse(name).encoder(byteorder).encode
    if name == "G722":
        library, context = G722.G722(16_000, 64_000), av_codec("w")
        return {OURS: ours, "G722": library.encode, "PyAV": lambda samples: av_encode(samples, context)}
    if name == "PCMU":
        return {OURS: ours, "audioop": lambda samples: audioop.lin2ulaw(samples, 2)}
    if name == "PCMA":
        return {OURS: ours, "audioop": lambda samples: audioop.lin2alaw(samples, 2)}
    if byteorder == "big":
        return {OURS: ours, "numpy": lambda samples: samples.astype(">i2").tobytes()}
    return {OURS: ours, "numpy": lambda samples: samples.tobytes()}


def own_loop(samples: Samples, payload: bytes, frames: int, rounds: int) -> dict[str, float]:
    """µs a frame that FFmpeg takes when it is given all frames at once: the best of some rounds, either way."""
    best = {"decode": np.inf, "encode": np.inf}
    for _ in range(rounds):
        reader, writer = av_codec("r"), av_codec("w")
        packet = av.Packet(payload)
        frame = av.AudioFrame.from_ndarray(samples[None, :], format="s16", layout="mono")
        frame.sample_rate = 16_000
        began = time.perf_counter_ns()
        reader.decode(packet)
        decoded = time.perf_counter_ns()
        writer.encode(frame)
        encoded = time.perf_counter_ns()
        best["decode"] = min(best["decode"], (decoded - began) / 1000 / frames)
        best["encode"] = min(best["encode"], (encoded - decoded) / 1000 / frames)
    return best


def measure(codec: str, ptime: int, calls: int) -> dict[str, dict[str, NDArray[np.float64]]]:
    """µs a call by direction and contestant."""
    name, _, order = codec.partition(" ")
    byteorder: Order = "big" if order else "little"
    spec = CodecSpec.parse(name)
    frame = spec.rate * ptime // 1000
    count = max(30, calls * 20 // ptime if ptime > 20 else calls)
    samples = speech_like(spec.rate, 20)
    starts = [i * frame % (len(samples) - frame) // 2 * 2 for i in range(count)]
    frames = [samples[start : start + frame].copy() for start in starts]
    encoder = spec.encoder(byteorder)
    payloads = [encoder.encode(each) for each in frames]
    return {
        "decode": timed(decoders(name, byteorder), payloads),
        "encode": timed(encoders(name, byteorder), frames),
    }


def plot(bars: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """G.722's µs a 20 ms frame by contestant, for both directions."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(bars["decode"])
    for i, (direction, values) in enumerate(bars.items()):
        at = np.arange(len(names)) + (i - 0.5) * 0.38
        drawn = axes.barh(at, [values[name] for name in names], 0.36, label=direction)
        axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("µs for 20 ms of G.722, median")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(out: Path, quick: bool = False) -> str:
    """Measure, draw ``codecs.png`` into `out`, and tell in Markdown."""
    calls = 300 if quick else CALLS
    lines = ["## Codecs", "", " ".join((__doc__ or "").split()), ""]
    lines += ["| codec | | block | who | p50 µs | p99 µs | times ours |", "|---|---|--:|---|--:|--:|--:|"]
    bars: dict[str, dict[str, float]] = {"decode": {}, "encode": {}}
    for codec in CODECS:
        for ptime in FRAMINGS_MS:
            for direction, taken in measure(codec, ptime, calls).items():
                medians = {who: float(np.median(each)) for who, each in taken.items()}
                for who, each in taken.items():
                    ratio = "" if who == OURS else f"{medians[who] / medians[OURS]:.1f}"
                    lines.append(
                        f"| {codec} | {direction} | {ptime} ms | {who} | {medians[who]:.2f} | "
                        f"{np.percentile(each, 99):.2f} | {ratio} |"
                    )
                if (codec, ptime) == ("G722", 20):
                    bars[direction] = medians
    samples = speech_like(16_000, 10)
    loop = own_loop(samples, CodecSpec.parse("G722").encoder().encode(samples), 500, 3 if quick else 15)
    for direction, medians in bars.items():
        medians[LOOP] = loop[direction]
    plot(bars, out / "codecs.png")
    lines += ["", "G.722, 20 ms, medians, as a multiple of ours:", ""]
    others = [who for who in bars["decode"] if who != OURS]
    lines += ["| | streamsink | " + " | ".join(others) + " |", "|---|--:|" + "--:|" * len(others)]
    for direction, medians in bars.items():
        cells = [f"{medians[who]:.2f} µs ({medians[who] / medians[OURS]:.1f}×)" for who in others]
        lines.append(f"| {direction} | {medians[OURS]:.2f} µs | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![µs for 20 ms of G.722](codecs.png)", ""])


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    print(run(results, quick="--quick" in sys.argv))
