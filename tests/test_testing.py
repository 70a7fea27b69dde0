from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import streamsink
from streamsink.audio import Frame, Track
from streamsink.errors import CodecError, ProcessorError, StreamClosed
from streamsink.plugins import find
from streamsink.processor import MarkOutcome, Processor
from streamsink.processors.echo import Echo
from streamsink.processors.record import Record
from streamsink.stream import Stream
from streamsink.testing import Dtmf, Loss, run_processor
from tests.streams import counting

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGE = Path(__file__).parent / "plugin_package"
NOTHING = np.zeros(0, np.int16)


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


class Listener(Processor):
    """Writes down what it hears."""

    def __init__(self, sample_rate: int | None = None) -> None:
        self.sample_rate = sample_rate
        self.frames: list[Frame] = []
        self.events: list[Any] = []

    async def on_start(self, stream: Stream) -> None:
        self.stream = stream

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        self.events.append(("dtmf", digit, duration_ms, len(self.frames)))

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        self.events.append(("mark", name, outcome))

    async def on_stop(self, reason: str) -> None:
        self.events.append(("stop", reason, self.stream.close_code, self.stream.close_reason))


async def test_an_echo_comes_back_sample_for_sample_one_frame_later() -> None:
    audio = counting(0, 16_000)
    result = await run_processor(Echo(), audio, 16_000)
    assert np.array_equal(result.played, audio)
    assert np.array_equal(result.heard, np.concatenate([np.zeros(320, np.int16), audio]))
    assert (result.sample_rate, result.marks, result.dtmf, result.clears, result.dropped) == (16_000, [], "", 0, 0)
    assert (result.close_code, result.close_reason) == (1000, "stop")


async def test_the_processor_sees_the_call_it_is_told() -> None:
    listener = Listener()
    audio = np.stack([counting(0, 1000), counting(5000, 1000)], axis=1)
    await run_processor(
        listener, audio, 8000, custom_parameters={"customer": "42"}, name="front desk", events=[Dtmf(0.05, "5", 90)]
    )
    stream = listener.stream
    assert (stream.sid, stream.name, stream.custom_parameters) == ("run_processor", "front desk", {"customer": "42"})
    assert (stream.tracks, str(stream.codec)) == ((Track.INBOUND, Track.OUTBOUND), "L16@8000h@20i")
    for column, track in enumerate(stream.tracks):
        frames = [frame for frame in listener.frames if frame.track is track]
        # The last frame is filled up with silence.
        assert [(frame.start, len(frame.samples), frame.lost) for frame in frames] == [
            (start, 160, 0) for start in range(0, 1000, 160)
        ]
        heard = np.concatenate([frame.samples for frame in frames])
        assert np.array_equal(heard, np.pad(audio[:, column], (0, 120)))
    assert listener.events == [("dtmf", "5", 90, 4), ("stop", "stop", 1000, "stop")]


@pytest.mark.parametrize(
    ("codec", "rate", "samples"),
    [("PCMU", 8000, 160), ("PCMA@40i", 8000, 320), ("G722", 16000, 320), ("L16@24000h@10i", 24000, 240)],
)
async def test_the_call_is_encoded_as_asked_for(codec: str, rate: int, samples: int) -> None:
    listener = Listener()
    sine = (8000 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.int16)
    await run_processor(listener, sine, 16_000, codec=codec)
    assert {(len(frame.samples), frame.sample_rate) for frame in listener.frames} == {(samples, rate)}
    heard = np.concatenate([frame.samples for frame in listener.frames]).astype(float)
    spectrum = np.abs(np.fft.rfft(heard[:rate]))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert abs(heard.std() / sine.std() - 1) < 0.05


