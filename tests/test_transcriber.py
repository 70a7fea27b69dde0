"""A track on its way through an engine: what the engine hears, and the order and the clock of what comes back."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from streamsink.audio import Samples, Track
from streamsink.codec import CodecSpec
from streamsink.errors import SpeechError
from streamsink.speech.events import (
    EngineError,
    Speech,
    SpeechChange,
    SpeechEnded,
    SpeechStarted,
    Transcript,
    Word,
)
from streamsink.speech.transcriber import LONGEST, MOST_SILENCE, Transcriber, voice_for
from streamsink.speech.transcription import Capabilities, Encoding, Engine, Event, Recognition, Voice
from tests.streams import counting, frame

RATE = 8000
FRAME = 160


def said(text: str, start: float, end: float, *, final: bool = True, utterance: int = 0) -> Transcript:
    return Transcript(utterance, 0, text, final, start, end, words=(Word(text, start, end),))


class Scripted(Recognition):
    """Hears everything, then says what it was told to."""

    def __init__(self, voice: Voice, engine: Fake) -> None:
        super().__init__(voice)
        self.heard: list[tuple[float, bytes]] = []
        self._engine = engine

    async def run(self) -> None:
        async for piece in self.audio:
            self.heard.append(piece)
        for event in self._engine.script:
            if isinstance(event, Exception):
                raise event
            self.emit(event)
        if self._engine.hangs:
            await asyncio.get_running_loop().create_future()

    @property
    def octets(self) -> bytes:
        return b"".join(audio for _, audio in self.heard)


class Fake(Engine):
    def __init__(self, *script: Event | Exception, **capabilities: object) -> None:
        self.capabilities = Capabilities(**{"rates": (RATE,), **capabilities})  # type: ignore[arg-type]
        self.script = script
        self.opened: list[Scripted] = []
        self.hangs = False

    def open(self, voice: Voice) -> Recognition:
        self.opened.append(Scripted(voice, self))
        return self.opened[-1]


class Track1:
    """A transcriber with its events, fed in frames of 20 ms that tell where they belong."""

    def __init__(self, engine: Engine, codec: str = "L16") -> None:
        self.told: list[Event] = []
        self.now = 0.0
        self.transcriber = Transcriber(engine, Track.OUTBOUND, RATE, codec, self.told.append, lambda: self.now)

    def frames(self, start: float, seconds: float) -> None:
        for position in range(round(start * RATE), round((start + seconds) * RATE), FRAME):
            self.transcriber.frame(frame(counting(position, FRAME), position))

    def speech(self, change: SpeechChange, at: float) -> None:
        self.transcriber.speech(Speech(change, at, Track.OUTBOUND))

    async def end(self) -> list[Event]:
        await self.transcriber.finish(5.0)
        return self.told


def pcm(start: float, end: float) -> bytes:
    return counting(round(start * RATE), round((end - start) * RATE)).tobytes()


async def test_an_utterance_is_cut_out_with_what_was_before_it() -> None:
    engine = Fake(said("hello", 0.35, 0.75))
    track = Track1(engine)
    track.frames(0.0, 1.16)
    track.speech(SpeechChange.STARTED, 1.0)
    track.frames(1.16, 0.84)
    track.speech(SpeechChange.STOPPED, 1.6)
    track.frames(2.0, 0.5)
    assert await track.end() == [
        SpeechStarted(0, 1.0, Track.OUTBOUND),
        SpeechEnded(0, 1.6, Track.OUTBOUND),
        Transcript(0, 0, "hello", True, 1.05, 1.45, (Word("hello", 1.05, 1.45),), track=Track.OUTBOUND),
    ]
    (heard,) = engine.opened
    assert heard.octets == pcm(0.7, 2.0)


async def test_the_next_utterance_does_not_hear_the_end_of_the_last() -> None:
    engine = Fake(said("again", 0.0, 0.1))
    track = Track1(engine)
    for at in (0.5, 1.1):
        track.frames(at - 0.5 if at == 0.5 else 1.0, 0.5 if at == 0.5 else 0.1)
        track.speech(SpeechChange.STARTED, at)
        track.frames(at, 0.5)
        track.speech(SpeechChange.STOPPED, at + 0.1)
    finals = [event for event in await track.end() if isinstance(event, Transcript)]
    assert [(final.utterance, final.start) for final in finals] == [(0, 0.2), (1, 1.0)]
    assert [heard.octets for heard in engine.opened] == [pcm(0.2, 1.0), pcm(1.0, 1.6)]


async def test_speech_told_before_any_audio_or_out_of_turn_is_nothing() -> None:
    engine = Fake()
    track = Track1(engine)
    track.speech(SpeechChange.STARTED, 0.0)
    track.speech(SpeechChange.STOPPED, 0.1)
    assert await track.end() == []
    assert engine.opened == []


async def test_speech_that_is_told_as_it_begins_waits_for_its_audio() -> None:
    engine = Fake(said("late", 0.0, 0.1))
    track = Track1(engine)
    track.frames(0.0, 0.5)
    track.speech(SpeechChange.STARTED, 0.9)
    track.speech(SpeechChange.STARTED, 0.9)
    track.frames(0.5, 0.1)
    final = (await track.end())[-1]
    assert isinstance(final, Transcript)
    assert final.start == 0.5
    assert engine.opened[0].octets == pcm(0.5, 0.6)


async def test_who_talks_on_begins_another_utterance() -> None:
    engine = Fake(said("on", 0.0, 1.0))
    track = Track1(engine)
    track.frames(0.0, 0.5)
    track.speech(SpeechChange.STARTED, 0.3)
    for number in range(int(LONGEST) + 1):
        track.frames(number + 0.5, 1.0)
        await asyncio.sleep(0)
    finals = [event for event in await track.end() if isinstance(event, Transcript)]
    first, second = engine.opened
    assert first.octets + second.octets == pcm(0.0, LONGEST + 1.5)
    assert [final.start for final in finals] == [0.0, LONGEST + 0.02]


async def test_an_engine_with_endpointing_hears_the_whole_track() -> None:
    engine = Fake(
        SpeechStarted(7, 0.2),
        said("one", 0.2, 0.3, final=False, utterance=7),
        said("one", 0.2, 0.3, final=False, utterance=7),
        said(" ", 0.2, 0.3, final=False, utterance=7),
        said("one two", 0.2, 0.5, utterance=7),
        SpeechEnded(7, 0.5),
        said("one two three", 0.2, 0.6, utterance=7),
        said("three", 0.6, 0.9, utterance=9),
        SpeechEnded(9, 0.9),
        SpeechEnded(11, 1.0),
        endpointing=True,
    )
    track = Track1(engine)
    track.speech(SpeechChange.STARTED, 0.0)
    track.frames(0.0, 0.5)
    told = await track.end()
    words = {text: (Word(text, start, end),) for text, start, end in (("one", 0.2, 0.3), ("one two", 0.2, 0.5))}
    out = Track.OUTBOUND
    assert told == [
        SpeechStarted(0, 0.2, out),
        Transcript(0, 0, "one", False, 0.2, 0.3, words["one"], track=out),
        Transcript(0, 1, "one two", True, 0.2, 0.5, words["one two"], track=out),
        SpeechStarted(1, 0.6, out),
        Transcript(1, 0, "three", True, 0.6, 0.9, (Word("three", 0.6, 0.9),), track=out),
    ]
    assert engine.opened[0].octets == pcm(0.0, 0.5)


async def test_a_track_that_starts_late_and_loses_audio_keeps_the_clock() -> None:
    engine = Fake(
        said("before", 0.1, 0.2, utterance=0),
        said("in the gap", 0.7, 0.8, utterance=1),
        said("after both", 2.7, 2.8, utterance=2),
        endpointing=True,
    )
    track = Track1(engine)
    track.frames(5.0, 0.5)
    track.frames(6.0, 0.5)
    # Of a long loss the engine hears a second.
    track.frames(20.0, 0.5)
    finals = [event for event in await track.end() if isinstance(event, Transcript)]
    assert [(final.start, final.end) for final in finals] == [(5.1, 5.2), (5.7, 5.8), (20.2, 20.3)]
    silence = bytes(round(0.5 * RATE) * 2), bytes(round(MOST_SILENCE * RATE) * 2)
    assert engine.opened[0].octets == pcm(5.0, 5.5) + silence[0] + pcm(6.0, 6.5) + silence[1] + pcm(20.0, 20.5)


async def test_what_an_engine_owes_is_a_hole() -> None:
    engine = Fake(said("half a", 0.0, 0.2, final=False), SpeechError("the engine is gone"))
    track = Track1(engine)
    track.frames(0.0, 0.5)
    track.speech(SpeechChange.STARTED, 0.3)
    track.frames(0.5, 0.5)
    track.speech(SpeechChange.STOPPED, 0.8)
    assert (await track.end())[2:] == [
        Transcript(0, 0, "half a", False, 0.0, 0.2, (Word("half a", 0.0, 0.2),), track=Track.OUTBOUND),
        EngineError("the engine is gone", False, Track.OUTBOUND),
        Transcript(0, 1, "", True, 0.3, 0.8, track=Track.OUTBOUND, dropped=True),
    ]


async def test_an_engine_may_drop_an_utterance_itself_and_goes_on() -> None:
    hole = Transcript(3, 0, "never told", True, 0.1, 0.4, dropped=True)
    engine = Fake(EngineError("reconnected", True), hole, SpeechStarted(4, 0.4), endpointing=True)
    track = Track1(engine)
    track.frames(0.0, 0.5)
    assert await track.end() == [
        EngineError("reconnected", True, Track.OUTBOUND),
        SpeechStarted(0, 0.1, Track.OUTBOUND),
        Transcript(0, 0, "", True, 0.1, 0.4, track=Track.OUTBOUND, dropped=True),
        SpeechStarted(1, 0.4, Track.OUTBOUND),
        Transcript(1, 0, "", True, 0.4, 0.5, track=Track.OUTBOUND, dropped=True),
    ]


async def test_a_track_whose_engine_gave_up_is_tried_again_and_the_time_between_is_a_hole() -> None:
    class GivesUp(Recognition):
        async def run(self) -> None:
            await anext(aiter(self.audio))
            raise SpeechError("no credit")

    class Broke(Fake):
        def open(self, voice: Voice) -> Recognition:
            opened.append(GivesUp(voice))
            return opened[-1]

    opened: list[Recognition] = []
    track = Track1(Broke(endpointing=True))
    for number in range(12):
        track.frames(float(number), 1.0)
        for _ in range(10):
            await asyncio.sleep(0)
    told = await track.end()
    assert len(opened) == 2
    assert [event for event in told if isinstance(event, EngineError)] == [
        EngineError("no credit", False, Track.OUTBOUND)
    ] * 2
    holes = [event for event in told if isinstance(event, Transcript)]
    assert [(hole.utterance, hole.start, hole.end, hole.dropped) for hole in holes] == [
        (0, 1.0, 6.0, True),
        (1, 6.0, 12.0, True),
    ]


async def test_what_does_not_come_in_time_is_a_hole() -> None:
    engine = Fake()
    engine.hangs = True
    track = Track1(engine)
    track.frames(0.0, 0.5)
    track.speech(SpeechChange.STARTED, 0.3)
    await track.transcriber.finish(0.01)
    assert track.told[-1] == Transcript(0, 0, "", True, 0.3, 0.5, track=Track.OUTBOUND, dropped=True)


async def test_how_long_ago_counts_from_the_newest_frame() -> None:
    track = Track1(Fake())
    track.now = 100.0
    track.frames(0.0, 2.0)
    track.now = 100.5
    assert track.transcriber.ago(1.2) == pytest.approx(1.3)


async def test_g711_comes_as_it_is_and_the_rate_as_the_engine_wants_it() -> None:
    engine = Fake(endpointing=True, encodings=("mulaw", "linear16"))
    track = Track1(engine, "PCMU")
    samples: Samples = CodecSpec.parse("PCMU").decoder().decode(bytes(range(256)))
    track.transcriber.frame(frame(samples))
    await track.end()
    # Both of G.711's zeros are one sample.
    assert engine.opened[0].octets == bytes(range(127)) + b"\xff" + bytes(range(128, 256))

    engine = Fake(endpointing=True, rates=(16_000,))
    track = Track1(engine)
    track.frames(0.0, 1.0)
    await track.end()
    heard = np.frombuffer(engine.opened[0].octets, "<i2")
    assert abs(len(heard) - 16_000) < 200


@pytest.mark.parametrize(
    ("rates", "encodings", "rate", "codec", "wanted"),
    [
        ((8000, 16_000), ("linear16", "mulaw"), 8000, "PCMU", ("mulaw", 8000)),
        ((8000, 16_000), ("linear16", "mulaw"), 8000, "PCMA", ("linear16", 8000)),
        ((8000, 16_000), ("linear16", "alaw"), 8000, "PCMA", ("alaw", 8000)),
        ((8000, 16_000), ("linear16",), 16_000, "G722", ("linear16", 16_000)),
        ((8000, 16_000), ("linear16",), 24_000, "L16", ("linear16", 16_000)),
        ((16_000, 24_000), ("linear16",), 8000, "PCMU", ("linear16", 16_000)),
        ((8000,), ("alaw",), 16_000, "G722", ("alaw", 8000)),
    ],
)
def test_what_an_engine_is_given(
    rates: tuple[int, ...], encodings: tuple[Encoding, ...], rate: int, codec: str, wanted: tuple[str, int]
) -> None:
    voice = voice_for(Capabilities(rates=rates, encodings=encodings), rate, codec)
    assert (voice.encoding, voice.rate, voice.call_rate) == (*wanted, rate)


async def test_revisions_rise_whatever_an_engine_says() -> None:
    engine = Fake(*(said(f"w{n}", 0.0, 0.1, final=n == 3) for n in range(5)))
    track = Track1(engine)
    track.frames(0.0, 0.5)
    track.speech(SpeechChange.STARTED, 0.3)
    transcripts = [event for event in await track.end() if isinstance(event, Transcript)]
    assert [(each.revision, each.final) for each in transcripts] == list(
        zip(itertools.count(), [False, False, False, True], strict=False)
    )
