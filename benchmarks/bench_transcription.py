"""How well and how fast the embedded engine transcribes, and what that does to the calls.

Recorded and synthetic speech (`speech/` of STREAMSINK_TESTDATA, or of `../shared/testdata`) is sent as a conference
would send it, in real time, through a whole session: codec, voice activity detection, pre-roll, worker processes.

Word error rate: words wrong, missing or too many, against the words that are in the file; "mr" counts as "mister".
Latency: from the moment the talker's last sound arrived to the final transcript at `on_transcript`. Event-loop lag:
how late a timer of 5 ms runs, on the loop that carries the calls; for comparison the same with
the decoder in a thread.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile

from streamsink import log
from streamsink.audio import Samples
from streamsink.codec import CodecSpec, Resampler
from streamsink.config import Pipeline, Settings
from streamsink.endpoint import Endpoint
from streamsink.loop import new_event_loop
from streamsink.metrics import Metrics
from streamsink.plugins import Plugin
from streamsink.processor import Processor
from streamsink.processors.transcribe import Transcribe
from streamsink.session import Session
from streamsink.speech.events import Transcript
from streamsink.speech.transcription_counts import counts
from streamsink.stream import Stream
from streamsink.wire import PlatformWriter

TESTDATA = Path(os.environ.get("STREAMSINK_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))
WORDS = {
    "flite-rms_s1": "hello this is a test of the conference bridge",
    "flite-rms_s2": "please leave a message after the tone",
    "flite-rms_s3": "we will meet again next tuesday at three thirty in the afternoon",
    "librivox_0870": "and mister john dashwood had then leisure to consider how much there might be prudently in his "
    "power to do for them",
    "librivox_0880": "he was not an ill disposed young man",
    "librivox_0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
    "cards_005": "eight of spades four of clubs seven of hearts",
}
"""What is said in `<name>_16k.wav`."""
CODECS = ("L16@16000h", "G722", "PCMU", "PCMA")
CARDS = """#JSGF V1.0;
grammar cards;
public <cards> = <card>+;
<card> = <rank> of <suit>;
<rank> = ace | two | three | four | five | six | seven | eight | nine | ten | jack | queen | king;
<suit> = clubs | diamonds | hearts | spades;
"""
LEAD, TAIL = 0.5, 3.0
"""Seconds of silence before and behind the speech."""
TIMER = 0.005
"""Seconds."""
TALKERS = 4
APART = 0.3
"""Seconds between the starts of calls that are to run side by side."""


@dataclass
class Heard:
    """What one call brought.

    Attributes:
        text: The finals, one after the other.
        late: Seconds from the talker's last sound to the last final; None without one.
    """

    text: str = ""
    late: float | None = None


class Told(Processor):
    """Keeps the finals and when they came, under the stream's name."""

    finals: ClassVar[dict[str, list[tuple[float, str]]]] = {}

    async def on_start(self, stream: Stream) -> None:
        """Make the list."""
        self._own: list[tuple[float, str]] = []
        self.finals[stream.sid] = self._own

    def on_transcript(self, transcript: Transcript) -> None:
        """Keep it."""
        if transcript.final and transcript.text:
            self._own.append((time.perf_counter(), transcript.text))


class Nowhere:
    """The connection of a call nobody speaks back to."""

    def send(self, text: bytes) -> None:
        """Drop it."""

    def close(self, code: int, reason: str) -> None:
        """Nothing to close."""

    def limit_unsent(self, octets: int) -> None:
        """Nothing waits."""


def missing() -> str | None:
    """Why nothing can be measured; None when it can."""
    folder = TESTDATA / "speech"
    if not folder.is_dir():
        return f"skipped: there is no {folder}; STREAMSINK_TESTDATA names the folder that has `speech/`"
    return None


