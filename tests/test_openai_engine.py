"""OpenAI's engine against a server on a local socket that follows OpenAI's documentation."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, SpeechEnded, SpeechStarted, Transcript
from streamsink.speech.stt.link import LinkRecognition
from streamsink.speech.stt.openai import Turns
from streamsink.speech.transcription import Encoding, EngineOptions, Event, Voice, find_engine
from tests.vendors import OpenAIServer, listening, push, say, silence, told

KEY = "sk-secret-key"
LIVE = "gpt-live-transcribe"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(LinkRecognition, "first_delay", 0.01)


@pytest.fixture
async def vendor() -> AsyncIterator[OpenAIServer]:
    async with listening(OpenAIServer()) as server:
        yield server


@asynccontextmanager
async def recognition(
    vendor: OpenAIServer, encoding: Encoding = "mulaw", rate: int = 8000, **options: Any
) -> AsyncIterator[LinkRecognition]:
    engine = find_engine("openai", EngineOptions(url=vendor.url, **options))
    await engine.start()
    opened = engine.open(Voice(encoding, rate, rate))
    assert isinstance(opened, LinkRecognition)
    try:
        yield opened
    finally:
        await opened.close()
        await engine.close()


async def heard(vendor: OpenAIServer, opened: LinkRecognition) -> None:
    await vendor.until(lambda: vendor.seconds and vendor.seconds[-1] >= opened.audio.seconds - 0.01)


def transcripts(events: list[Event]) -> list[Transcript]:
    return [event for event in events if isinstance(event, Transcript)]


def finals(events: list[Event]) -> list[Transcript]:
    return [transcript for transcript in transcripts(events) if transcript.final]


# --- A track whole: the server finds the turns -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "rate", "format"),
    [
        ("mulaw", 8000, {"type": "audio/pcmu"}),
        ("alaw", 8000, {"type": "audio/pcma"}),
        ("linear16", 24000, {"type": "audio/pcm", "rate": 24000}),
    ],
)
async def test_turns_are_told_with_their_times(
    vendor: OpenAIServer, encoding: Encoding, rate: int, format: dict[str, Any]
) -> None:
    async with recognition(vendor, encoding, rate) as opened:
        push(opened, silence(1.0, rate), say("one", "two", rate=rate), silence(1.0, rate), say("three", rate=rate))
        push(opened, silence(1.0, rate))
        await heard(vendor, opened)
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
    assert [first.text, second.text] == ["one two", "three"]
    assert [first.utterance, second.utterance] == [0, 1]
    assert (first.start, first.end) == pytest.approx((1.0, 1.5), abs=0.12)
    assert (second.start, second.end) == pytest.approx((2.6, 2.8), abs=0.12)
    assert vendor.said[0]["session"]["audio"]["input"]["format"] == format
    assert vendor.seconds[0] == pytest.approx(3.9, abs=0.01)


async def test_the_session_is_asked_for_as_documented(vendor: OpenAIServer) -> None:
    async with recognition(vendor, language="de-AT", keywords=("Signal Wire",)) as opened:
        await told(opened)
    (request,) = vendor.requests
    assert request.path == "/?intent=transcription"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert vendor.said[0] == {
        "type": "session.update",
        "session": {
            "type": "transcription",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcmu"},
                    "transcription": {
                        "model": "gpt-transcribe",
                        "languages": ["de"],
                        "keywords": ["Signal Wire"],
                    },
                    "turn_detection": {
                        "type": "server_vad",
                        "prefix_padding_ms": 300,
                        "silence_duration_ms": 500,
                    },
                }
            },
        },
    }


async def test_an_older_model_takes_one_language(vendor: OpenAIServer) -> None:
    async with recognition(vendor, model="gpt-4o-transcribe", language="en-US") as opened:
        await told(opened)
    transcription = vendor.said[0]["session"]["audio"]["input"]["transcription"]
    assert transcription == {"model": "gpt-4o-transcribe", "language": "en"}


async def test_deltas_are_interims_that_rise(vendor: OpenAIServer) -> None:
    async with recognition(vendor) as opened:
        push(opened, say("one", "two"), silence(1.0))
        await heard(vendor, opened)
        events = await told(opened)
    assert [(t.text, t.revision, t.final) for t in transcripts(events)] == [
        ("one", 0, False),
        ("one two", 1, False),
        ("one two", 2, True),
    ]


async def test_interims_that_nobody_wants_are_not_told(vendor: OpenAIServer) -> None:
    async with recognition(vendor, interim=False) as opened:
        push(opened, say("one", "two"), silence(1.0))
        await heard(vendor, opened)
        events = await told(opened)
    assert [t.text for t in transcripts(events)] == ["one two"]


async def test_a_turn_that_the_streams_end_cuts_is_committed(vendor: OpenAIServer) -> None:
    async with recognition(vendor) as opened:
        push(opened, silence(0.5), say("six"))
        events = await told(opened)
    (last,) = finals(events)
    assert (last.text, last.utterance) == ("six", 0)
    assert (last.start, last.end) == pytest.approx((0.5, 0.8), abs=0.12)
    assert vendor.said[-1] == {"type": "input_audio_buffer.commit"}


async def test_silence_is_never_committed(vendor: OpenAIServer) -> None:
    async with recognition(vendor) as opened:
        push(opened, silence(2.0))
        assert await told(opened) == []
    assert "input_audio_buffer.commit" not in {said["type"] for said in vendor.said}


async def test_a_lost_connection_costs_no_word_and_no_time(vendor: OpenAIServer) -> None:
    # Cut in the second turn.
    vendor.faults.append({"drop": 3.2})
    async with recognition(vendor) as opened:
        push(opened, silence(1.0), say("one"), silence(1.0))
        await heard(vendor, opened)
        push(opened, say("two", "three", "four"), silence(1.0), say("five"), silence(1.0))
        await vendor.until(lambda: len(vendor.requests) == 2)
        await vendor.until(lambda: sum("completed" in message["type"] for message in vendor.told) == 3)
        events = await told(opened)
    assert [t.text for t in finals(events)] == ["one", "two three four", "five"]
    assert [t.utterance for t in finals(events)] == [0, 1, 2]
    for transcript, start, end in zip(finals(events), (1.0, 2.3, 4.2), (1.2, 3.1, 4.4), strict=True):
        assert (transcript.start, transcript.end) == pytest.approx((start, end), abs=0.12)
    assert [event.utterance for event in events if isinstance(event, SpeechStarted)] == [0, 1, 2]
    assert [event.message for event in events if isinstance(event, EngineError)] == [
        "the connection to OpenAI failed (closed with 1006); trying again"
    ]


async def test_a_session_that_has_expired_is_followed_by_another(vendor: OpenAIServer) -> None:
    async with recognition(vendor) as opened:
        vendor.expire_after = 1.0
        push(opened, say("one"), silence(1.0), say("two"), silence(1.0))
        await vendor.until(lambda: sum("completed" in message["type"] for message in vendor.told) == 2)
        events = await told(opened)
    assert [t.text for t in finals(events)] == ["one", "two"]
    assert [event.message for event in events if isinstance(event, EngineError)] == [
        "the connection to OpenAI failed (session_expired); trying again"
    ]


async def test_a_turn_that_cannot_be_transcribed_is_a_marked_hole(vendor: OpenAIServer) -> None:
    vendor.failing[1] = "audio_unintelligible"
    async with recognition(vendor) as opened:
        push(opened, say("one"), silence(1.0), say("two"), silence(1.0))
        await heard(vendor, opened)
        events = await told(opened)
    assert [(t.text, t.dropped) for t in finals(events)] == [("", True), ("two", False)]
    assert EngineError("OpenAI could not transcribe an utterance (audio_unintelligible)", recoverable=True) in events


async def test_other_errors_leave_the_session_open(vendor: OpenAIServer) -> None:
    async with recognition(vendor) as opened:
        vendor.complain_after = 0.2
        push(opened, say("one"), silence(1.0))
        await heard(vendor, opened)
        events = await told(opened)
    assert [t.text for t in finals(events)] == ["one"]
    assert not [event for event in events if isinstance(event, EngineError)]
    assert len(vendor.requests) == 1


def test_what_is_of_no_turn_is_passed_over() -> None:
    turns = Turns(EngineOptions(), "gpt-transcribe", Voice("mulaw", 8000, 8000), "ws://localhost", KEY)
    turns.open()
    transcription = "conversation.item.input_audio_transcription"
    for early in (
        {"type": "input_audio_buffer.speech_stopped", "item_id": "x", "audio_end_ms": 5},
        {"type": "input_audio_buffer.committed", "item_id": "x"},
        {"type": f"{transcription}.completed", "item_id": "x", "transcript": "one"},
        {"type": "rate_limits.updated", "rate_limits": []},
    ):
        assert list(turns.received(json.dumps(early))) == []
    started = {"type": "input_audio_buffer.speech_started", "item_id": "y", "audio_start_ms": 0}
    assert list(turns.received(json.dumps(started))) == [SpeechStarted(0, 0.0)]
    more: tuple[dict[str, str | None], ...] = (
        {"type": f"{transcription}.segment", "item_id": "y", "text": "one"},
        {"type": f"{transcription}.delta", "item_id": "y", "delta": None},
        {"type": "input_audio_buffer.committed", "item_id": "y"},
    )
    for message in more:
        assert list(turns.received(json.dumps(message))) == []
    found = {"type": f"{transcription}.completed", "item_id": "y", "transcript": "ja", "languages": [{"code": "de"}]}
    assert [event.language for event in turns.received(json.dumps(found)) if isinstance(event, Transcript)] == ["de"]


# --- An utterance at a time: the models that tell words while they are spoken ---------------------------------------


async def test_a_live_model_gets_utterances_and_tells_words_as_they_come(vendor: OpenAIServer) -> None:
    engine = find_engine("openai", EngineOptions(model=LIVE, url=vendor.url))
    assert not engine.capabilities.endpointing
    async with recognition(vendor, model=LIVE) as opened:
        push(opened, silence(0.3), say("one", "two"))
        await heard(vendor, opened)
        events = await told(opened)
    assert [(t.text, t.revision, t.final) for t in transcripts(events)] == [
        ("one", 0, False),
        ("one two", 1, False),
        ("one two", 2, True),
    ]
    assert not [event for event in events if isinstance(event, SpeechStarted | SpeechEnded)]
    assert (finals(events)[0].start, finals(events)[0].end) == pytest.approx((0.0, 0.9))
    update, commit = vendor.said
    assert update["session"]["audio"]["input"]["turn_detection"] is None
    assert commit == {"type": "input_audio_buffer.commit"}


async def test_an_utterance_is_sent_again_whole(vendor: OpenAIServer) -> None:
    vendor.faults.append({"drop": 0.6})
    async with recognition(vendor, model=LIVE) as opened:
        push(opened, silence(0.3), say("one", "two"))
        events = await told(opened)
    assert [t.text for t in finals(events)] == ["one two"]
    assert [t.revision for t in transcripts(events)] == list(range(len(transcripts(events))))
    assert vendor.seconds[1] == pytest.approx(0.9)


async def test_an_utterance_that_fails_has_no_final(vendor: OpenAIServer) -> None:
    vendor.failing[1] = "server_error"
    async with recognition(vendor, model=LIVE, interim=False) as opened:
        push(opened, say("one"))
        events = await told(opened)
    # Whoever opened it marks the hole.
    assert events == [EngineError("OpenAI could not transcribe an utterance (server_error)", recoverable=True)]


async def test_less_than_can_be_committed_is_not(vendor: OpenAIServer) -> None:
    async with recognition(vendor, model=LIVE) as opened:
        push(opened, silence(0.04))
        assert await told(opened) == []
    assert [said["type"] for said in vendor.said] == ["session.update"]


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "type", "message"),
    [
        ("invalid_api_key", "invalid_request_error", "invalid_api_key: check the key in OPENAI_API_KEY"),
        ("insufficient_quota", "insufficient_quota", "insufficient_quota: the account has no credit left"),
        ("model_not_found", "invalid_request_error", "model_not_found: check the model"),
        ("invalid_value", "invalid_request_error", "invalid_value: check model and language"),
        ("Words of theirs", "invalid_request_error", "an error: check model and language"),
    ],
)
async def test_an_error_that_no_retry_will_change_ends_it(
    vendor: OpenAIServer, code: str, type: str, message: str
) -> None:
    vendor.faults.append({"error": (code, type)})
    async with recognition(vendor) as opened:
        push(opened, say("one"))
        events = [event async for event in opened]
    assert events == [EngineError(f"OpenAI refused with {message}", recoverable=False)]
    assert len(vendor.requests) == 1


async def test_a_quota_that_ends_in_a_turn_ends_it(vendor: OpenAIServer) -> None:
    vendor.failing[1] = "insufficient_quota"
    async with recognition(vendor) as opened:
        push(opened, say("one"), silence(1.0))
        events = [event async for event in opened]
    assert events[-1] == EngineError(
        "OpenAI refused with insufficient_quota: the account has no credit left", recoverable=False
    )


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "check the key in OPENAI_API_KEY"),
        (403, "the key in OPENAI_API_KEY may not be used for this, or not from here"),
        (404, "check the model"),
        (418, "check the engine's options"),
    ],
)
async def test_a_refused_upgrade_ends_it(vendor: OpenAIServer, status: int, remedy: str) -> None:
    vendor.faults.append({"status": status})
    async with recognition(vendor) as opened:
        events = [event async for event in opened]
    assert events == [EngineError(f"OpenAI refused with HTTP {status}: {remedy}", recoverable=False)]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"status": 429}, "HTTP 429"),
        ({"error": ("rate_limit_exceeded", "rate_limit_error")}, "rate_limit_exceeded"),
        ({"error": (None, "server_error")}, "server_error"),
        ({"after": 0.2, "close": (1001, "Your session hit the maximum duration of 60 minutes.")}, "closed"),
        ({"say": ["[]"]}, "a message that cannot be read"),
    ],
    ids=["503", "429", "rate limit", "server error", "going away", "no object"],
)
async def test_whatever_passes_is_tried_again(vendor: OpenAIServer, fault: dict[str, Any], cause: str) -> None:
    vendor.faults.extend([fault, fault])
    async with recognition(vendor) as opened:
        push(opened, say("one", "two"), silence(1.0))
        await vendor.until(lambda: any("completed" in message["type"] for message in vendor.told))
        events = await told(opened)
    assert [t.text for t in finals(events)] == ["one two"]
    errors = [event for event in events if isinstance(event, EngineError)]
    assert [error.message for error in errors] == [f"the connection to OpenAI failed ({cause}); trying again"]
    assert len(vendor.requests) == 3


async def test_neither_key_nor_words_reach_the_log(
    vendor: OpenAIServer, caplog: pytest.LogCaptureFixture, read_log: Callable[[], str]
) -> None:
    caplog.set_level(logging.DEBUG)
    async with recognition(vendor) as opened:
        push(opened, say("one", "two"), silence(1.0))
        await heard(vendor, opened)
        assert finals(await told(opened))
    for logged in (caplog.text, read_log()):
        assert KEY not in logged
        assert "input_audio" not in logged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(grammar=Path("g.jsgf")), "openai has neither a grammar nor workers of ours"),
        (EngineOptions(workers=2), "openai has neither a grammar nor workers of ours"),
        (
            EngineOptions(model="gpt-4o-transcribe", keywords=("x",)),
            "gpt-4o-transcribe takes no keywords: choose gpt-transcribe or gpt-live-transcribe, or leave them out",
        ),
    ],
)
def test_what_it_cannot_do_is_said_at_the_start(options: EngineOptions, message: str) -> None:
    with pytest.raises(SpeechError, match=message):
        find_engine("openai", options)


def test_a_missing_key_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SpeechError, match="openai needs a key: set OPENAI_API_KEY"):
        find_engine("openai", EngineOptions())


async def test_both_sides_speak_as_the_vendors_own_package_reads(vendor: OpenAIServer) -> None:
    types = pytest.importorskip("openai.types.realtime", reason="openai is not installed: its types judge")
    adapter = pytest.importorskip("pydantic").TypeAdapter
    vendor.failing[2] = "server_error"
    async with recognition(vendor) as opened:
        vendor.complain_after = 0.1
        push(opened, say("one"), silence(1.0), say("two"), silence(1.0))
        await heard(vendor, opened)
        await told(opened)
    server, client = adapter(types.RealtimeServerEvent), adapter(types.RealtimeClientEvent)
    kinds = set()
    for message in vendor.told:
        read = server.validate_python(message)
        assert (read.type, read.model_extra) == (message["type"], {})
        kinds.add(message["type"].rpartition(".")[2])
    assert kinds >= {"created", "updated", "speech_started", "speech_stopped", "committed", "delta", "completed"}
    assert {"failed", "error"} <= kinds
    for message in [*vendor.said, vendor.appended]:
        read = client.validate_python(message)
        assert read.model_dump(exclude_unset=True) == message
