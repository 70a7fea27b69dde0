"""One track of a call on its way through an engine, and what comes back put in order.

    frame ─ (Resampler) ─ Recognition.push … events ─ placed on the media clock, numbered, each utterance ended once

An engine that does no endpointing hears one utterance at a time, as voice activity detection cuts them out, with
:data:`PRE_ROLL` before it: detectors are late, and the first consonant is what tells the word.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec, Encoder, Resampler
from streamsink.speech.events import (
    EngineError,
    Speech,
    SpeechChange,
    SpeechEnded,
    SpeechStarted,
    Transcript,
    Word,
)
from streamsink.speech.transcription import Capabilities, Engine, Event, Recognition, Voice

PRE_ROLL = 0.3
"""Seconds of audio before the start of speech that the engine hears too."""
REMEMBERED = 4.0
"""Seconds of audio kept for a start of speech that is told late."""
LONGEST = 30.0
"""Seconds of an utterance that voice activity detection cuts out; who talks on begins another."""
OPEN_AGAIN = (5.0, 10.0, 30.0, 60.0)
"""Seconds of the call before a track whose engine gave up is tried again; the longer the more often it did."""
MOST_SILENCE = 1.0
"""Seconds of silence an engine is given for audio that was lost; the rest of a longer gap it never hears of."""

Tell = Callable[[Event], None]

_G711 = {"mulaw": "PCMU", "alaw": "PCMA"}


class Transcriber:
    """One track's; for the event loop.

    Args:
        engine: A started one.
        track: Whose voice it is.
        call_rate: Hz of the frames.
        codec: Name of the codec the call uses, such as ``PCMU``: an engine that takes it as it is gets it so.
        tell: Called with each event, in order and on the media clock.
        clock: Seconds; the event loop's.

    Attributes:
        position: Seconds on the media clock up to which audio came.
    """

    def __init__(
        self, engine: Engine, track: Track, call_rate: int, codec: str, tell: Tell, clock: Callable[[], float]
    ) -> None:
        self.track = track
        self.position = 0.0
        self.tell = tell
        self.numbers = itertools.count()
        self._engine = engine
        self._voice = voice_for(engine.capabilities, call_rate, codec)
        self._gated = not engine.capabilities.endpointing
        self._clock = clock
        self._position_at = clock()
        # Frames of the last REMEMBERED seconds, for the pre-roll.
        self._recent: deque[Frame] = deque()
        # What is pushed into now; None between utterances.
        self._current: _Hearing | None = None
        self._owed: set[_Hearing] = set()
        # Where the last utterance's audio ended: the next one does not hear it again.
        self._heard_to = 0.0
        # Where an engine that was to hear the whole track gave up, and how often one did.
        self._gave_up_at: float | None = None
        self._gave_up = 0

    def frame(self, frame: Frame) -> None:
        """Take the track's next frame."""
        self.position = (frame.start + len(frame.samples)) / frame.sample_rate
        self._position_at = self._clock()
        if self._current is not None:
            self._current.push(frame)
            if self._gated and self.position - self._current.start > LONGEST:
                self._end(self.position)
                self._begin(frame.start + len(frame.samples), frame.sample_rate)
        elif not self._gated and self._may_open():
            self._begin(frame.start, frame.sample_rate).push(frame)
        if self._gated:
            self._recent.append(frame)
            while self._recent[0].start / frame.sample_rate < self.position - REMEMBERED:
                self._recent.popleft()

    def _may_open(self) -> bool:
        if self._gave_up_at is None:
            return True
        if self.position - self._gave_up_at < OPEN_AGAIN[min(self._gave_up, len(OPEN_AGAIN)) - 1]:
            return False
        self._tell_unheard()
        return True

    def _tell_unheard(self) -> None:
        """What went by since the engine gave up is a hole."""
        if self._gave_up_at is not None:
            self.tell(self.hole(next(self.numbers), 0, self._gave_up_at, self.position))
            self._gave_up_at = None

    def ended(self, hearing: _Hearing) -> None:
        """A recognition is over; while its track goes on only since the engine gave up."""
        self._owed.discard(hearing)
        if hearing is self._current and not self._gated:
            self._current = None
            self._gave_up_at = self.position
            self._gave_up += 1

    def hole(self, number: int, revision: int, start: float, end: float) -> Transcript:
        """The final of an utterance nobody transcribed."""
        return Transcript(
            utterance=number,
            revision=revision,
            text="",
            final=True,
            start=start,
            end=max(start, end),
            track=self.track,
            dropped=True,
        )

    def speech(self, event: Speech) -> None:
        """Take what voice activity detection noticed on the track; for an engine that does no endpointing."""
        if not self._gated:
            return
        if event.change is SpeechChange.STOPPED:
            if self._current is not None:
                self._end(event.at)
        elif self._current is None and self._recent:
            rate = self._recent[-1].sample_rate
            since = round(max(self._heard_to, event.at - PRE_ROLL) * rate)
            heard = [frame for frame in self._recent if frame.start + len(frame.samples) > since]
            hearing = self._begin(heard[0].start if heard else round(self.position * rate), rate, spoken=event.at)
            for frame in heard:
                hearing.push(frame)

    async def finish(self, patience: float) -> None:
        """The track has ended: wait for what is owed; what does not come in ``patience`` seconds is a hole."""
        if self._current is not None:
            self._end(self.position)
        self._tell_unheard()
        if self._owed:
            await asyncio.wait({hearing.task for hearing in self._owed}, timeout=patience)
        for hearing in self._owed.copy():
            await hearing.recognition.close()
            await hearing.task

    def ago(self, at: float) -> float:
        """Seconds since this place on the media clock was heard."""
        return self._clock() - self._position_at + self.position - at

    def _begin(self, start: int, rate: int, spoken: float | None = None) -> _Hearing:
        hearing = _Hearing(self, self._engine.open(self._voice), self._voice, rate, start, gated=self._gated)
        self._current = hearing
        self._owed.add(hearing)
        if self._gated:
            hearing.spoke(start / rate if spoken is None else spoken)
        return hearing

    def _end(self, at: float) -> None:
        assert self._current is not None
        self._current.finish(at)
        self._heard_to = self.position
        self._current = None


