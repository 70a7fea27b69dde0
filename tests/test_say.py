"""A stream says texts: when it is heard, what is told of it, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import streamsink
from streamsink.audio import Frame
from streamsink.config import Pipeline, SpeechSettings
from streamsink.errors import SpeechError, StreamClosed
from streamsink.playout import BargeIn, Outcome, Played
from streamsink.plugins import find
from streamsink.processor import Processor
from streamsink.processors.announce import Announce
from streamsink.speech.espeak import Espeak
from streamsink.speech.synthesis import Spoken, Synthesizer
from streamsink.stream import Stream
from streamsink.testing import Dtmf, Result, run_processor
from tests.conftest import Serve
from tests.peer import LISTENER, Listener, eventually, start
from tests.speaking import loudness
from tests.streams import make_stream

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader (extra speech) is not installed"
)

SPEECH = Path(__file__).parent / "data" / "speech.wav"
TEXT = "Welcome to the conference. Please hold the line, somebody will be with you soon."


class Speaker(Processor):
    """Says texts at the start; 1 clears, 2 cancels, 3 says the first again."""

    def __init__(self, *texts: str, voice: str | None = None) -> None:
        self.texts = texts
        self.voice = voice
        self.played: list[Played] = []

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream
        self.playouts = [stream.say(text, self.voice) for text in self.texts]

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        if digit == "1":
            self.stream.clear()
        elif digit == "2":
            self.playouts[0].cancel()
        else:
            self.playouts.append(self.stream.say(self.texts[0]))

    async def on_stop(self, reason: str) -> None:
        self.played = [await playout for playout in self.playouts]


async def call(
    speaker: Speaker, seconds: float, *keys: Dtmf, codec: str = "L16@16000h", speech: SpeechSettings | None = None
) -> Result:
    silence = np.zeros(round(seconds * 16_000), np.int16)
    return await run_processor(speaker, silence, 16_000, codec=codec, events=keys, speech=speech)


@needs_espeak
@pytest.mark.parametrize("codec", ["PCMU", "PCMA@40i", "G722", "L16@24000h"])
async def test_a_text_is_heard_at_once_and_told_whole(codec: str) -> None:
    speaker = Speaker(TEXT, "Goodbye.")
    result = await call(speaker, 8, codec=codec)
    heard = result.heard.astype(float)
    loud = np.flatnonzero(np.abs(heard) > 1000) / result.sample_rate
    assert loud[0] < 0.1
    assert 3.5 < loud[-1] < 7.0
    # Speech has no silence longer than between two sentences.
    assert np.diff(loud).max() < 1.0
    assert -30 < loudness(result.played) < -10
    assert [(played.outcome, played.text_heard, played.error) for played in speaker.played] == [
        (Outcome.FINISHED, TEXT, None),
        (Outcome.FINISHED, "Goodbye.", None),
    ]
    assert sum(played.played_ms for played in speaker.played) == pytest.approx(
        1000 * len(result.played) / result.sample_rate, abs=50
    )


@needs_espeak
@pytest.mark.parametrize(("key", "outcome"), [("1", Outcome.INTERRUPTED), ("2", Outcome.CANCELLED)])
async def test_what_is_cut_off_tells_the_words_that_were_heard(key: str, outcome: Outcome) -> None:
    speaker = Speaker(TEXT)
    await call(speaker, 2, Dtmf(1.0, key))
    (played,) = speaker.played
    assert played.outcome is outcome
    # A cancelled one still plays what had been sent.
    assert 980 <= played.played_ms <= 1130
    assert TEXT.startswith(played.text_heard)
    assert TEXT[len(played.text_heard)] == " "
    assert "Welcome to" in played.text_heard
    assert "Please" not in played.text_heard


@needs_espeak
async def test_a_talker_barges_in() -> None:
    class Polite(Speaker):
        async def on_start(self, stream: Stream) -> None:
            self.stream = stream
            self.playouts = [stream.say(TEXT, barge_in=BargeIn())]

    speaker = Polite(TEXT)
    talker = soundfile.read(SPEECH, dtype="int16")[0]
    await run_processor(speaker, np.concatenate([np.zeros(16_000, np.int16), talker]), 16_000, silence_seconds=2)
    (played,) = speaker.played
    assert played.outcome is Outcome.INTERRUPTED
    # The talker begins at 1.25 s and has spoken long enough 300 ms later.
    assert 1400 < played.played_ms < 2000
    assert TEXT.startswith(played.text_heard)
    assert "Welcome to the" in played.text_heard
    assert "hold" not in played.text_heard


@needs_espeak
async def test_it_can_speak_again_after_a_clear() -> None:
    speaker = Speaker("One moment please.")
    result = await call(speaker, 4, Dtmf(0.5, "1"), Dtmf(1.0, "3"))
    assert [played.outcome for played in speaker.played] == [Outcome.INTERRUPTED, Outcome.FINISHED]
    loud = np.flatnonzero(np.abs(result.heard.astype(int)) > 1000) / result.sample_rate
    assert 0.95 < loud[loud > 0.6].min() < 1.15


@pytest.mark.parametrize("text", ["", " \n", "?! … — 💥"])
async def test_a_text_without_words_plays_nothing(text: str) -> None:
    speaker = Speaker(text)
    result = await call(speaker, 0.1)
    assert speaker.played == [Played(Outcome.FINISHED, 0, "")]
    assert len(result.played) == 0


@needs_espeak
async def test_a_voice_that_does_not_exist_is_told_to_who_waits() -> None:
    speaker = Speaker("The first text.", voice="nope")
    speaker.texts = ("The first text.",)
    result = await call(speaker, 3, Dtmf(0.5, "3"))
    first, second = speaker.played
    assert (first.outcome, first.played_ms, first.text_heard) == (Outcome.FAILED, 0, "")
    assert str(first.error).startswith("espeak has no voice 'nope'; wanted a language such as en-us")
    assert (second.outcome, second.text_heard) == (Outcome.FINISHED, "The first text.")
    assert len(result.played) > 8000


async def test_what_can_be_known_at_once_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(Speaker):
        async def on_start(self, stream: Stream) -> None:
            with pytest.raises(SpeechError, match="says nothing"):
                stream.say(b"says nothing")  # type: ignore[arg-type]

    with pytest.raises(SpeechError, match=r"say\(\) wants a text as str, got bytes"):
        await call(Speaker(b"bytes"), 0.1)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpeechError, match=r"pip install 'streamsink\[speech\]'"):
        await call(Speaker("hello"), 0.1)


async def test_a_program_speaks_in_a_call(tmp_path: Path) -> None:
    program = tmp_path / "beep.py"
    program.write_text(
        "import struct, sys\n"
        "text = sys.stdin.read()\n"
        "form = 1, 1, 22050, 44100, 2, 16\n"
        "head = struct.pack('<4sI4s4sIHHIIHH4sI', b'RIFF', 0, b'WAVE', b'fmt ', 16, *form, b'data', 0)\n"
        "sys.stdout.buffer.write(head + struct.pack('<h', 1000 * len(text)) * 22050)\n"
        "sys.exit('broken' in text)\n"
    )
    settings = SpeechSettings(synthesizer="command", command=f"{sys.executable} {program}")
    speaker = Speaker("One. Three.", "This is broken. Never heard.", "Two.")
    result = await call(speaker, 6, speech=settings)
    assert [(played.outcome, played.text_heard) for played in speaker.played] == [
        (Outcome.FINISHED, "One. Three."),
        (Outcome.FAILED, ""),
        (Outcome.FINISHED, "Two."),
    ]
    assert "failed (status 1)" in str(speaker.played[1].error)
    # Each sentence lasts a second, and joins the next without a gap.
    middles = result.heard[8000::16000]
    assert np.abs(middles - np.array([4000, 6000, 15000, 4000])).max() < 10
    assert np.abs(result.heard[15800:16200]).min() > 3500


class Metronome(Synthesizer):
    """A second of audio for each sentence; counts them."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.closed = 0

    async def open(self) -> None: ...

    async def speak(self, text: str, voice: str | None = None) -> AsyncGenerator[Spoken, None]:
        self.sentences.append(text)
        try:
            for tenth in range(10):
                yield Spoken(np.full(800, 1000, np.int16), 8000, len(text) if tenth == 9 else 0)
        finally:
            self.closed += 1

    async def close(self) -> None: ...


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_a_text_of_100_kb_is_synthesized_a_second_ahead(tmp_path: Path) -> None:
    engine = Metronome()
    stream = make_stream(tmp_path, synthesizer=engine)
    text = "This is a sentence of fifty characters, they say. " * 2000
    assert len(text) == 100_000
    playout = stream.say(text)
    await settle()
    assert len(engine.sentences) == 2
    playout.cancel()
    await settle()
    assert (len(engine.sentences), engine.closed) == (2, 2)
    assert (await playout).outcome is Outcome.CANCELLED
    # What waits behind something long has not even begun.
    stream.play(np.zeros(80_000, np.int16), 8000)
    stream.say("Later.")
    await settle()
    assert len(engine.sentences) == 2