async def test_a_file_is_played_and_silence_after_it(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", counting(1, 1600), 16_000, "PCM_16")
    for path in (tmp_path / "a.wav", str(tmp_path / "a.wav")):
        listener = Listener()
        await run_processor(listener, path, silence_seconds=0.5)
        heard = np.concatenate([frame.samples for frame in listener.frames])
        assert np.array_equal(heard, np.pad(counting(1, 1600), (0, 8000)))


async def test_losses_are_gaps() -> None:
    listener = Listener()
    await run_processor(listener, counting(0, 1600), 8000, events=[Loss(0.04, 0.06)])
    assert [(frame.start, frame.lost) for frame in listener.frames] == [
        (0, 0),
        (160, 0),
        (800, 480),
        (960, 0),
        (1120, 0),
        (1280, 0),
        (1440, 0),
    ]
    assert listener.frames[2].samples[0] == 800


async def test_a_function_may_take_its_time() -> None:
    @streamsink.processor()
    async def late(stream: Stream, frames: AsyncIterator[Frame]) -> None:
        await asyncio.sleep(2)
        playout = stream.play(np.full(800, 5, np.int16), 8000)
        outcome = await playout
        stream.send_dtmf("".join("12"[: outcome.played_ms // 100 + 1]))
        async for _ in frames:
            pass

    result = await run_processor(late(), np.zeros(40_000, np.int16), 8000)
    assert result.heard.tolist() == [0] * 16_000 + [5] * 800
    assert (result.dtmf, result.dropped) == ("12", 0)


async def test_marks_pass_when_the_audio_before_them_has_been_played() -> None:
    class Speaker(Listener):
        async def on_start(self, stream: Stream) -> None:
            await super().on_start(stream)
            stream.mark("at once")

        def on_dtmf(self, digit: str, duration_ms: int) -> None:
            self.stream.play(np.full(4000, 7, np.int16), 8000)
            self.stream.mark("one")
            self.stream.mark("two")

    speaker = Speaker()
    result = await run_processor(speaker, np.zeros(16_000, np.int16), 8000, events=[Dtmf(0.5, "1")])
    assert [(mark.name, round(mark.at, 3), mark.outcome) for mark in result.marks] == [
        ("at once", 0.0, MarkOutcome.PLAYED),
        ("one", 1.0, MarkOutcome.PLAYED),
        ("two", 1.0, MarkOutcome.PLAYED),
    ]
    assert speaker.events[:-1] == [("mark", mark.name, mark.outcome) for mark in result.marks]


async def test_a_clear_cuts_what_is_played_and_its_marks() -> None:
    class Interrupted(Listener):
        def on_dtmf(self, digit: str, duration_ms: int) -> None:
            if digit == "1":
                self.stream.play(counting(0, 16_000), 8000)
                self.stream.mark("end")
            else:
                self.stream.clear()

    processor = Interrupted()
    result = await run_processor(processor, np.zeros(24_000, np.int16), 8000, events=[Dtmf(0.5, "1"), Dtmf(1.25, "2")])
    assert np.array_equal(result.played, counting(0, 6000))
    assert np.array_equal(result.heard, np.pad(counting(0, 6000), (4000, 0)))
    assert result.clears == 1
    assert processor.events[0] == ("mark", "end", MarkOutcome.CLEARED)


async def test_a_processor_may_end_the_call() -> None:
    class Leaving(Listener):
        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            if len(self.frames) == 3:
                self.closing = asyncio.ensure_future(self.stream.close("goodbye"))

    leaving = Leaving()
    result = await run_processor(leaving, np.zeros(8000, np.int16), 8000)
    assert (len(leaving.frames), result.close_code, result.close_reason) == (3, 1000, "goodbye")
    assert leaving.events == [("stop", "closed", 1000, "goodbye")]


@pytest.mark.parametrize("hook", ["on_start", "on_frame", "on_dtmf", "on_mark", "on_played", "on_stop"])
async def test_what_a_processor_raises_fails_the_authors_test(hook: str) -> None:
    class Boom(Exception):
        pass

    async def boom(*args: object) -> None:
        raise Boom

    def bang(*args: object) -> None:
        raise Boom

    class Broken(Echo):
        def on_dtmf(self, digit: str, duration_ms: int) -> None:
            self._stream.mark("m")

    setattr(Broken, hook, boom if hook in ("on_start", "on_stop") else bang)
    with pytest.raises(Boom):
        await run_processor(Broken(), np.zeros(8000, np.int16), 8000, events=[Dtmf(0.1, "1")])


async def test_a_function_that_raises_fails_the_authors_test() -> None:
    @streamsink.processor()
    async def broken(stream: Stream, frames: AsyncIterator[Frame]) -> None:
        async for _ in frames:
            raise KeyError("what was meant")

    with pytest.raises(KeyError, match="what was meant"):
        await run_processor(broken(), np.zeros(8000, np.int16), 8000)


async def test_a_processor_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["streamsink.processor"], "HOOK_TIMEOUT", 2.0)

    class Hanging(Processor):
        async def on_stop(self, reason: str) -> None:
            await asyncio.Event().wait()

    with pytest.raises(ProcessorError, match="too slow"):
        await run_processor(Hanging(), np.zeros(160, np.int16), 8000)


async def test_time_stands_still_while_a_thread_works() -> None:
    class Reads(Processor):
        def __init__(self) -> None:
            self.told = threading.Event()

        async def on_start(self, stream: Stream) -> None:
            # One that waits for the call itself does not keep it waiting.
            self.waiting = asyncio.ensure_future(asyncio.to_thread(self.told.wait, 50))
            self.task = asyncio.ensure_future(self.read(stream))
            self.reads: list[int] = []

        async def read(self, stream: Stream) -> None:
            before = self.frames
            await asyncio.to_thread(time.sleep, 0.3)
            self.reads.append(self.frames - before)

        frames = 0

        def on_frame(self, frame: Frame) -> None:
            self.frames += 1
            if self.frames == 40:
                self.told.set()

        async def on_stop(self, reason: str) -> None:
            assert await self.waiting
            await self.task

    reads = Reads()
    await run_processor(reads, np.zeros(8000, np.int16), 8000)
    assert reads.frames == 50
    assert reads.reads[0] <= 1


async def test_threads_get_their_share_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that write recordings have to wait for the disk.
    monkeypatch.setattr("streamsink.testing.SPEED", 1)
    audio = counting(0, 8000)
    await run_processor(Record(), audio, 8000, codec="L16@8000h@40i", recordings=tmp_path)
    told, wav = files(tmp_path)
    assert (told.suffix, wav.suffix) == (".json", ".wav")
    assert np.array_equal(soundfile.read(wav, dtype="int16")[0], audio)
    assert json.loads(told.read_text())["codec"] == "L16@8000h@40i"

    class Threaded(Processor):
        async def on_start(self, stream: Stream) -> None:
            self.ran_in = await asyncio.to_thread(threading.get_ident)

    threaded = Threaded()
    await run_processor(threaded, audio, 8000)
    assert threaded.ran_in != threading.get_ident()


async def test_many_calls_at_once() -> None:
    audio = [counting(1000 * i, 1600) for i in range(8)]
    results = await asyncio.gather(*(run_processor(Echo(), samples, 8000) for samples in audio))
    assert [result.played.tolist() for result in results] == [samples.tolist() for samples in audio]


async def test_audio_that_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match="give sample_rate"):
        await run_processor(Echo(), counting(0, 160))
    with pytest.raises(ValueError, match=r"audio is float64 of shape \(160,\); wanted int16"):
        await run_processor(Echo(), np.zeros(160), 8000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 columns for 1 tracks"):
        await run_processor(Echo(), np.zeros((160, 2), np.int16), 8000, tracks=[Track.INBOUND])
    with pytest.raises(CodecError, match="11025"):
        await run_processor(Echo(), counting(0, 160), 11025)


# --- The examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["answer.py:Answer", "answer_function.py:answer"])
@pytest.mark.parametrize("codec", ["L16@16000h", "PCMU", "L16@24000h@40i"])
async def test_the_answer_says_again_what_it_heard(spec: str, codec: str) -> None:
    tone = (8000 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)).astype(np.int16)
    silence = np.zeros(16_000, np.int16)
    # A second of speech, a second of silence, twice.
    audio = np.concatenate([tone, silence, tone // 2, silence])
    processor = find(f"{EXAMPLES}/{spec}").build()
    result = await run_processor(processor, audio, 16_000, codec=codec, silence_seconds=1.5)
    rate = result.sample_rate
    loud = np.flatnonzero(np.abs(result.heard.astype(int)) > 1000) / rate
    # Each time after half a second of pause, to the length of a frame and of the filters on the way.
    assert loud[0] == pytest.approx(1.5, abs=0.1)
    assert loud[loud < 3].max() == pytest.approx(2.5, abs=0.1)
    assert loud[loud > 3].min() == pytest.approx(3.5, abs=0.1)
    assert loud[-1] == pytest.approx(4.5, abs=0.1)
    if codec == "L16@16000h":
        replies = [audio[:24_000], audio[32_000:56_000]]
        assert np.array_equal(result.played, np.concatenate(replies))


async def test_the_package_confirms_every_key() -> None:
    tone = find(f"{PACKAGE}/streamsink_tone.py:Tone:hertz=1000,seconds=0.1").build()
    result = await run_processor(tone, np.zeros(16_000, np.int16), 8000, events=[Dtmf(0.5, "1"), Dtmf(1.5, "#")])
    assert len(result.played) == 1600
    assert np.flatnonzero(np.abs(result.heard.astype(int)) > 100)[[0, -1]] // 800 == pytest.approx([5, 15])


async def test_what_is_kept_after_the_call_cannot_speak() -> None:
    listener = Listener()
    await run_processor(listener, NOTHING, 8000)
    with pytest.raises(StreamClosed):
        listener.stream.play(counting(0, 160), 8000)
