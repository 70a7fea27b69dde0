"""The processor transcribe: who is told what, what is kept of it, and what failures cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from streamsink.audio import Samples, Track
from streamsink.config import Settings
from streamsink.delivery.webhook import verify
from streamsink.errors import ProcessorError, SpeechError
from streamsink.plugins import find
from streamsink.processor import Processor
from streamsink.processors import transcribe
from streamsink.processors.transcribe import Transcribe
from streamsink.server import Server
from streamsink.simulator import SimulateOptions, simulate
from streamsink.speech import diarization, shared
from streamsink.speech.events import EngineError, Speech, SpeechChange, Transcript, VadSettings
from streamsink.speech.transcriber import Transcriber
from streamsink.speech.transcription import Capabilities, Engine, EngineOptions, Event, Recognition, Voice, find_engine
from streamsink.stream import Stream
from streamsink.tls import CERTIFICATE_FILE
from tests.conftest import Serve
from tests.peer import TOKEN
from tests.receiver import receiving
from tests.streams import SECRET, Line, counting, frame, make_stream

TESTDATA = Path(os.environ.get("STREAMSINK_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata")) / "speech"
needs_speech = pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"needs recorded speech; there is no {TESTDATA}")
BRIDGE = "hello this is a test of the conference bridge"
WORDS = "open sesame"

GATED = "tests.test_transcribe:Gated"
WHOLE = "tests.test_transcribe:Whole"


class Hears(Recognition):
    """Listens to the end, then says its lines."""

    def __init__(self, voice: Voice, lines: list[Event]) -> None:
        super().__init__(voice)
        self._lines = lines

    async def run(self) -> None:
        async for _ in self.audio:
            pass
        for line in self._lines:
            self.emit(line)


class Gated(Engine):
    """Says of each utterance what its class is told to say."""

    capabilities = Capabilities(rates=(8000,), interim=True)
    lines: ClassVar[list[Event]] = []
    loads: ClassVar[Callable[[], Any] | None] = None
    alive: ClassVar[int] = 0

    def __init__(self, options: EngineOptions) -> None:
        self.started = False

    async def start(self) -> None:
        loads = type(self).loads
        if loads is not None:
            await loads()
        Gated.alive += 1
        self.started = True

    def open(self, voice: Voice) -> Recognition:
        return Hears(voice, self.lines)

    async def close(self) -> None:
        Gated.alive -= self.started


class Whole(Gated):
    capabilities = Capabilities(rates=(8000,), endpointing=True)


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What the engine says of each utterance."""
    lines: list[Event] = [Transcript(0, 0, "open", False, 0.1, 0.2), Transcript(0, 1, WORDS, True, 0.1, 0.4)]
    monkeypatch.setattr(Gated, "lines", lines)
    monkeypatch.setattr(Gated, "alive", 0)
    # An engine belongs to the tests' options: none finds that of another.
    monkeypatch.setattr(transcribe, "_engines", shared.Shared())
    return lines