async def test_an_engine_that_changes_its_rate_fails(tmp_path: Path) -> None:
    class Fickle(Metronome):
        async def speak(self, text: str, voice: str | None = None) -> AsyncGenerator[Spoken, None]:
            yield Spoken(np.zeros(800, np.int16), 8000, 0)
            yield Spoken(np.zeros(800, np.int16), 16000, len(text))

    playout = make_stream(tmp_path, synthesizer=Fickle()).say("Hello.")
    await settle()
    playout.cancel()
    assert "the engine went from 8000 to 16000 Hz within one text" in str((await playout).error)


# --- In a server -----------------------------------------------------------------------------------------------------


@needs_espeak
@pytest.mark.endpoint_loop
async def test_a_server_speaks_through_deaths_of_its_engine(serve: Serve) -> None:
    running = await serve(processors=[LISTENER])
    peer = await running.stream()
    peer.send(start(peer.sid))
    stream = (await Listener.of(peer.sid)).stream
    assert stream is not None
    engine = running.server.endpoint.synthesizer
    assert isinstance(engine, Espeak)
    played = await stream.say("One.")
    assert (played.outcome, played.text_heard) == (Outcome.FINISHED, "One.")
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    hanging = stream.say("the secret word")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    played = await hanging
    assert (played.outcome, played.text_heard) == (Outcome.FAILED, "")
    assert "espeak failed" in str(played.error)
    assert "starts it again" in str(played.error)
    played = await stream.say("Two.")
    assert (played.outcome, played.text_heard) == (Outcome.FINISHED, "Two.")
    assert engine.pid not in (None, pid)
    assert "secret" not in running.log
    await peer.close()
    await (await Listener.of(peer.sid)).until(lambda listener: listener.stopped is not None)
    with pytest.raises(StreamClosed):
        stream.say("nobody is there")


