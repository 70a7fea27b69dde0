"""Vendors of speech recognition on a local socket, message by message as their documentation has it.

They do hear what they are sent: a word is a tone, and its pitch says which word. So what a client is told, and when it
says it was, follows from the audio that reached the vendor and from nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from streamsink.audio import Samples
from streamsink.codec import CodecSpec
from streamsink.speech.stt.link import LinkRecognition
from streamsink.speech.transcription import Event

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
WORD_SECONDS, GAP_SECONDS = 0.2, 0.1
_FRAME = 0.02
_LOUD = 1000
_TRANSCRIPTION = "conversation.item.input_audio_transcription"

V = TypeVar("V", bound="Vendor")


def say(*words: str, rate: int = 8000) -> Samples:
    """Words, each a tone of 200 ms with 100 ms of silence behind it; int16."""
    spoken = [np.zeros(0)]
    for word in words:
        moments = np.arange(round(WORD_SECONDS * rate)) / rate
        spoken.append(8000 * np.sin(2 * np.pi * (400 + 200 * WORDS.index(word)) * moments + 0.5))
        spoken.append(np.zeros(round(GAP_SECONDS * rate)))
    return np.concatenate(spoken).astype(np.int16)


def silence(seconds: float, rate: int = 8000) -> Samples:
    return np.zeros(round(seconds * rate), np.int16)


def encoded(samples: Samples, encoding: str) -> bytes:
    if encoding == "linear16":
        return samples.tobytes()
    return CodecSpec("PCMU" if encoding == "mulaw" else "PCMA", 8000).encoder().encode(samples)


class Heard(NamedTuple):
    """A word in the audio of a connection; seconds since its first sample."""

    word: str
    start: float
    end: float


class Ear:
    """Finds words in audio as it comes."""

    def __init__(self, encoding: str, rate: int) -> None:
        self._decoder = {
            "mulaw": CodecSpec("PCMU", 8000),
            "alaw": CodecSpec("PCMA", 8000),
            "linear16": CodecSpec("L16", 16000),
        }[encoding].decoder()
        self.rate = rate
        self._samples = np.zeros(0, np.int16)

    def take(self, audio: bytes) -> None:
        self._samples = np.concatenate((self._samples, self._decoder.decode(audio)))

    @property
    def seconds(self) -> float:
        return len(self._samples) / self.rate

    def words(self, since: float) -> list[Heard]:
        """Words that begin at ``since`` or later and are over."""
        frame = round(_FRAME * self.rate)
        first = round(since * self.rate)
        frames = len(self._samples[first:]) // frame
        loud = [
            bool(np.abs(self._samples[first + i * frame : first + (i + 1) * frame].astype(int)).max() > _LOUD)
            for i in range(frames)
        ]
        words, began = [], None
        for i, sounds in enumerate(loud):
            if sounds and began is None:
                began = i
            elif not sounds and began is not None:
                tone = self._samples[first + began * frame : first + i * frame].astype(int)
                crossings = np.count_nonzero(np.diff(np.signbit(tone[: frame * 4])))
                pitch = crossings / 2 / (min(len(tone), frame * 4) / self.rate)
                words.append(Heard(WORDS[round((pitch - 400) / 200)], since + began * _FRAME, since + i * _FRAME))
                began = None
        return words

    def speaks(self) -> bool:
        """Whether the last moment is loud."""
        last = self._samples[-round(_FRAME * self.rate) :]
        return bool(len(last) and np.abs(last.astype(int)).max() > _LOUD)


class Vendor:
    """What the vendors' servers share: connections that go wrong as a test says, and what came over them.

    Attributes:
        faults: For each connection to come, what goes wrong: ``status`` (of the refusal), ``drop`` (after so many
            seconds of audio the socket is cut), ``close`` (code and reason, likewise), ``say`` (messages first).
        requests: Upgrade requests.
        seconds: Audio that each connection got.
        told: Messages sent to the client.
        said: Text messages of the client but audio.
    """

    def __init__(self) -> None:
        self.faults: deque[dict[str, Any]] = deque()
        self.requests: list[Request] = []
        self.seconds: list[float] = []
        self.told: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []
        self.changed = asyncio.Event()
        self.url = ""
        self._fault: dict[str, Any] = {}

    def refuse(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        self._fault = self.faults.popleft() if self.faults else {}
        self.changed.set()
        if "status" in self._fault:
            return connection.respond(HTTPStatus(self._fault["status"]), "refused")
        return None

    async def until(self, condition: Any) -> None:
        """Wait until something the vendor saw is so."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def tell(self, connection: ServerConnection, message: dict[str, Any]) -> None:
        self.told.append(message)
        await connection.send(json.dumps(message))

    async def heard(self, connection: ServerConnection, ear: Ear, audio: bytes) -> None:
        """Take audio; raises when this is where the connection fails."""
        ear.take(audio)
        self.seconds[-1] = ear.seconds
        self.changed.set()
        fault = self._fault
        if ear.seconds >= fault.get("drop", np.inf):
            connection.transport.abort()
            await connection.wait_closed()
        if ear.seconds >= fault.get("after", np.inf):
            await connection.close(*fault["close"])

    async def serve(self, connection: ServerConnection) -> None:
        self.seconds.append(0.0)
        with contextlib.suppress(ConnectionClosed):
            for message in self._fault.get("say", ()):
                await connection.send(message)
            await self.converse(connection)

    async def converse(self, connection: ServerConnection) -> None:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def listening(vendor: V) -> AsyncIterator[V]:
    server: Server
    async with serve(vendor.serve, "127.0.0.1", 0, process_request=vendor.refuse, ping_interval=None) as server:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        vendor.url = f"ws://{host}:{port}"
        yield vendor


