"""Deepgram's engine against a server on a local socket that follows Deepgram's documentation."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from streamsink.audio import Frame, Track
from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, SpeechEnded, SpeechStarted, Transcript
from streamsink.speech.stt import link
from streamsink.speech.stt.deepgram import Live
from streamsink.speech.stt.link import LinkRecognition
from streamsink.speech.transcriber import Transcriber
from streamsink.speech.transcription import Encoding, EngineOptions, Event, Voice, find_engine
from tests.vendors import DeepgramServer, encoded, listening, push, say, silence, told

KEY = "dg-secret-key"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPGRAM_API_KEY", KEY)
    monkeypatch.setattr(LinkRecognition, "first_delay", 0.01)
    monkeypatch.setattr(LinkRecognition, "final_seconds", 30.0)


@pytest.fixture
async def vendor() -> AsyncIterator[DeepgramServer]:
    async with listening(DeepgramServer()) as server:
        yield server


@asynccontextmanager
async def recognition(
    vendor: DeepgramServer, encoding: Encoding = "mulaw", rate: int = 8000, **options: Any
) -> AsyncIterator[LinkRecognition]:
    engine = find_engine("deepgram", EngineOptions(url=vendor.url, **options))
    await engine.start()
    opened = engine.open(Voice(encoding, rate, rate))
    assert isinstance(opened, LinkRecognition)
    try:
        yield opened
    finally:
        await opened.close()
        await engine.close()


def finals(events: list[Event]) -> list[Transcript]:
    return [event for event in events if isinstance(event, Transcript) and event.final]


@pytest.mark.parametrize(
    ("encoding", "rate"), [("mulaw", 8000), ("alaw", 8000), ("linear16", 16000)], ids=["mulaw", "alaw", "linear16"]
)
async def test_utterances_are_told_with_their_times(vendor: DeepgramServer, encoding: Encoding, rate: int) -> None:
    async with recognition(vendor, encoding, rate) as opened:
        push(opened, silence(1.0, rate), say("one", "two", rate=rate), silence(1.0, rate), say("three", rate=rate))
        push(opened, silence(0.5, rate))
        events = await told(opened)
    assert [type(event).__name__ for event in events if not isinstance(event, Transcript) or event.final] == [
        "SpeechStarted",
        "SpeechEnded",
        "Transcript",
        "SpeechStarted",
        "SpeechEnded",
        "Transcript",
    ]
    first, second = finals(events)
    assert (first.text, second.text) == ("One two", "Three")
    assert (first.start, first.end) == pytest.approx((1.0, 1.5))
    assert (second.start, second.end) == pytest.approx((2.6, 2.8))
    assert [(word.word, round(word.start, 3), round(word.end, 3)) for word in first.words] == [
        ("One", 1.0, 1.2),
        ("two", 1.3, 1.5),
    ]
    assert first.confidence == 0.75
    assert vendor.seconds == [pytest.approx(3.4, abs=0.001)]


async def test_the_url_says_what_is_sent_and_the_header_who_sends_it(vendor: DeepgramServer) -> None:
    async with recognition(vendor, model="nova-2", language="de", keywords=("Signal Wire", "sink")) as opened:
        await told(opened)
    (request,) = vendor.requests
    assert request.headers["Authorization"] == f"Token {KEY}"
    assert parse_qs(urlsplit(request.path).query) == {
        "model": ["nova-2"],
        "encoding": ["mulaw"],
        "sample_rate": ["8000"],
        "channels": ["1"],
        "punctuate": ["true"],
        "interim_results": ["true"],
        "vad_events": ["true"],
        "endpointing": ["300"],
        "utterance_end_ms": ["1000"],
        "language": ["de"],
        "keyterm": ["Signal Wire", "sink"],
    }


async def test_interims_grow_and_rise_and_one_final_ends_them(vendor: DeepgramServer) -> None:
    async with recognition(vendor) as opened:
        # In parts, as a talker speaks: the third word makes the first two certain.
        for word in ("one", "two", "three"):
            push(opened, say(word))
            await vendor.until(lambda: vendor.seconds and vendor.seconds[-1] >= opened.audio.seconds - 0.001)
        push(opened, silence(0.5))
        events = await told(opened)
    transcripts = [event for event in events if isinstance(event, Transcript)]
    texts = ["One", "One two", "One two", "One two Three", "One two Three"]
    assert [transcript.text for transcript in transcripts] == texts
    assert [transcript.revision for transcript in transcripts] == [0, 1, 2, 3, 4]
    assert [transcript.final for transcript in transcripts] == [False, False, False, False, True]
    assert {transcript.utterance for transcript in transcripts} == {0}


async def test_interims_that_nobody_wants_are_not_told(vendor: DeepgramServer) -> None:
    async with recognition(vendor, interim=False) as opened:
        push(opened, say("one", "two", "three"), silence(0.5))
        events = await told(opened)
    assert [event.text for event in events if isinstance(event, Transcript)] == ["One two Three"]


async def test_utterance_end_ends_one_where_noise_hides_the_pause(vendor: DeepgramServer) -> None:
    vendor.noisy = True
    async with recognition(vendor) as opened:
        push(opened, say("four"), silence(1.5), say("five"))
        events = await told(opened)
    assert [transcript.text for transcript in finals(events)] == ["Four", "Five"]
    assert {message["type"] for message in vendor.told} == {"Results", "UtteranceEnd", "SpeechStarted", "Metadata"}
    ended = [event for event in events if isinstance(event, SpeechEnded)]
    assert [event.utterance for event in ended] == [0, 1]
    assert [event.at for event in ended] == pytest.approx([0.2, 2.0])


async def test_the_last_words_come_with_the_end_of_the_stream(vendor: DeepgramServer) -> None:
    async with recognition(vendor) as opened:
        push(opened, say("six"))
        events = await told(opened)
    assert [transcript.text for transcript in finals(events)] == ["Six"]
    assert vendor.said == [{"type": "CloseStream"}]


async def test_it_is_kept_alive_while_there_is_no_audio(
    vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkRecognition, "pause", 0.01)
    async with recognition(vendor) as opened:
        # Less than a message: the pause sends it.
        opened.push(encoded(silence(0.04), "mulaw"))
        await vendor.until(lambda: len(vendor.said) >= 3)
        assert vendor.seconds == [0.04]
        assert all(said == {"type": "KeepAlive"} for said in vendor.said)
        await told(opened)


async def test_a_lost_connection_costs_no_word_and_no_time(vendor: DeepgramServer) -> None:
    # Cut in the third word of the second utterance.
    vendor.faults.append({"drop": 3.0})
    async with recognition(vendor) as opened:
        push(opened, silence(1.0), say("one"), silence(1.0), say("two", "three", "four"), silence(1.0), say("five"))
        events = await told(opened)
    first, second, third = finals(events)
    assert [first.text, second.text, third.text] == ["One", "Two three Four", "Five"]
    assert (first.start, first.end) == pytest.approx((1.0, 1.2))
    assert (second.start, second.end) == pytest.approx((2.3, 3.1))
    assert (third.start, third.end) == pytest.approx((4.2, 4.4))
    assert [transcript.utterance for transcript in (first, second, third)] == [0, 1, 2]
    (error,) = [event for event in events if isinstance(event, EngineError)]
    assert error.recoverable
    assert error.message == "the connection to Deepgram failed (closed with 1006); trying again"
    assert len([event for event in events if isinstance(event, SpeechStarted)]) == 3
    # What had been settled was not sent again.
    assert vendor.seconds[1] < 3.5


async def test_times_are_the_tracks_whatever_was_lost_on_the_way(vendor: DeepgramServer) -> None:
    vendor.faults.append({"drop": 2.5})
    engine = find_engine("deepgram", EngineOptions(url=vendor.url))
    events: list[Event] = []
    transcriber = Transcriber(engine, Track.OUTBOUND, 8000, "PCMU", events.append, asyncio.get_running_loop().time)
    # The track begins at 10 s, and 5 s of it are lost behind the first utterance.
    for start, samples in ((10.0, say("one", "two")), (10.6, silence(1.0)), (16.6, say("three", "four"))):
        at = round(start * 8000)
        for offset in range(0, len(samples), 160):
            transcriber.frame(Frame(samples[offset : offset + 160], 8000, Track.OUTBOUND, at + offset, 0, 0))
    await transcriber.finish(20.0)
    told = [event for event in events if isinstance(event, Transcript)]
    first, second = [transcript for transcript in told if transcript.final]
    assert (first.text, second.text) == ("One two", "Three four")
    assert (first.start, first.end) == pytest.approx((10.0, 10.5))
    assert (second.start, second.end) == pytest.approx((16.6, 17.1))
    assert [word.start for word in second.words] == pytest.approx([16.6, 16.9])
    assert (first.utterance, second.utterance) == (0, 1)
    for utterance in (0, 1):
        revisions = [transcript.revision for transcript in told if transcript.utterance == utterance]
        assert revisions == list(range(len(revisions)))
    assert [event.recoverable for event in events if isinstance(event, EngineError)] == [True]
    assert len(vendor.requests) == 2
    assert all("encoding=mulaw" in request.path for request in vendor.requests)


async def test_revisions_rise_over_a_lost_connection(vendor: DeepgramServer) -> None:
    # The first two words were certain by then, in the middle of a message.
    vendor.faults.append({"drop": 1.2})
    async with recognition(vendor) as opened:
        push(opened, silence(0.04), say("one", "two", "three", "four"), silence(0.5))
        events = await told(opened)
    transcripts = [event for event in events if isinstance(event, Transcript)]
    assert [transcript.revision for transcript in transcripts] == list(range(len(transcripts)))
    assert [transcript.final for transcript in transcripts] == [False] * (len(transcripts) - 1) + [True]
    assert transcripts[-1].text.lower() == "one two three four"
    assert [word.start for word in transcripts[-1].words] == pytest.approx([0.04, 0.34, 0.64, 0.94])


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"status": 429}, "HTTP 429"),
        ({"after": 0.2, "close": (1011, "NET-0001")}, "closed with 1011"),
        ({"after": 0.2, "close": (1000, "")}, "closed"),
        ({"say": ["{"]}, "a message that cannot be read"),
        ({"say": ['{"type":"Results","channel":{"alternatives":7}}']}, "a message that cannot be read"),
        ({"say": [b"\xff"]}, "a message that cannot be read"),
        ({"say": ['{"type":"Error","variant":"SchemaError","description":"one two"}']}, "an error message"),
    ],
    ids=["503", "429", "1011", "1000", "no JSON", "wrong shape", "no text", "error"],
)
async def test_whatever_passes_is_tried_again(vendor: DeepgramServer, fault: dict[str, Any], cause: str) -> None:
    vendor.faults.extend([fault, fault])
    async with recognition(vendor) as opened:
        push(opened, say("one", "two"), silence(0.5))
        events = await told(opened)
    assert [transcript.text for transcript in finals(events)] == ["One two"]
    errors = [event for event in events if isinstance(event, EngineError)]
    assert [error.message for error in errors] == [f"the connection to Deepgram failed ({cause}); trying again"]
    assert errors[0].recoverable
    assert len(vendor.requests) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 401}, "Deepgram refused with HTTP 401: check the key in DEEPGRAM_API_KEY"),
        ({"status": 402}, "Deepgram refused with HTTP 402: the account has no credit left"),
        ({"status": 400}, "Deepgram refused with HTTP 400: check the engine's options"),
        (
            {"after": 0.1, "close": (1008, "DATA-0000")},
            "Deepgram closed with 1008, a breach of its policy: check the engine's options",
        ),
    ],
)
async def test_what_no_retry_will_change_ends_it(vendor: DeepgramServer, fault: dict[str, Any], message: str) -> None:
    vendor.faults.append(fault)
    async with recognition(vendor) as opened:
        push(opened, say("one"))
        events = [event async for event in opened]
    assert events == [EngineError(message, recoverable=False)]
    assert len(vendor.requests) == 1


async def test_a_long_outage_is_a_marked_hole(vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinkRecognition, "most_waiting", 1.0)
    async with recognition(vendor) as opened:
        # No connection yet, and more audio than may wait.
        push(opened, say("one"), silence(2.0), say("two"), silence(0.5))
        events = await told(opened)
    hole, transcript = finals(events)
    assert hole.dropped
    assert hole.text == ""
    assert (hole.start, hole.end) == pytest.approx((0.0, 2.1), abs=0.021)
    assert (transcript.text, transcript.dropped) == ("Two", False)
    assert (transcript.start, transcript.end) == pytest.approx((2.3, 2.5))
    assert hole.utterance != transcript.utterance


async def test_audio_that_a_connection_was_too_slow_for_is_a_marked_hole(
    vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkRecognition, "most_waiting", 1.0)
    async with recognition(vendor) as opened:
        # Taken by the connection, which waits for more to send with it.
        push(opened, silence(0.04))
        await vendor.until(lambda: vendor.seconds)
        async with asyncio.timeout(50):
            while opened.audio.waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        push(opened, silence(2.0), say("two"), silence(0.5))
        hole, transcript = finals(await told(opened))
    assert hole.dropped
    assert (hole.start, hole.end) == pytest.approx((0.04, 1.84), abs=0.021)
    assert (transcript.text, transcript.dropped) == ("Two", False)
    assert (transcript.start, transcript.end) == pytest.approx((2.04, 2.24))


async def test_a_failure_long_after_another_is_told_again(
    vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LASTED", -1.0)
    vendor.faults.extend([{"status": 503}, {"status": 502}])
    async with recognition(vendor) as opened:
        push(opened, say("one"))
        events = await told(opened)
    errors = [event.message for event in events if isinstance(event, EngineError)]
    assert [message.partition("(")[2] for message in errors] == ["HTTP 503); trying again", "HTTP 502); trying again"]


async def test_what_is_kept_for_a_new_connection_is_bounded(
    vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkRecognition, "keep_seconds", 1.0)
    vendor.faults.append({"drop": 5.0})
    async with recognition(vendor) as opened:
        push(opened, silence(4.6), say("one"), silence(0.5))
        events = await told(opened)
    hole, transcript = finals(events)
    assert hole.dropped
    assert hole.start == 0.0
    assert 3.8 < hole.end < 4.5
    assert transcript.text == "One"
    assert transcript.start == pytest.approx(4.6)


async def test_a_vendor_that_stays_away_is_given_up_with_the_stream(
    vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkRecognition, "final_seconds", 0.05)
    vendor.faults.extend([{"status": 503}] * 1000)
    async with recognition(vendor) as opened:
        push(opened, say("one"))
        await vendor.until(lambda: len(vendor.requests) > 1)
        events = await told(opened)
    error, hole = events
    assert isinstance(error, EngineError)
    assert isinstance(hole, Transcript)
    assert hole.dropped
    assert (hole.start, hole.end) == pytest.approx((0.0, 0.3))


async def test_nobody_listens_there(vendor: DeepgramServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinkRecognition, "final_seconds", 0.05)
    vendor.url = "ws://127.0.0.1:9"
    async with recognition(vendor) as opened:
        events = [await anext(aiter(opened)), *await told(opened)]
    assert events == [
        EngineError("the connection to Deepgram failed (ConnectionRefusedError); trying again", recoverable=True)
    ]


async def test_neither_key_nor_words_reach_the_log(
    vendor: DeepgramServer, caplog: pytest.LogCaptureFixture, read_log: Callable[[], str]
) -> None:
    caplog.set_level(logging.DEBUG)
    vendor.faults.append({"drop": 0.5})
    async with recognition(vendor) as opened:
        push(opened, say("one", "two"), silence(0.5))
        events = await told(opened)
    assert finals(events)
    for logged in (caplog.text, read_log()):
        assert KEY not in logged
        assert "transcript" not in logged.lower()


def test_words_that_are_taken_back_end_their_utterance() -> None:
    live = Live(EngineOptions(), Voice("mulaw", 8000, 8000), "ws://localhost", KEY)
    live.audio(b"", 0.0, 2.0)

    def results(text: str, start: float, *, final: bool) -> list[Event]:
        channel = {"alternatives": [{"transcript": text, "words": [], "languages": ["de"]}]}
        told = {"type": "Results", "channel": channel, "start": start, "duration": 0.5, "is_final": final}
        return list(live.received(json.dumps(told)))

    first = results("hm", 0.0, final=False)
    # No word is certain yet.
    assert list(live.received('{"type":"UtteranceEnd","channel":[0,1],"last_word_end":-1}')) == []
    assert [getattr(event, "text", "") for event in first] == ["", "hm"]
    ended, last = results("", 0.0, final=True)
    assert ended == SpeechEnded(0, 0.0)
    assert last == Transcript(0, 1, "", final=True, start=0.0, end=0.0)
    assert results("", 0.5, final=True) == []
    assert live.settled == 1.0
    assert [event.language for event in results("ja", 1.0, final=False) if isinstance(event, Transcript)] == ["de"]


def test_what_is_new_to_it_is_passed_over() -> None:
    live = Live(EngineOptions(), Voice("mulaw", 8000, 8000), "ws://localhost", KEY)
    assert list(live.received('{"type":"ConfigureSuccess","request_id":"x","channel":7}')) == []
    assert list(live.received('{"type":"Results","channel":{}}')) == []


async def test_closing_ends_it_at_once(vendor: DeepgramServer) -> None:
    async with recognition(vendor) as opened:
        push(opened, say("one"))
        await vendor.until(lambda: vendor.seconds and vendor.seconds[0] > 0.1)
        await opened.close()
        events = [event async for event in opened]
    assert not finals(events)


def test_what_it_cannot_do_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpeechError, match="deepgram has neither a grammar nor workers of ours"):
        find_engine("deepgram", EngineOptions(grammar=Path("g.jsgf")))
    with pytest.raises(SpeechError, match="workers"):
        find_engine("deepgram", EngineOptions(workers=2))
    monkeypatch.delenv("DEEPGRAM_API_KEY")
    with pytest.raises(SpeechError, match="deepgram needs a key: set DEEPGRAM_API_KEY"):
        find_engine("deepgram", EngineOptions())


async def test_the_server_speaks_as_the_vendors_own_package_reads(vendor: DeepgramServer) -> None:
    types = pytest.importorskip("deepgram.listen.v1.types", reason="deepgram-sdk is not installed: its types judge")
    vendor.noisy = True
    async with recognition(vendor) as opened:
        push(opened, say("one"), silence(1.5), say("two"))
        await told(opened)
    assert {message["type"] for message in vendor.told} == {"Results", "UtteranceEnd", "SpeechStarted", "Metadata"}
    for message in vendor.told:
        read = getattr(types, f"ListenV1{message['type']}").model_validate(message)
        assert not read.model_extra