def speech(name: str) -> tuple[Samples, float]:
    """A file's samples at 16 kHz with silence around, and when in it the talker stops, in seconds."""
    samples: Samples = soundfile.read(TESTDATA / "speech" / f"{name}_16k.wav", dtype="int16")[0]
    windows = samples[: len(samples) // 160 * 160].reshape(-1, 160).astype(float)
    level = np.sqrt(np.mean(windows**2, axis=1))
    stops = (np.flatnonzero(level > 0.02 * level.max())[-1] + 1) / 100
    padded = np.concatenate([np.zeros(int(LEAD * 16_000)), samples, np.zeros(int(TAIL * 16_000))])
    return padded.astype(np.int16), LEAD + float(stops)


def errors(said: str, heard: str) -> tuple[int, int]:
    """Words wrong, missing or too many, and words said."""
    reference, words = said.split(), re.sub(r"\bmr\b", "mister", heard).split()
    row = list(range(len(words) + 1))
    for number, word in enumerate(reference, 1):
        before, row = row, [number]
        for place, other in enumerate(words):
            row.append(min(before[place + 1] + 1, row[place] + 1, before[place] + (word != other)))
    return row[-1], len(reference)


async def call(endpoint: Endpoint, name: str, codec: str) -> Heard:
    """Play a file to a stream of its own, as fast as people talk."""
    spec = CodecSpec.parse(codec)
    samples, stops = speech(name)
    if spec.rate != 16_000:
        samples = Resampler(16_000, spec.rate).push(samples)
    sid = uuid.uuid4().hex
    writer, encoder, size, loop = PlatformWriter(sid), spec.encoder(), spec.frame_samples, endpoint.loop
    session = Session(endpoint, Nowhere(), path="/", pipeline="default", client="", token_name="", now=loop.time())
    start = writer.start(
        account_sid="",
        call_sid="",
        encoding=spec.name,
        sample_rate=spec.rate,
        tracks=["inbound"],
        custom_parameters={},
        name=None,
    )
    session.receive(start, loop.time())
    started, began = loop.time(), time.perf_counter()
    for number in range(len(samples) // size):
        await asyncio.sleep(started + (number + 1) * spec.ptime / 1000 - loop.time())
        payload = encoder.encode(samples[number * size : (number + 1) * size])
        media = writer.media(payload, chunk=number + 1, timestamp_ms=number * spec.ptime, track="inbound")
        session.receive(media, loop.time())
    session.receive(writer.stop(), loop.time())
    await session.done.wait()
    finals = Told.finals.pop(sid)
    late = finals[-1][0] - began - stops if finals else None
    return Heard(" ".join(text for _, text in finals), late)


async def several(calls: Sequence[tuple[str, str]], at_once: int, options: dict[str, Any]) -> list[Heard]:
    """Calls of a file and a codec each, so many at once, begun a little apart."""
    gate = asyncio.Semaphore(at_once)
    plugins = [Plugin("transcribe", Transcribe, options), Plugin("told", Told, {})]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(pipelines={"default": Pipeline(processors=["transcribe"])}, recordings=Path(folder))
        endpoint = Endpoint(settings, {"default": plugins}, Metrics(), asyncio.get_running_loop())

        async def one(number: int, name: str, codec: str) -> Heard:
            async with gate:
                await asyncio.sleep(number % at_once * APART)
                return await call(endpoint, name, codec)

        # The first load what all need: an engine, and a decoder for each who talks at once.
        await asyncio.gather(*(call(endpoint, *calls[0]) for _ in range(at_once)))
        try:
            return await asyncio.gather(*(one(number, *each) for number, each in enumerate(calls)))
        finally:
            endpoint.detectors.close()


async def lag(until: asyncio.Event) -> list[float]:
    """Seconds by which a timer is late, over and over."""
    late = []
    while not until.is_set():
        # Not the loop's own clock, which counts milliseconds.
        due = time.perf_counter() + TIMER
        await asyncio.sleep(TIMER)
        late.append(max(0.0, time.perf_counter() - due))
    return late


async def lag_while(work: asyncio.Future[object]) -> list[float]:
    """The lag until the work is done."""
    over = asyncio.Event()
    work.add_done_callback(lambda _: over.set())
    return await lag(over)


def in_a_thread(name: str) -> None:
    """Decode a file as somebody would who has not looked: in a thread of the process that carries the calls."""
    from pocketsphinx import Decoder

    decoder = Decoder(loglevel="FATAL", fwdflat=False)
    samples, _ = speech(name)
    decoder.start_utt()
    for start in range(0, len(samples), 1600):
        decoder.process_raw(samples[start : start + 1600].tobytes())
    decoder.end_utt()


def accuracy(quick: bool) -> list[str]:
    """The table of word error rates."""
    groups = (
        {"flite": ["flite-rms_s1"], "LibriVox": ["librivox_0880"]}
        if quick
        else {group: [name for name in WORDS if name.startswith(group.lower())] for group in ("flite", "LibriVox")}
    )
    lines = ["| codec | " + " | ".join(f"{group}, WER" for group in groups) + " |", "|---|" + "--:|" * len(groups)]
    for codec in ("PCMU",) if quick else CODECS:
        names = [name for group in groups.values() for name in group]
        heard = dict(zip(names, run_calls([(name, codec) for name in names], at_once=2), strict=True))
        cells = []
        for group in groups.values():
            wrong, said = np.sum([errors(WORDS[name], heard[name].text) for name in group], axis=0)
            cells.append(f"{100 * wrong / said:.1f} %")
        lines.append(f"| {codec} | {' | '.join(cells)} |")
    return lines


def run_calls(calls: Sequence[tuple[str, str]], at_once: int, **options: Any) -> list[Heard]:
    """Run calls on the endpoint's own event loop."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(several(calls, at_once, options))


def grammar() -> str:
    """What a grammar of cards makes of a phrase in G722."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsgf") as file:
        file.write(CARDS)
        file.flush()
        (heard,) = run_calls([("cards_005", "G722")], 1, grammar=Path(file.name))
    exact = "exactly" if heard.text == WORDS["cards_005"] else "wrongly"
    return f"A grammar of cards in G722: {exact} ({heard.text})."


def load(codec: str, rounds: int) -> dict[str, str]:
    """Four talkers at once, over and over: latency and lag, by column."""
    names = [name for name in WORDS if not name.startswith("cards")]
    calls = [(names[number % len(names)], codec) for number in range(TALKERS * rounds)]

    async def measured() -> tuple[list[Heard], list[float]]:
        work = asyncio.ensure_future(several(calls, TALKERS, {}))
        lags = await lag_while(work)  # type: ignore[arg-type]
        return work.result(), lags

    dropped, (audio, busy) = counts.dropped.copy(), counts.work
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        heard, lags = runner.run(measured())
    latencies = [each.late for each in heard if each.late is not None]
    late = np.percentile(latencies, [50, 99]) if latencies else (np.nan, np.nan)
    lag = np.percentile(lags, [50, 99, 100]) * 1000
    return {
        "codec": codec,
        "real-time factor": f"{(counts.work[1] - busy) / (counts.work[0] - audio):.2f}",
        "latency p50": f"{late[0]:.2f} s",
        "latency p99": f"{late[1]:.2f} s",
        "loop lag p50": f"{lag[0]:.2f} ms",
        "loop lag p99": f"{lag[1]:.2f} ms",
        "loop lag most": f"{lag[2]:.2f} ms",
        "interims dropped": f"{counts.dropped['interim'] - dropped['interim']}",
        "holes": f"{counts.dropped['utterance'] - dropped['utterance']}",
        f"no final {TAIL:g} s after": f"{len(calls) - len(latencies)}",
    }


def thread_lag() -> str:
    """The loop's lag while one file is decoded in a thread."""

    async def measured() -> list[float]:
        return await lag_while(asyncio.ensure_future(asyncio.to_thread(in_a_thread, "flite-rms_s1")))

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        late = runner.run(measured())
    return (
        f"One decoder in a thread of the same process: lag p99 {np.percentile(late, 99) * 1000:.0f} ms, "
        f"at most {max(late) * 1000:.0f} ms."
    )


def run(out: Path, quick: bool = False) -> str:
    """Measure; returns the report's part."""
    log.configure("text", "warning")
    title = "## Transcription"
    reason = missing()
    if reason is not None:
        return f"{title}\n\n{reason}\n"
    rows = [load(codec, 1 if quick else 4) for codec in (("PCMU",) if quick else ("L16@16000h", "PCMU"))]
    table = [list(rows[0]), ["---", *["--:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    parts = [
        title,
        "\n".join(accuracy(quick)),
        grammar(),
        f"{TALKERS} talkers at once:",
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        thread_lag(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(run(Path()))