class DeepgramServer(Vendor):
    """Deepgram's live transcription: https://developers.deepgram.com/reference/speech-to-text/listen-streaming.

    Interim results: https://developers.deepgram.com/docs/interim-results · ends of speech: …/docs/endpointing,
    …/docs/utterance-end · …/docs/audio-keep-alive, …/docs/close-stream, …/docs/finalize.

    Attributes:
        noisy: Whether noise hides the pauses, so that UtteranceEnd tells what `speech_final` cannot.
    """

    noisy = False

    async def converse(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        query = {key: values[0] for key, values in parse_qs(urlsplit(connection.request.path).query).items()}
        ear = Ear(query["encoding"], int(query["sample_rate"]))
        settled = 0.0
        interims = 0
        speaking = False
        async for message in connection:
            if isinstance(message, str):
                said = json.loads(message)
                self.said.append(said)
                self.changed.set()
                if said["type"] == "CloseStream":
                    words = ear.words(settled)
                    if words:
                        await self.tell(connection, self.results(words, settled, ear.seconds, final=True))
                    await self.tell(connection, self.metadata(ear.seconds))
                    return
                continue
            await self.heard(connection, ear, message)
            words = ear.words(settled)
            if ear.speaks() and not speaking and not words and query.get("vad_events") == "true":
                await self.tell(
                    connection, {"type": "SpeechStarted", "channel": [0], "timestamp": round(ear.seconds - 0.1, 2)}
                )
            speaking = ear.speaks()
            pause = ear.seconds - words[-1].end if words and not speaking else 0.0
            if words and pause >= int(query["endpointing"]) / 1000 and not self.noisy:
                await self.tell(connection, self.results(words, settled, ear.seconds, final=True, speech_final=True))
                settled, interims = ear.seconds, 0
            elif len(words) >= 3:
                # What is far enough back will not change any more.
                await self.tell(connection, self.results(words[:2], settled, words[1].end, final=True))
                settled, interims = words[1].end, 0
            elif pause >= int(query["utterance_end_ms"]) / 1000:
                await self.tell(connection, self.results(words, settled, ear.seconds, final=True))
                await self.tell(connection, {"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": words[-1].end})
                settled, interims = ear.seconds, 0
            elif len(words) > interims:
                await self.tell(connection, self.results(words, settled, ear.seconds))
                interims = len(words)

    def results(
        self, words: list[Heard], start: float, end: float, *, final: bool = False, speech_final: bool = False
    ) -> dict[str, Any]:
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "duration": round(end - start, 5),
            "start": round(start, 5),
            "is_final": final,
            "speech_final": speech_final,
            "channel": {
                "alternatives": [
                    {
                        "transcript": " ".join(word.word for word in words).capitalize(),
                        "confidence": 0.9,
                        "words": [
                            {
                                "word": word.word,
                                "start": word.start,
                                "end": word.end,
                                "confidence": 0.75,
                                "punctuated_word": word.word.capitalize() if word is words[0] else word.word,
                            }
                            for word in words
                        ],
                    }
                ]
            },
            "metadata": {
                "request_id": "e1a7b3c5-0000-4000-8000-000000000000",
                "model_info": {"name": "general-nova-3", "version": "2025-04-17.21547", "arch": "nova-3"},
                "model_uuid": "40bd3654-0000-4000-8000-000000000000",
            },
            "from_finalize": False,
        }

    def metadata(self, seconds: float) -> dict[str, Any]:
        return {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": "e1a7b3c5-0000-4000-8000-000000000000",
            "sha256": "0" * 64,
            "created": "2026-11-21T09:00:00.000Z",
            "duration": round(seconds, 5),
            "channels": 1,
        }


