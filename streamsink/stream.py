"""What a processor sees of its stream: who it is, and the way to talk back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from streamsink.audio import Samples, Track
from streamsink.codec import CodecSpec
from streamsink.errors import RoomRefused, StreamClosed, TalkBackOff
from streamsink.playback import Playback
from streamsink.playout import NOTHING, Audio, BargeIn, Playout
from streamsink.sound import SoundFile, check_tone, tone
from streamsink.speech.synthesis import Synthesizer, Utterance
from streamsink.stem import reserve
from streamsink.wire import DIGITS

if TYPE_CHECKING:
    from streamsink.delivery import Delivery
    from streamsink.disk import DiskSpace
    from streamsink.room import Rooms
    from streamsink.speech.events import Speaker, Transcript


class Attendance(msgspec.Struct):
    """When a member was in a room.

    Attributes:
        sid: Its streamSid.
        name: Its stream's name.
        joined: Seconds on the room's clock.
        left: Likewise; None while it is there.
    """

    sid: str
    name: str | None
    joined: float
    left: float | None


class Control(Protocol):
    """What a stream needs of the session that owns it."""

    def send_dtmf(self, digit: str) -> None:
        """Send one digit."""

    def clear(self) -> None:
        """Drop all audio queued here and at the far end."""

    def hang_up(self, reason: str) -> None:
        """End the stream with close code 1000."""

    def transcribed(self, transcript: Transcript) -> None:
        """Hand a transcript to every processor."""

    def speaker_changed(self, event: Speaker) -> None:
        """Tell every processor who talks in the room now."""


class Stream:
    """One stream of a call. For the event loop only, but for :attr:`stem` and :meth:`from_thread`.

    Attributes:
        sid: The stream's identifier, unique among live streams.
        call_sid: The call's identifier, None where the platform sent none.
        account_sid: The account's identifier, likewise.
        name: The friendly name the caller gave the stream, likewise.
        codec: What the payloads are encoded in, both ways.
        tracks: The tracks the platform announced.
        custom_parameters: As given by whoever asked for the stream. Values never belong in a log.
        path: The path of the URL the platform opened.
        started_at: When the start message came, UTC.
        processors: Names of the processors on this stream.
        talk_back: Whether its processors may speak.
        may_speak: Whether any of them may ever send audio.
        recordings: The folder files about this stream go to.
        disk: Asked before a new file is made there.
        delivery: Takes files and webhooks off the machine.
        close_code: WebSocket close code, once the stream has ended; 1006 when the connection was lost without one.
        close_reason: The words that came with it.
        members: Where this is a room: who has been in it, in the order of joining.
    """

    def __init__(
        self,
        *,
        sid: str,
        call_sid: str | None,
        account_sid: str | None,
        name: str | None,
        codec: CodecSpec,
        tracks: tuple[Track, ...],
        custom_parameters: dict[str, Any],
        path: str,
        started_at: datetime,
        recordings: Path,
        disk: DiskSpace,
        delivery: Delivery,
        processors: list[str],
        playback: Playback,
        talk_back: bool,
        may_speak: bool,
        control: Control,
        synthesizer: Synthesizer,
        loop: asyncio.AbstractEventLoop,
        rooms: Rooms | None = None,
    ) -> None:
        self.sid = sid
        self.call_sid = call_sid
        self.account_sid = account_sid
        self.name = name
        self.codec = codec
        self.tracks = tracks
        self.custom_parameters = custom_parameters
        self.path = path
        self.started_at = started_at
        self.recordings = recordings
        self.disk = disk
        self.delivery = delivery
        self.processors = processors
        self.close_code: int | None = None
        self.close_reason = ""
        self.talk_back = talk_back
        self.may_speak = may_speak
        self._playback = playback
        self._control = control
        self._synthesizer = synthesizer
        self._loop = loop
        self._rooms = rooms
        self.members: list[Attendance] = []
        self._stem: str | None = None
        self._reserving = threading.Lock()

    @property
    def stem(self) -> str:
        """The name, without an ending, of all files about this stream; all its processors share it.

        Reserved on disk when first asked for: best in the thread that then writes the files. Safe in any thread.

        Raises:
            OSError: The recordings folder cannot be written.
        """
        with self._reserving:
            if self._stem is None:
                self._stem = reserve(self.recordings, self.started_at, self.name or self.sid)
            return self._stem

    def play(
        self,
        samples: Audio | AsyncIterable[Audio],
        sample_rate: int | None,
        *,
        barge_in: BargeIn | None = None,
        text: Sequence[tuple[int, str]] = (),
    ) -> Playout:
        """Queue audio for the call; never blocks.

        All processors of a stream share one queue, played in order, without a gap. Nothing is converted, resampled or
        encoded before it falls due.

        Args:
            samples: Mono PCM, shape ``(n,)``: int16, or float32 from -1 to 1, where what is beyond saturates and NaN is
                silence. Must not change until the playout ends. Or an async iterator of such arrays: it is pulled in a
                task of its own, at most 1 s before its audio is due, and closed (``aclose``) when the playout has
                ended; what it raises ends the playout as ``FAILED``.
            sample_rate: Hz, 8000 to 192000; resampled to the stream's own. None with an iterator whose attribute
                ``sample_rate`` tells, once its first array has come.
            barge_in: What somebody who starts to talk may do to it; None: nothing.
            text: What is said in it, for ``text_heard``: pairs of a position, in samples at ``sample_rate``, and the
                text whose last sound ends there, in order. A list may grow while it plays.

        Returns:
            A :class:`Playout`: await it to learn how much was heard, ``cancel()`` it to take it back.

        Raises:
            CodecError: The array or the rate cannot be used.
            PlayoutFull: More than ten minutes of audio would be queued.
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
            TypeError: ``barge_in`` or ``text`` is something else.
        """
        if not self.talk_back:
            self._check_talk_back()
        return self._playback.play(samples, sample_rate, barge_in, text)

    def say(self, text: str, voice: str | None = None, *, barge_in: BargeIn | None = None) -> Playout:
        """Queue a text to be spoken, behind what is queued; never blocks.

        It is synthesized sentence by sentence, about a second ahead of the listener; a text of any length may be given.
        ``text_heard`` of its playout is what was certainly heard of it: to the word with ``espeak``, to the sentence
        with other engines. An engine that fails or dies ends the playout as ``FAILED``, and so does a voice that the
        engine does not have; ``error`` is the `SpeechError` that tells. The next text has an engine again.

        Args:
            text: What to say. Without a letter or a digit in it, nothing is played.
            voice: In the words of the engine (``[speech]`` in streamsink.toml); None is the one of the settings.
            barge_in: As in :meth:`play`.

        Raises:
            SpeechError: The engine, its extra or the voice's file is missing; the message says how to mend it.
            PlayoutFull: More than ten minutes of audio would be queued.
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
        """
        self._check_talk_back()
        utterance = Utterance(self._synthesizer, text, voice)
        if utterance.silent:
            return self.play(NOTHING, self.codec.rate)
        return self.play(utterance, None, barge_in=barge_in, text=utterance.heard)

    def play_file(self, path: str | Path, *, barge_in: BargeIn | None = None) -> Playout:
        """Queue a sound file, read in a thread as it falls due; channels are averaged.

        Args:
            path: Any format and rate soundfile reads. One that cannot be read ends the playout as ``FAILED``, and its
                ``error`` tells why.
            barge_in: As in :meth:`play`.

        Raises:
            PlayoutFull: More than ten minutes of audio would be queued.
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
        """
        return self.play(SoundFile(path), None, barge_in=barge_in)

    def tone(self, hz: float, ms: float) -> Playout:
        """Queue a tone of -12 dBFS that swells and fades within 5 ms.

        Args:
            hz: Above 0 and below half the stream's rate.
            ms: Milliseconds, above 0, ten minutes at most.

        Raises:
            ValueError: It cannot be made.
            PlayoutFull: More than ten minutes of audio would be queued.
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
        """
        self._check_talk_back()
        check_tone(hz, ms, self.codec.rate)
        return self.play(tone(hz, ms, self.codec.rate), self.codec.rate)

    def play_live(self, source: Callable[[int], Samples] | None, after: float = 0.0) -> None:
        """Pull audio from ``source`` each ptime, 20 ms ahead of the listener.

        While anything is queued with :meth:`play` both are heard, the source 12 dB quieter than it is.

        Args:
            source: Called on the event loop with a number of samples; returns as many, mono PCM at the codec's rate,
                shape ``(n,)``, int16, in well under a millisecond. One that raises is logged and dropped. None ends it.
            after: Seconds until it is called first; what is queued waits with it. For a source that has something new
                only now and then, such as just before.

        Raises:
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
            TypeError: It cannot be called.
        """
        self._check_talk_back()
        self._playback.play_live(source, after)

    def mark(self, name: str) -> None:
        """Queue a mark behind the audio queued so far; ``on_mark`` tells when it was played or cleared.

        Raises:
            PlayoutFull: 10,000 marks have not come back.
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
            ValueError: The name is no text of 1 to 1,000 characters.
        """
        self._check_talk_back()
        self._playback.mark(name)

    def clear(self) -> None:
        """Drop all audio queued here and at the far end; pending marks become CLEARED.

        Raises:
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
        """
        self._check_talk_back()
        self._control.clear()

    def send_dtmf(self, digits: str) -> None:
        """Send DTMF digits.

        Args:
            digits: Any of ``0-9 * # A-D``.

        Raises:
            ValueError: There is another character among them.
            StreamClosed: The stream has ended.
            TalkBackOff: The pipeline does not let its processors speak.
        """
        self._check_talk_back()
        if not digits or not DIGITS.issuperset(digits):
            raise ValueError("send_dtmf() takes one or more of 0-9 * # A-D")
        for digit in digits:
            self._control.send_dtmf(digit)

    async def close(self, reason: str = "") -> None:
        """End the stream with close code 1000; its processors' ``on_stop`` follows.

        Args:
            reason: Goes to the peer and the log; at most 123 bytes of it.
        """
        self._control.hang_up(reason)

    def transcribed(self, transcript: Transcript) -> None:
        """Tell every processor of this stream what was said: each gets ``on_transcript``.

        Args:
            transcript: An interim or final one; of each utterance exactly one is final.
        """
        self._control.transcribed(transcript)

    @property
    def rooms(self) -> Rooms:
        """The rooms of this process: a stream can join one.

        Raises:
            RoomRefused: This is a room itself.
        """
        if self._rooms is None:
            raise RoomRefused("a room cannot join a room: take mix out of its processors")
        return self._rooms

    def speaker_changed(self, event: Speaker) -> None:
        """Tell every processor of this stream who talks in its room now: each gets ``on_speaker``."""
        self._control.speaker_changed(event)

    def from_thread(self, call: Callable[[], object]) -> None:
        """Run ``call`` on the event loop soon. The one method that may be used from another thread.

        Raises:
            StreamClosed: The event loop has ended.
        """
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            raise StreamClosed("the endpoint has ended: nothing more can be done on this stream") from None

    def _check_talk_back(self) -> None:
        if not self.talk_back:
            raise TalkBackOff("this stream's pipeline has talk_back = false: take that line out to let it speak")
