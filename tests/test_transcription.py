"""The contract of transcription engines: bounded audio, an order to events, and errors that name the remedy."""

from __future__ import annotations

import asyncio

import pytest

from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, Transcript
from streamsink.speech.transcription import (
    ENGINES,
    Capabilities,
    Engine,
    EngineOptions,
    Event,
    Feed,
    Recognition,
    Voice,
    find_engine,
)

VOICE = Voice("linear16", 8000, 8000)


class Echoing(Recognition):
    """Says how much it heard."""

    async def run(self) -> None:
        async for at, audio in self.audio:
            if audio == b"secret":
                raise RuntimeError("they said secret")
            if audio == b"broken":
                raise SpeechError("the line is cut")
            self.emit(Transcript(0, 0, f"{len(audio)} at {at:g}", False, at, at))
        self.emit(Transcript(0, 0, "done", True, 0.0, self.audio.seconds))


class Mine(Engine):
    capabilities = Capabilities(rates=(8000,))

    def __init__(self, options: EngineOptions) -> None:
        self.options = options

    def open(self, voice: Voice) -> Recognition:
        return Echoing(voice)


async def events(recognition: Recognition) -> list[Event]:
    return [event async for event in recognition]


async def test_audio_goes_in_and_events_come_out() -> None:
    recognition = Mine(EngineOptions()).open(VOICE)
    recognition.push(bytes(16_000))
    recognition.push(bytes(320))
    recognition.finish()
    assert [getattr(event, "text", "") for event in await events(recognition)] == ["16000 at 0", "320 at 1", "done"]


async def test_what_an_engine_raises_ends_it_without_a_word_of_the_call() -> None:
    recognition = Echoing(VOICE)
    recognition.push(b"secret")
    assert await events(recognition) == [EngineError("the engine raised RuntimeError", recoverable=False)]
    recognition = Echoing(VOICE)
    recognition.push(b"broken")
    assert await events(recognition) == [EngineError("the line is cut", recoverable=False)]


async def test_one_that_is_given_up_on_ends() -> None:
    recognition = Echoing(VOICE)
    await recognition.close()
    assert await events(recognition) == []


async def test_a_slow_reader_loses_the_oldest_and_the_clock_goes_on() -> None:
    feed = Feed(16_000, limit=1.0)
    assert feed.waiting == 0.0
    for number in range(8):
        feed.put(bytes([number]) * 4000)
    assert (feed.seconds, feed.dropped, feed.waiting) == (2.0, 1.0, 1.0)
    feed.end()
    assert [(at, audio[0]) async for at, audio in feed] == [(1.0, 4), (1.25, 5), (1.5, 6), (1.75, 7)]


async def test_a_reader_waits_for_audio() -> None:
    feed = Feed(16_000, limit=1.0)
    reading = asyncio.ensure_future(anext(feed))
    await asyncio.sleep(0)
    feed.put(b"ab")
    assert await reading == (0.0, b"ab")


def test_engines_are_found_by_name_and_by_place() -> None:
    engine = find_engine("tests.test_transcription:Mine", EngineOptions(language="de"))
    assert isinstance(engine, Engine)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sphinx", f"there is no engine `sphinx`; there are {', '.join(ENGINES)}, or write package.module:Name"),
        ("no_such_module:Mine", "`no_such_module:Mine` cannot be imported: No module named 'no_such_module'"),
        ("tests.test_transcription:Nobody", "has no attribute 'Nobody'"),
        ("tests.test_transcription:Echoing", "is no engine: it must be a class derived from"),
        ("tests.test_transcription:VOICE", "is no engine"),
    ],
)
def test_what_is_no_engine_is_told(name: str, told: str) -> None:
    with pytest.raises(SpeechError) as error:
        find_engine(name, EngineOptions())
    assert told in str(error.value)