class OpenAIServer(Vendor):
    """OpenAI's realtime transcription: https://developers.openai.com/api/docs/guides/realtime-transcription.

    Events: https://developers.openai.com/api/reference/resources/realtime/server-events · turns:
    https://developers.openai.com/api/docs/guides/realtime-vad.

    Attributes:
        failing: Turns that cannot be transcribed, by their number, and why.
        expire_after: Seconds of audio after which a session expires, once.
        complain_after: Seconds of audio after which there is an error that matters to nobody, once.
        appended: The last audio message.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failing: dict[int, str] = {}
        self.expire_after = self.complain_after = np.inf
        self.appended: dict[str, Any] = {}
        self._events = 0
        self._items = 0
        self._told_live: int | None = None

    def event(self, type: str, **body: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": type, "event_id": f"event_{self._events:03}", **body}

    def error(self, code: str | None, type: str = "invalid_request_error") -> dict[str, Any]:
        error = {"type": type, "code": code, "message": "Words for people.", "param": None, "event_id": None}
        return self.event("error", error=error)

    async def converse(self, connection: ServerConnection) -> None:
        session: dict[str, Any] = {"type": "transcription", "object": "realtime.transcription_session", "id": "sess_1"}
        await self.tell(connection, self.event("session.created", session=session))
        if "error" in self._fault:
            await self.tell(connection, self.error(*self._fault["error"]))
            await connection.wait_closed()
        ear = Ear("linear16", 24000)
        detection: dict[str, Any] | None = None
        written = begun = 0.0
        item: str | None = None
        async for message in connection:
            said = json.loads(message)
            if said["type"] == "session.update":
                self.said.append(said)
                given = said["session"].get("audio", {}).get("input")
                if given is None:
                    await self.tell(connection, self.event("session.updated", session=session))
                    continue
                detection = given["turn_detection"]
                format = given["format"]["type"]
                encoding = {"audio/pcm": "linear16", "audio/pcmu": "mulaw", "audio/pcma": "alaw"}[format]
                ear = Ear(encoding, 24000 if encoding == "linear16" else 8000)
                session |= said["session"]
                await self.tell(connection, self.event("session.updated", session=session))
            elif said["type"] == "input_audio_buffer.append":
                self.appended = said
                await self.heard(connection, ear, base64.b64decode(said["audio"]))
                if ear.seconds >= self.complain_after:
                    self.complain_after = np.inf
                    await self.tell(connection, self.error("input_audio_buffer_commit_empty"))
                if ear.seconds >= self.expire_after:
                    self.expire_after = np.inf
                    await self.tell(connection, self.error("session_expired"))
                    await connection.close(1001, "Your session hit the maximum duration of 60 minutes.")
                words = ear.words(written)
                if detection is None:
                    item = await self.live(connection, item, words)
                    continue
                if item is None and (ear.speaks() or words):
                    item = self.new_item()
                    start = words[0].start if words else ear.seconds - 0.1
                    begun = max(written, start - detection["prefix_padding_ms"] / 1000)
                    started = {"audio_start_ms": round(begun * 1000), "item_id": item}
                    await self.tell(connection, self.event("input_audio_buffer.speech_started", **started))
                end = words[-1].end + detection["silence_duration_ms"] / 1000 if words else np.inf
                if item is not None and ear.seconds >= end and not ear.speaks():
                    stopped = {"audio_end_ms": round(end * 1000), "item_id": item}
                    await self.tell(connection, self.event("input_audio_buffer.speech_stopped", **stopped))
                    await self.transcribe(connection, item, words)
                    written, item = ear.seconds, None
            elif said["type"] == "input_audio_buffer.commit":
                self.said.append(said)
                if ear.seconds - written < 0.1:
                    await self.tell(connection, self.error("input_audio_buffer_commit_empty"))
                    continue
                # A turn that the client ends has another id than the one that was being detected.
                item = self.new_item() if detection or item is None else item
                await self.transcribe(connection, item, ear.words(written))
                written, item = ear.seconds, None
            self.changed.set()

    def new_item(self) -> str:
        self._items += 1
        return f"item_{self._items:03}"

    async def live(self, connection: ServerConnection, item: str | None, words: list[Heard]) -> str | None:
        """Words while they are spoken, before the turn is committed."""
        for number, word in enumerate(words):
            if number == 0 and item is None:
                item = self.new_item()
                self._told_live = 0
            if number >= (self._told_live or 0):
                self._told_live = number + 1
                delta = {"item_id": item, "content_index": 0, "delta": word.word if not number else f" {word.word}"}
                await self.tell(connection, self.event(f"{_TRANSCRIPTION}.delta", **delta))
        return item

    async def transcribe(self, connection: ServerConnection, item: str, words: list[Heard]) -> None:
        committed = self.event("input_audio_buffer.committed", item_id=item, previous_item_id=None)
        await self.tell(connection, committed)
        failure = self.failing.pop(self._items, None)
        if failure is not None:
            error = {"type": "server_error", "code": failure, "message": "Words for people.", "param": None}
            failed = self.event(f"{_TRANSCRIPTION}.failed", item_id=item, content_index=0, error=error)
            await self.tell(connection, failed)
            return
        text = " ".join(word.word for word in words)
        for i, word in enumerate(words if self._told_live is None else ()):
            delta = {"item_id": item, "content_index": 0, "delta": word.word if not i else f" {word.word}"}
            await self.tell(connection, self.event(f"{_TRANSCRIPTION}.delta", **delta))
        usage = {"type": "duration", "seconds": 1.0}
        completed = {"item_id": item, "content_index": 0, "transcript": text, "usage": usage}
        await self.tell(connection, self.event(f"{_TRANSCRIPTION}.completed", **completed))


def push(opened: LinkRecognition, *parts: Samples) -> None:
    """Frames of 20 ms, as they come on a stream."""
    audio = encoded(np.concatenate(parts), opened.voice.encoding)
    size = opened.voice.octets_per_second // 50
    for start in range(0, len(audio), size):
        opened.push(audio[start : start + size])


async def told(opened: LinkRecognition) -> list[Event]:
    opened.finish()
    return [event async for event in opened]