@needs_espeak
@pytest.mark.endpoint_loop
async def test_what_speaks_is_started_with_the_server_where_a_processor_says_texts(serve: Serve) -> None:
    running = await serve(processors=["announce:say=Welcome.,on=1"])
    engine = running.server.endpoint.synthesizer
    assert isinstance(engine, Espeak)
    assert engine.pid is not None
    with pytest.raises(SpeechError, match="espeak has no voice 'nope'"):
        await serve(processors=["announce:say=Welcome."], speech=SpeechSettings(voice="nope"))


@needs_espeak
@pytest.mark.endpoint_loop
async def test_what_speaks_is_started_ahead_where_a_processors_code_says_something(serve: Serve) -> None:
    running = await serve(processors=[LISTENER], pipelines={"agent": Pipeline(processors=["tests.test_say:Speaker"])})
    engine = running.server.endpoint.synthesizer
    assert isinstance(engine, Espeak)
    await eventually(lambda: engine.pid is not None)
    # A server that is stopped at once waits for nothing.
    await serve(processors=["tests.test_say:Speaker"])


@pytest.mark.endpoint_loop
async def test_one_that_cannot_be_started_ahead_is_told_in_the_log(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        running = await serve(processors=["tests.test_say:Speaker"])
        await eventually(lambda: "a processor that wants to say something cannot" in running.log)
    assert "pip install 'streamsink[speech]'" in running.log


@streamsink.processor()
async def answers(stream: Stream, frames: AsyncIterator[Frame]) -> None:
    async def later() -> None:
        await stream.say("At last.")

    await later()


def test_whether_a_processor_says_something_is_seen_in_its_code() -> None:
    assert find("tests.test_say:Speaker").calls_say
    assert find("tests.test_say:answers").calls_say
    assert not find("echo").calls_say
    assert not find(LISTENER).calls_say
    # With a file it needs nothing that speaks.
    assert Announce(file=SPEECH).says is False


@pytest.mark.endpoint_loop
async def test_a_server_that_cannot_speak_says_so_at_its_start(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpeechError, match=r"pip install 'streamsink\[speech\]'"):
        await serve(pipelines={"agent": Pipeline(processors=["announce:say=Welcome."])})