class Call:
    """A processor on a stream, and what it told."""

    def __init__(self, processor: Transcribe, stream: Stream, line: Line) -> None:
        self.processor = processor
        self.stream = stream
        self.told = line.transcripts

    def talk(self, start: float, end: float, track: Track = Track.INBOUND) -> None:
        """A talker, heard in frames of 20 ms, found by voice activity detection at once."""
        for position in range(round(start * 8000), round(end * 8000), 160):
            self.processor.on_frame(frame(counting(position, 160), position, track=track))
            if position == round(start * 8000):
                self.processor.on_speech(Speech(SpeechChange.STARTED, start, track))
        self.processor.on_speech(Speech(SpeechChange.STOPPED, end, track))

    @property
    def lines(self) -> list[dict[str, Any]]:
        (path,) = self.stream.recordings.glob("*.transcript.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.asynccontextmanager
async def a_call(
    tmp_path: Path, tracks: tuple[Track, ...] = (Track.INBOUND,), *, stopped: bool = True, **options: Any
) -> AsyncIterator[Call]:
    line = Line()
    processor = Transcribe(**{"engine": GATED, **options})
    stream = make_stream(tmp_path, line=line, processors=("transcribe",), tracks=tracks)
    await processor.on_start(stream)
    call = Call(processor, stream, line)
    yield call
    if stopped:
        await processor.on_stop("stop")


async def test_words_reach_the_other_processors_and_the_files(tmp_path: Path, read_log: Callable[[], str]) -> None:
    async with a_call(tmp_path) as call:
        assert call.processor.vad == VadSettings()
        assert not call.processor.speaks
        call.talk(1.0, 1.5)
    assert [(each.text, each.final, each.revision, each.speaker) for each in call.told] == [
        ("open", False, 0, "inbound"),
        (WORDS, True, 1, "inbound"),
    ]
    (line,) = call.lines
    assert line == {
        "start": 1.1,
        "end": 1.4,
        "text": WORDS,
        "track": "inbound",
        "speaker": "inbound",
        "final": True,
        "words": [],
        "utterance": 0,
        "confidence": None,
        "language": None,
        "dropped": False,
    }
    assert names(tmp_path) == {f"{call.stream.stem}{ending}" for ending in (".transcript.jsonl", ".vtt", ".srt")}
    assert "transcribed" in read_log()
    assert WORDS not in read_log()


async def test_what_was_said_is_on_the_disk_while_the_call_lasts(tmp_path: Path) -> None:
    async with a_call(tmp_path) as call:
        call.talk(0.0, 0.5)
        part = tmp_path / f"{call.stream.stem}.transcript.jsonl.part"
        for _ in range(1000):
            if part.stat().st_size:
                break
            await asyncio.to_thread(time.sleep, 0.005)
        assert json.loads(part.read_text())["text"] == WORDS


async def test_an_engine_with_endpointing_asks_for_no_detection(tmp_path: Path) -> None:
    async with a_call(tmp_path, engine=WHOLE) as call:
        assert call.processor.vad is None
        call.talk(0.0, 0.5)
    assert [each.text for each in call.told] == ["open", WORDS]


async def test_two_tracks_are_two_speakers(tmp_path: Path) -> None:
    async with a_call(tmp_path, (Track.INBOUND, Track.OUTBOUND)) as call:
        call.talk(0.0, 0.5, Track.OUTBOUND)
        call.talk(1.0, 1.5)
        # One that never sent audio has nothing to say.
        call.processor.on_speech(Speech(SpeechChange.STARTED, 0.0, Track.MIX))
    assert [
        (line["speaker"], line["track"], line["start"]) for line in sorted(call.lines, key=lambda x: x["start"])
    ] == [
        ("outbound", "outbound", 0.1),
        ("inbound", "inbound", 1.1),
    ]
    assert f"<v outbound>{WORDS}" in (tmp_path / f"{call.stream.stem}.vtt").read_text()


async def test_a_noise_is_nothing_and_a_hole_is_marked(
    tmp_path: Path, script: list[Event], read_log: Callable[[], str]
) -> None:
    script[:] = [Transcript(0, 0, "", True, 0.0, 0.1)]
    async with a_call(tmp_path) as call:
        call.talk(0.0, 0.5)
        await asyncio.sleep(0.01)
        script[:] = [EngineError("out of breath", recoverable=True)]
        call.talk(1.0, 1.5)
    assert [(each.final, each.dropped) for each in call.told] == [(True, True)]
    (line,) = call.lines
    assert (line["start"], line["end"], line["text"], line["dropped"]) == (1.0, 1.5, "", True)
    vtt = (tmp_path / f"{call.stream.stem}.vtt").read_text()
    assert vtt == "WEBVTT\n\nNOTE not transcribed: 00:00:01.000 to 00:00:01.500\n"
    assert "cause='out of breath'" in read_log()


async def test_each_final_is_told_to_a_webhook(tmp_path: Path) -> None:
    with receiving() as receiver:
        async with a_call(tmp_path, webhook=receiver.url) as call:
            call.talk(0.0, 0.5)
        (told,) = await asyncio.to_thread(receiver.wait)
        await asyncio.to_thread(call.stream.delivery.close, 5.0)
    assert told.pop("id")
    assert told == {
        "event": "transcript",
        "stream_sid": "7d56",
        "call_sid": "76ac",
        "name": "front desk",
        "file": f"{call.stream.stem}.transcript.jsonl",
        **call.lines[0],
    }
    (request,) = receiver.requests
    headers = request.headers
    assert verify(SECRET, headers["X-Streamsink-Timestamp"], headers["X-Streamsink-Signature"], request.body)


# --- Whose voice -----------------------------------------------------------------------------------------------------


class ByLength:
    """A diarization engine: the long-winded one and the other."""

    heard: ClassVar[list[tuple[int, int, float, float]]] = []

    def speaker(self, samples: Samples, sample_rate: int, start: float, end: float) -> str:
        self.heard.append((int(samples[0]), len(samples), start, end))
        return "long" if end - start > 0.5 else "short"


class Fails:
    def speaker(self, samples: Samples, sample_rate: int, start: float, end: float) -> str:
        raise RuntimeError(WORDS)


async def test_a_diarization_engine_names_the_voices_of_one_track(tmp_path: Path, script: list[Event]) -> None:
    ByLength.heard.clear()
    async with a_call(tmp_path, diarization="tests.test_transcribe:ByLength") as call:
        call.talk(0.0, 0.5)
        await asyncio.sleep(0.01)
        script[:] = [Transcript(0, 0, "a long speech", True, 0.0, 0.96)]
        call.talk(1.0, 2.0)
    assert [(line["speaker"], line["text"]) for line in call.lines] == [("short", WORDS), ("long", "a long speech")]
    assert [each.speaker for each in call.told] == ["inbound", "short", "long"]
    assert ByLength.heard == [(800, 2400, 0.1, 0.4), (8000, 7680, 1.0, 1.96)]


async def test_one_that_fails_is_not_asked_again(tmp_path: Path, read_log: Callable[[], str]) -> None:
    async with a_call(tmp_path, diarization="tests.test_transcribe:Fails") as call:
        call.talk(0.0, 0.5)
        call.talk(1.0, 1.5)
    assert [line["speaker"] for line in call.lines] == ["inbound", "inbound"]
    assert read_log().count("a diarization engine failed") == 1
    assert WORDS not in read_log()


def test_a_track_is_remembered_for_a_minute() -> None:
    voices = diarization.Diarization(ByLength, "inbound")
    assert asyncio.run(voices.speaker(0.0, 1.0)) == "inbound"
    for second in range(70):
        voices.frame(frame(counting(0, 8000), second * 8000))
    ByLength.heard.clear()
    assert asyncio.run(voices.speaker(0.0, 9.5)) == "long"
    assert ByLength.heard == [(0, 8000, 0.0, 9.5)]


@pytest.mark.parametrize("where", ["nowhere", "no_such_module:Name", "tests.test_transcribe:WORDS", "json:nothing"])
def test_what_is_no_diarization_engine_is_told(where: str) -> None:
    with pytest.raises(SpeechError, match=re.escape(where)):
        Transcribe(engine=GATED, diarization=where)


# --- Engines that load -----------------------------------------------------------------------------------------------


async def test_streams_share_an_engine_that_lingers_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_call(tmp_path), a_call(tmp_path):
        assert Gated.alive == 1
    assert Gated.alive == 1
    monkeypatch.setattr(shared, "LINGER", 0.0)
    async with a_call(tmp_path):
        assert Gated.alive == 1
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert Gated.alive == 0
    async with a_call(tmp_path):
        assert Gated.alive == 1


def test_an_event_loop_that_ends_takes_its_engines_along(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_call(tmp_path):
            assert Gated.alive == 1

    asyncio.run(main())
    assert Gated.alive == 0


async def test_what_goes_by_while_an_engine_loads_is_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = asyncio.Event()
    monkeypatch.setattr(Gated, "loads", loaded.wait)
    monkeypatch.setattr(transcribe, "LOADING", 0.0)
    async with a_call(tmp_path) as call:
        call.talk(0.0, 0.5)
        loaded.set()
        await asyncio.wait({call.processor._loading})
        call.talk(1.0, 1.5)
    assert [(line["start"], line["end"], line["dropped"]) for line in call.lines] == [
        (0.0, 0.5, True),
        (1.1, 1.4, False),
    ]


async def test_who_talks_while_an_engine_loads_is_heard_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = asyncio.Event()
    monkeypatch.setattr(Gated, "loads", loaded.wait)
    monkeypatch.setattr(transcribe, "LOADING", 0.0)
    async with a_call(tmp_path, (Track.INBOUND, Track.OUTBOUND)) as call:
        call.processor.on_frame(frame(counting(0, 160)))
        call.processor.on_speech(Speech(SpeechChange.STARTED, 0.0, Track.INBOUND))
        call.talk(0.0, 0.02, Track.OUTBOUND)
        loaded.set()
        await asyncio.wait({call.processor._loading})
        call.processor.on_frame(frame(counting(160, 160), 160))
        call.processor.on_frame(frame(counting(160, 160), 160, track=Track.OUTBOUND))
    said = [(line["start"], line["track"]) for line in call.lines if not line["dropped"]]
    assert said == [(0.12, "inbound")]


async def test_a_stop_that_is_cancelled_still_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(transcriber: Transcriber, patience: float) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Transcriber, "finish", never)
    async with a_call(tmp_path, stopped=False) as call:
        call.talk(0.0, 0.5)
        stopping = asyncio.ensure_future(call.processor.on_stop("stop"))
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
    assert f"{call.stream.stem}.vtt" in names(tmp_path)


async def test_an_engine_that_cannot_be_loaded_retires_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        await asked.wait()
        raise SpeechError("the model is broken: unpack it again")

    asked = asyncio.Event()
    asked.set()
    monkeypatch.setattr(Gated, "loads", refuse)
    for _ in range(2):
        with pytest.raises(SpeechError, match="unpack it again"):
            async with a_call(tmp_path):
                pass
    monkeypatch.setattr(transcribe, "LOADING", 0.0)
    asked.clear()
    async with a_call(tmp_path) as call:
        call.talk(0.0, 0.5)
        asked.set()
        await asyncio.wait({call.processor._loading})
        with pytest.raises(SpeechError, match="unpack it again"):
            call.talk(0.0, 0.5)


async def test_a_start_that_is_cancelled_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gated, "loads", asyncio.Event().wait)
    processor = Transcribe(engine=GATED)
    starting = asyncio.ensure_future(processor.on_start(make_stream(tmp_path)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert processor._use._kept.users == 0


# --- Files -----------------------------------------------------------------------------------------------------------


async def test_two_engines_on_one_stream_keep_two_transcripts(tmp_path: Path) -> None:
    line = Line()
    stream = make_stream(tmp_path, line=line, processors=("transcribe", "transcribe"))
    both = [Transcribe(engine=GATED), Transcribe(engine=WHOLE)]
    for processor in both:
        await processor.on_start(stream)
    for processor in both:
        await processor.on_stop("stop")
    assert len([name for name in names(tmp_path) if name.endswith(".transcript.jsonl")]) == 2
    assert f"{stream.stem}.transcript.jsonl" in names(tmp_path)


async def test_a_folder_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    async with a_call(tmp_path, directory=own) as call:
        call.talk(0.0, 0.5)
    assert sorted(path.suffix for path in own.iterdir()) == [".jsonl", ".srt", ".vtt"]


async def test_a_disk_that_takes_no_more_retires_the_processor(tmp_path: Path) -> None:
    async with a_call(tmp_path, stopped=False) as call:
        os.close(call.processor._part._fd)
        call.talk(0.0, 0.5)
        with contextlib.suppress(OSError):
            await call.processor._keeping
        with pytest.raises(OSError, match="Bad file descriptor"):
            call.talk(1.0, 1.5)
        with pytest.raises(OSError, match="Bad file descriptor"):
            await call.processor.on_stop("error")


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        ("not a grammar {", "cannot use this grammar or these keywords: syntax error"),
        (
            "#JSGF V1.0;\ngrammar x;\npublic <x> = qwertzuiop;\n",
            "grammar or these keywords: .*qwertzuiop",
        ),
        (None, "grammar or these keywords: .*qwertzuiop"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_one_sentence_at_the_servers_start(
    tmp_path: Path, grammar: str | None, told: str
) -> None:
    pytest.importorskip("pocketsphinx", reason="needs the speech extra")
    path = tmp_path / "x.jsgf"
    option = "keywords=qwertzuiop"
    if grammar is not None:
        path.write_text(grammar)
        option = f"grammar={path}"
    with pytest.raises(ProcessorError, match=told) as error:
        find(f"transcribe:{option}").build()
    assert "\n" not in str(error.value)


def test_keywords_that_can_be_used_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pocketsphinx", reason="needs the speech extra")
    plugin = find("transcribe:keywords=yes/1e-10,next tuesday")
    plugin.build()
    monkeypatch.setattr("sys.executable", "/no/python")
    plugin.build()
    # Another process cannot be had: that is no verdict on the words.
    find("transcribe:keywords=qwertzuiop").build()
    monkeypatch.setattr("sys.executable", "/bin/true")
    find("transcribe:keywords=qwertzuiop").build()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            "transcribe:engine=whisper",
            "processor `transcribe` cannot be built: there is no engine `whisper`; there are",
        ),
        ("transcribe:grammar=/no/cards.jsgf", "cannot be built: there is no grammar /no/cards.jsgf: give a path"),
        ("transcribe:webhook=ftp://here/", "cannot be built: "),
        ("transcribe:workers=0", "cannot be built: workers is 0; wanted 1 or more"),
        ("transcribe:keywords=yes,no/x", "cannot be built: 'no/x' is no keyword"),
    ],
)
def test_what_cannot_be_had_is_one_sentence_at_the_servers_start(tmp_path: Path, spec: str, told: str) -> None:
    settings = Settings(processors=[spec], state=tmp_path, recordings=tmp_path, no_tls=True)
    with pytest.raises(ProcessorError) as error:
        Server(settings)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_options_read_as_the_command_line_gives_them() -> None:
    plugin = find("transcribe:keywords=call back, help/1e-10,interim=false,hangover_ms=300,vad=energy")
    processor = plugin.build()
    assert isinstance(processor, Transcribe)
    assert processor._options == EngineOptions(keywords=("call back", "help/1e-10"), interim=False)
    assert processor.vad == VadSettings("energy", hangover_ms=300)