def voice_for(capabilities: Capabilities, call_rate: int, codec: str) -> Voice:
    """Choose what an engine is given: the call's G.711 as it is, else PCM at the call's rate or the next it takes."""
    for encoding in ("mulaw", "alaw"):
        if codec == _G711[encoding] and encoding in capabilities.encodings:
            return Voice(encoding, 8000, call_rate)
    if "linear16" in capabilities.encodings:
        above = [rate for rate in capabilities.rates if rate >= call_rate]
        return Voice("linear16", above[0] if above else capabilities.rates[-1], call_rate)
    return Voice(capabilities.encodings[0], 8000, call_rate)


class _Utterance(msgspec.Struct):
    """What became of an utterance so far."""

    number: int
    start: float
    revision: int = -1
    text: str = ""


class _Hearing:
    """One recognition: gives it audio, and sees to it that each utterance has rising revisions and one final.

    Attributes:
        start: Seconds on the media clock of the first sample pushed.
        task: Ends with the last event.
    """

    def __init__(
        self,
        transcriber: Transcriber,
        recognition: Recognition,
        voice: Voice,
        rate: int,
        start: int,
        *,
        gated: bool,
    ) -> None:
        self.recognition = recognition
        self.start = start / rate
        self._transcriber = transcriber
        self._gated = gated
        self._rate = rate
        self._resampler = None if rate == voice.rate else Resampler(rate, voice.rate)
        self._encoder: Encoder | None = None
        if voice.encoding != "linear16":
            self._encoder = CodecSpec.parse(_G711[voice.encoding]).encoder()
        # Of the next sample on the media clock, in samples; and what was pushed, at the call's rate.
        self._due = start
        self._pushed = 0
        # Where the engine's clock and the media clock part: seconds pushed, and their place.
        self._pushed_at = [0.0]
        self._placed_at = [self.start]
        # By the engine's number; None once it is over.
        self._utterances: dict[int, _Utterance | None] = {}
        # Where the talker stopped, as voice activity detection says.
        self._stopped: float | None = None
        self.task = asyncio.ensure_future(self._listen())

    def push(self, frame: Frame) -> None:
        """Give the recognition a frame, and silence for what is missing before it."""
        gap = frame.start - self._due
        if gap > 0:
            silence = min(gap, int(MOST_SILENCE * self._rate))
            self._push(np.zeros(silence, np.int16))
            if silence < gap:
                self._pushed_at.append(self._pushed / self._rate)
                self._placed_at.append(frame.start / self._rate)
        self._due = frame.start + len(frame.samples)
        self._push(frame.samples)

    def _push(self, samples: Samples) -> None:
        self._pushed += len(samples)
        if self._resampler is not None:
            samples = self._resampler.push(samples)
        self._give(samples)

    def _give(self, samples: Samples) -> None:
        if len(samples):
            if self._encoder is not None:
                self.recognition.push(self._encoder.encode(samples))
            else:
                self.recognition.push(samples.astype("<i2", copy=False).tobytes())

    def spoke(self, at: float) -> None:
        """Voice activity detection says when the talker of this utterance began."""
        self._open(0, at)

    def finish(self, at: float) -> None:
        """No more audio comes; the talker stopped at ``at`` seconds."""
        self._stopped = at
        if self._resampler is not None:
            self._give(self._resampler.flush())
        self.recognition.finish()
        if self._gated:
            self._tell(SpeechEnded(self._open(0, at).number, at, self._transcriber.track))

    def _place(self, seconds: float) -> float:
        """Where on the media clock the engine's time lies."""
        number = max(0, bisect_right(self._pushed_at, seconds) - 1)
        return round(self._placed_at[number] + seconds - self._pushed_at[number], 3)

    async def _listen(self) -> None:
        async for event in self.recognition:
            match event:
                case Transcript():
                    self._transcript(event)
                case SpeechStarted():
                    self._open(event.utterance, self._place(event.at))
                case SpeechEnded():
                    self._ended(event)
                case EngineError():
                    self._tell(msgspec.structs.replace(event, track=self._transcriber.track))
        for key, utterance in self._utterances.items():
            if utterance is not None:
                self._hole(key, utterance)
        self._transcriber.ended(self)

    def _open(self, key: int, at: float) -> _Utterance:
        utterance = self._utterances.get(key)
        if utterance is None:
            utterance = self._utterances[key] = _Utterance(next(self._transcriber.numbers), at)
            self._tell(SpeechStarted(utterance.number, at, self._transcriber.track))
        return utterance

    def _ended(self, event: SpeechEnded) -> None:
        utterance = self._utterances.get(event.utterance)
        if utterance is not None and not self._gated:
            self._tell(SpeechEnded(utterance.number, self._place(event.at), self._transcriber.track))

    def _transcript(self, event: Transcript) -> None:
        key = 0 if self._gated else event.utterance
        if key in self._utterances and self._utterances[key] is None:
            # It had its final.
            return
        utterance = self._open(key, self._place(event.start))
        text = "" if event.dropped else event.text.strip()
        if not event.final and text in ("", utterance.text):
            return
        utterance.revision += 1
        utterance.text = text
        if event.final:
            self._utterances[key] = None
        start = self._place(event.start)
        self._tell(
            msgspec.structs.replace(
                event,
                utterance=utterance.number,
                revision=utterance.revision,
                text=text,
                start=start,
                end=max(start, self._place(event.end)),
                words=tuple(Word(word.word, self._place(word.start), self._place(word.end)) for word in event.words),
                track=self._transcriber.track,
            )
        )

    def _hole(self, key: int, utterance: _Utterance) -> None:
        """The engine gave up on an utterance: that is its final."""
        self._utterances[key] = None
        end = self._transcriber.position if self._stopped is None else self._stopped
        self._tell(self._transcriber.hole(utterance.number, utterance.revision + 1, utterance.start, end))

    def _tell(self, event: Event) -> None:
        self._transcriber.tell(event)