# --- The whole way ---------------------------------------------------------------------------------------------------


class Reader(Processor):
    """Keeps what the call's other processors say was said."""

    told: ClassVar[asyncio.Queue[Transcript]]

    def on_transcript(self, transcript: Transcript) -> None:
        self.told.put_nowait(transcript)


async def simulated(running: Any, name: str) -> Any:
    # Who loads an engine before the call does not hear it all at once, and late.
    key = ("pocketsphinx", EngineOptions(workers=1))
    use = transcribe._engines.take(key, lambda: find_engine(*key))
    await use.ready()
    use.end()
    return await simulate(
        SimulateOptions(
            file=TESTDATA / f"{name}_16k.wav",
            codec="G722",
            url=f"wss://localhost:{running.server.port}/",
            token=TOKEN,
            cafile=running.server.settings.state / CERTIFICATE_FILE,
        )
    )


def loud(path: Path) -> tuple[float, float]:
    """When in a recording the sound begins and ends, in seconds."""
    samples, rate = soundfile.read(path)
    where = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return float(where[0]) / rate, float(where[-1]) / rate


def workers() -> list[int]:
    """The transcription workers of this process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"pocketsphinx_worker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


@needs_speech
@pytest.mark.endpoint_loop
async def test_a_call_leaves_its_words_next_to_its_sound(serve: Serve) -> None:
    pytest.importorskip("pocketsphinx", reason="needs the speech extra")
    running = await serve(processors=["transcribe:workers=1", "record"])
    report = await simulated(running, "flite-rms_s1")
    assert (report.close_code, report.lost) == (1000, 0)
    await running.streams_over()
    (wav,) = running.recordings.glob("*.wav")
    cue = re.fullmatch(
        rf"WEBVTT\n\n00:00:(\d\d\.\d\d\d) --> 00:00:(\d\d\.\d\d\d)\n{BRIDGE}\n", wav.with_suffix(".vtt").read_text()
    )
    assert cue is not None
    starts, ends = loud(wav)
    assert abs(float(cue[1]) - starts) < 0.15
    assert abs(float(cue[2]) - ends) < 0.25
    assert BRIDGE in wav.with_suffix(".srt").read_text()
    assert {path.suffix for path in running.recordings.iterdir()} == {".wav", ".json", ".jsonl", ".vtt", ".srt"}
    assert BRIDGE not in running.log
    moved = await running.counters("transcription_finals", "transcription_latency_seconds_count")
    assert moved['transcription_finals_total{engine="pocketsphinx"}'] >= 1
    assert moved["transcription_latency_seconds_count"] >= 1


@needs_speech
@pytest.mark.endpoint_loop
async def test_a_worker_killed_in_mid_sentence_costs_no_call_and_no_recording(serve: Serve) -> None:
    pytest.importorskip("pocketsphinx", reason="needs the speech extra")
    Reader.told = asyncio.Queue()
    running = await serve(processors=["record", "transcribe:workers=1", "tests.test_transcribe:Reader"])
    calling = asyncio.ensure_future(simulated(running, "flite-rms_s1"))
    interim = await Reader.told.get()
    assert not interim.final
    (pid,) = workers()
    os.kill(pid, signal.SIGKILL)
    report = await calling
    assert (report.close_code, report.lost) == (1000, 0)
    await running.streams_over()
    (wav,) = running.recordings.glob("*.wav")
    sent = soundfile.info(TESTDATA / "flite-rms_s1_16k.wav")
    assert soundfile.info(wav).duration == pytest.approx(sent.duration, abs=0.02)
    assert json.loads(wav.with_suffix(".json").read_text())["complete"] is True
    (line,) = [json.loads(line) for line in wav.with_suffix(".transcript.jsonl").read_text().splitlines()]
    # It was heard twice, and the second time to its end.
    assert (line["text"], line["dropped"]) == (BRIDGE, False)
    assert "a transcription worker died" in running.log
    assert "processor retired" not in running.log
