"""One stream from its first message to its last. Read it from top to bottom and you have read the project.

    text ─ wire.decode ─ Session.receive ─ Decoder ─ Frame ─ Chain ─ Processor.on_frame
    Stream.play ─ Playback ─ Encoder ─ wire.Writer ─ Outlet.send

A session does no I/O and reads no clock of its own: its connection tells it the time and carries what it sends.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import Literal, Protocol

import structlog

from streamsink import wire
from streamsink.audio import Frame, Samples, Track
from streamsink.barge_in import Interrupter
from streamsink.codec import PTIMES, CodecSpec
from streamsink.endpoint import Endpoint
from streamsink.errors import BadMessage, CodecError, ProcessorError, ProtocolError
from streamsink.playback import Playback
from streamsink.processor import Chain, MarkOutcome, Processor
from streamsink.slope import SAMPLE_EVERY
from streamsink.speech.echo import EchoGate
from streamsink.speech.events import Speaker, Transcript
from streamsink.status import StatusEvent
from streamsink.stream import Stream
from streamsink.track import SharedCounter, TrackClock

log = structlog.get_logger(__name__)

BAD_MESSAGES = 20
BAD_MESSAGES_WITHIN = 10.0
"""So many bad messages within so many seconds end the stream."""
FLOOD_FACTOR = 1.01
FLOOD_ALLOWANCE = 10.0
"""Audio may exceed the time since the stream's start by this factor and so many seconds."""
MESSAGES_A_SECOND = 500
MESSAGES_ALLOWANCE = 10_000
"""Likewise messages of all kinds: two tracks of 10 ms frames make 200 a second."""
UNSENT_LIMIT = 2.0
"""Seconds of audio that may wait in the socket of a peer that does not read."""
_CLOCK_STEP = 0.02
"""Seconds; what the far end heard is placed right behind what it heard before when the clocks differ by less."""

_TRACKS = {track.value: track for track in (Track.INBOUND, Track.OUTBOUND)}


class Outlet(Protocol):
    """What a session needs of its connection."""

    def send(self, text: bytes) -> None:
        """Send one text message."""

    def limit_unsent(self, octets: int) -> None:
        """Hold back while the peer has left so much unread."""

    def close(self, code: int, reason: str) -> None:
        """Close the WebSocket (RFC 6455 §7.4); what was sent before still leaves."""


class Session:
    """One stream's state machine.

    Args:
        endpoint: What all sessions share.
        outlet: The connection.
        path: The path of the upgrade request.
        pipeline: The pipeline that path names; None leaves it to the parameters.
        client: Who connected, for the log.
        token_name: Which token opened it, for the log.
        now: Seconds on the endpoint's clock.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        outlet: Outlet,
        *,
        path: str,
        pipeline: str | None,
        client: str,
        token_name: str,
        now: float,
    ) -> None:
        self.endpoint = endpoint
        self.path = path
        self.pipeline = pipeline
        # None until the start message; kept when the stream has ended.
        self.stream: Stream | None = None
        self.ended = False
        # Set when every processor's on_stop is over and the files are closed.
        self.done = asyncio.Event()
        self.frames_received = 0
        self.frames_lost = 0
        self.last_media = now
        self._outlet = outlet
        self._log = log.bind(client=client, token=token_name, path=path)
        self._started_at = now
        self._codec: CodecSpec | None = None
        self._chain: Chain | None = None
        self._playback: Playback | None = None
        self._writer: wire.Writer | None = None
        self._tracks: dict[str, TrackClock] = {}
        self._shared_counter = SharedCounter()
        self._octets_per_second = 0
        self._byteorder: Literal["little", "big"] = "little"
        # Whether listening may yet change it.
        self._byteorder_open = endpoint.settings.l16_byteorder == "auto"
        self._messages = 0
        self._duplicates = 0
        self._bad_times: deque[float] = deque(maxlen=BAD_MESSAGES)
        self._bad = 0
        self._unknown_events: set[str] = set()
        # The track of the first frame: its media clock is what we follow, and what is heard of ours is placed on it.
        self._leading: TrackClock | None = None
        self._played_position = 0
        # Whether something has been queued that a talker may barge in on.
        self._interruptible = False
        self._finishing: asyncio.Task[None] | None = None
        endpoint.sessions.add(self)
        endpoint.count()

    # --- In: text from the socket ------------------------------------------------------------------------------------

    def receive(self, text: bytes, now: float) -> None:
        """Take one text message (UTF-8, checked) that arrived at ``now``. Never raises for what a peer sends."""
        if self.ended:
            return
        self._messages += 1
        if self._messages > MESSAGES_ALLOWANCE and self._too_many_messages(now):
            self.close(1008, "flood: too many messages", "policy")
            return
        try:
            message = wire.decode(text)
            kind = type(message)
            if kind is wire.Media:
                self._media(message, now)  # type: ignore[arg-type]
            elif kind is wire.Start:
                self._start(message, now)  # type: ignore[arg-type]
            elif kind is wire.Mark:
                self._mark(message, now)  # type: ignore[arg-type]
            elif kind is wire.Dtmf:
                self._dtmf(message)  # type: ignore[arg-type]
            elif kind is wire.Stop:
                self.close(1000, "stop", "stop")
            elif kind is wire.Unknown:
                self._unknown(message)  # type: ignore[arg-type]
        except BadMessage as error:
            self.bad_message(error, now)
        except ProtocolError as error:
            self.close(error.close_code, str(error), "policy")

    def _too_many_messages(self, now: float) -> bool:
        return self._messages > (now - self._started_at) * MESSAGES_A_SECOND + MESSAGES_ALLOWANCE

    def _start(self, message: wire.Start, now: float) -> None:
        if self.stream is not None:
            raise BadMessage("second_start", "a second start message: a stream starts once")
        body = message.start
        pipeline = self._choose_pipeline(body.custom_parameters or {})
        codec = self._choose_codec(body.media_format)
        sid = message.sid or uuid.uuid4().hex
        settings = self.endpoint.settings
        self._codec = codec
        self._octets_per_second = codec.bytes_per_second
        self._started_at = self.last_media = now
        self._messages = 0
        self._writer = wire.Writer(sid)
        self._playback = Playback(
            codec,
            self._writer,
            self._outlet.send,
            self._wake_pacer,
            self.endpoint.clock,
            settings.playout_lead_ms / 1000,
        )
        # Base64 makes four octets of three, and each frame has its message around it.
        around = len(self._writer.media(b"")) * 1000 / codec.ptime
        self._outlet.limit_unsent(round(UNSENT_LIMIT * (codec.bytes_per_second * 4 / 3 + around)))
        if settings.l16_byteorder == "big":
            self._byteorder = "big"
            self._playback.set_byteorder("big")
        chain = self._build_chain(pipeline)
        self.stream = Stream(
            sid=sid,
            call_sid=body.call_sid,
            account_sid=body.account_sid,
            name=message.name,
            codec=codec,
            tracks=tuple(_TRACKS[name] for name in dict.fromkeys(body.tracks or ()) if name in _TRACKS)
            or (Track.INBOUND,),
            custom_parameters=body.custom_parameters or {},
            path=self.path,
            started_at=datetime.now(UTC),
            recordings=settings.recordings,
            disk=self.endpoint.disk,
            delivery=self.endpoint.delivery,
            processors=chain.names,
            playback=self._playback,
            talk_back=settings.pipelines[pipeline].talk_back,
            may_speak=settings.pipelines[pipeline].talk_back and chain.speaks,
            control=self,
            synthesizer=self.endpoint.synthesizer,
            loop=self.endpoint.loop,
            rooms=self.endpoint.rooms,
        )
        self.pipeline = pipeline
        self._chain = chain
        self._playback.on_unconfirmed = self._on_unconfirmed
        self._playback.on_barge_in = self._on_barge_in
        if chain.listens and settings.pipelines[pipeline].talk_back:
            self._know_own_voice()
        if chain.wants_played:
            self._playback.on_played = self._on_played
        self._take_over(sid)
        self._log = self._log.bind(stream=sid, call=body.call_sid)
        self._log.info(
            "stream started",
            account=body.account_sid,
            # Not the name of a custom parameter: their values are nobody's business here.
            name=body.name or body.stream_name,
            codec=str(codec),
            pipeline=pipeline,
            processors=chain.names,
            tracks=[track.value for track in self.stream.tracks],
        )
        chain.start(self.stream)

    def _choose_pipeline(self, parameters: dict[str, object]) -> str:
        if self.pipeline is not None:
            return self.pipeline
        name = parameters.get("pipeline", "default")
        if not isinstance(name, str) or name not in self.endpoint.pipelines:
            raise ProtocolError("the custom parameter `pipeline` names no pipeline of this endpoint")
        return name

    def _choose_codec(self, given: wire.MediaFormat | None) -> CodecSpec:
        if given is None or given.sample_rate is None:
            raise ProtocolError("the start message has no mediaFormat with a sampleRate: neither is ever guessed")
        try:
            return CodecSpec.from_media_format(given.encoding, given.sample_rate, given.channels)
        except CodecError as error:
            self._log.warning(
                "media format refused",
                encoding=given.encoding,
                sample_rate=given.sample_rate,
                channels=given.channels,
                cause=str(error),
            )
            raise ProtocolError("this mediaFormat cannot be decoded") from None

    def _build_chain(self, pipeline: str) -> Chain:
        processors: list[tuple[str, Processor]] = []
        for plugin in self.endpoint.pipelines[pipeline]:
            try:
                processors.append((plugin.name, plugin.build()))
            except ProcessorError as error:
                self.endpoint.metrics.processor_error(plugin.name)
                self._log.error("processor not built", processor=plugin.name, exc_info=error)
        return Chain(processors, self.endpoint.metrics, detectors=self.endpoint.detectors)

    def _take_over(self, sid: str) -> None:
        """The newest stream has the streamSid; an older one with the same is closed."""
        self.endpoint.take_over(sid)
        self.endpoint.live[sid] = self
        if self.endpoint.siblings is not None:
            self.endpoint.siblings.tell("sid", sid)

    def _media(self, message: wire.Media, now: float) -> None:
        if self._chain is None:
            raise ProtocolError("media before start")
        media = message.media
        clock = self._tracks.get(media.track)
        if clock is None:
            clock = self._new_track(media.track, now)
        clock.octets += len(media.payload)
        allowed = (now - self._started_at) * FLOOD_FACTOR + FLOOD_ALLOWANCE
        if clock.octets > allowed * self._octets_per_second:
            raise ProtocolError("flood: more audio than time has passed")
        self.last_media = now

        chunk = media.chunk
        if chunk is None:
            chunk = clock.due or 0
        if chunk == clock.due and len(self._tracks) == 1:
            clock.due = chunk + 1
        else:
            missing = clock.missing(chunk)
            if missing is None:
                self._duplicates += 1
                return
            if len(self._tracks) > 1:
                others = [other for other in self._tracks.values() if other is not clock]
                missing = self._shared_counter.lost(clock, chunk, missing, others)
                self._shared_counter.saw(chunk, clock.track)
            self.frames_lost += clock.accept(chunk, missing, now)

        samples = clock.decoder.decode(media.payload)
        if not len(samples):
            return
        # Read-only, as processors share it.
        samples.setflags(write=False)
        if self._byteorder_open and clock.track is Track.INBOUND and clock.decoder.byteorder != self._byteorder:
            # Found out by listening: what we send must read as what we get.
            self._byteorder = clock.decoder.byteorder
            self._playback.set_byteorder(self._byteorder)  # type: ignore[union-attr]
        if self.frames_received == 0:
            self._first_frame(clock, samples, now)
        self.frames_received += 1
        start, lost = clock.advance(len(samples))
        if now >= clock.slope_due:
            self._follow(clock, now)
        sequence = message.sequence if message.sequence is not None else chunk
        self._chain.frame(Frame(samples, self._codec.rate, clock.track, start, lost, sequence))  # type: ignore[union-attr]

    def _new_track(self, name: str, now: float) -> TrackClock:
        track = _TRACKS.get(name)
        if track is None:
            raise BadMessage("track", "expected `inbound` or `outbound` - at `$.media.track`")
        assert self._codec is not None
        decoder = self._codec.decoder(self.endpoint.settings.l16_byteorder)
        # Tracks run side by side: a later one begins where the first one's newest frame did.
        position = 0
        for first in self._tracks.values():
            position = first.position - first.length
            self._shared_counter.saw((first.due or 0) - 1, first.track)
        clock = self._tracks[name] = TrackClock(track, decoder, self._codec.rate, position, now)
        return clock

    def _first_frame(self, clock: TrackClock, samples: Samples, now: float) -> None:
        """The first frame tells the ptime, which no message does, and starts the media clock."""
        assert self._codec is not None
        assert self._playback is not None
        assert self.stream is not None
        self._leading = clock
        if self.stream.talk_back:
            clock.slope_due = now
        ptime, rest = divmod(len(samples) * 1000, self._codec.rate)
        if not rest and ptime in PTIMES and ptime != self._codec.ptime:
            self._codec = self._codec.with_ptime(ptime)
            self.stream.codec = self._codec
            self._playback.set_ptime(ptime)

    def _follow(self, clock: TrackClock, now: float) -> None:
        """Outgoing audio keeps the pace of the audio that comes in: the far end's clock is not ours."""
        assert self._codec is not None
        assert self._playback is not None
        clock.slope_due = now + SAMPLE_EVERY
        if clock.slope.observe(now, clock.position / self._codec.rate):
            self._playback.set_slope(clock.slope.value)

    def _dtmf(self, message: wire.Dtmf) -> None:
        if self._chain is None:
            raise BadMessage("before_start", "dtmf before start")
        if message.dtmf.digit not in wire.DIGITS:
            raise BadMessage("type", "expected one of 0-9 * # A-D - at `$.dtmf.digit`")
        self._chain.call("on_dtmf", message.dtmf.digit, message.dtmf.duration)

    def _mark(self, message: wire.Mark, now: float) -> None:
        if self._chain is None or self._playback is None:
            raise BadMessage("before_start", "mark before start")
        if self._playback.mark_echoed(message.mark.name, now):
            self._chain.call("on_mark", message.mark.name, MarkOutcome.PLAYED)

    def _unknown(self, message: wire.Unknown) -> None:
        self.endpoint.metrics.bad_message("unknown_event")
        if message.event not in self._unknown_events and len(self._unknown_events) < BAD_MESSAGES:
            self._unknown_events.add(message.event)
            self._log.info("unknown event ignored", event_name=message.event)

    def bad_message(self, error: BadMessage, now: float) -> None:
        """Count a message that cannot be used; too many in a short time end the stream."""
        self.endpoint.metrics.bad_message(error.reason)
        self._bad += 1
        if self._bad == 1:
            self._log.warning("bad message dropped", cause=str(error), reason=error.reason)
        self._bad_times.append(now)
        if len(self._bad_times) == BAD_MESSAGES and now - self._bad_times[0] <= BAD_MESSAGES_WITHIN:
            self.close(1008, f"{BAD_MESSAGES} bad messages within {BAD_MESSAGES_WITHIN:g} s", "policy")

    def status(self, event: StatusEvent) -> None:
        """A status webhook about this stream arrived."""
        if self._chain is not None:
            self._chain.call("on_status", event)

    # --- Out: what processors send -----------------------------------------------------------------------------------

    def _wake_pacer(self) -> None:
        assert self._playback is not None
        self.endpoint.pacer.wake(self._playback)

    def writable(self, flag: bool) -> None:
        """The socket takes no more, or takes more again."""
        if self._playback is not None:
            self._playback.set_writable(flag)

    def send_dtmf(self, digit: str) -> None:
        """Send one digit.

        Raises:
            StreamClosed: The stream has ended.
        """
        assert self._playback is not None
        self._playback.dtmf(digit)

    def clear(self) -> None:
        """Drop all audio queued here and at the far end; the marks in it are cleared."""
        assert self._playback is not None
        assert self._chain is not None
        for name in self._playback.clear():
            self._chain.call("on_mark", name, MarkOutcome.CLEARED)

    def _on_unconfirmed(self, name: str) -> None:
        """A mark's echo has not come."""
        assert self._chain is not None
        self._chain.call("on_mark", name, MarkOutcome.UNCONFIRMED)

    def transcribed(self, transcript: Transcript) -> None:
        """A processor knows what was said: every processor hears of it."""
        assert self._chain is not None
        self._chain.call("on_transcript", transcript)

    def speaker_changed(self, event: Speaker) -> None:
        """Somebody else talks in the room this stream is in: every processor hears of it."""
        assert self._chain is not None
        self._chain.call("on_speaker", event)

    def _on_barge_in(self) -> None:
        """Something is queued that a talker may barge in on: from now on the stream is listened to."""
        assert self._playback is not None
        assert self._chain is not None
        if not self._interruptible:
            self._interruptible = True
            self._chain.listen(Interrupter(self._playback, self._chain.listening, self.clear))
            self._know_own_voice()

    def _know_own_voice(self) -> None:
        """Have what is sent compared with what comes in: the conference may carry it back."""
        assert self._playback is not None
        assert self._chain is not None
        if self._chain.echo is None:
            self._chain.echo = EchoGate(self._playback.codec.rate, self.endpoint.clock)
            self._playback.on_sent = self._on_sent

    def _on_sent(self, samples: Samples, at: float) -> None:
        assert self._playback is not None
        assert self._chain is not None
        assert self._chain.echo is not None
        # How late the far end is counts as part of how late the echo is: it is learned again with every mark.
        self._chain.echo.played(samples, at - self._playback.lag)

    def _on_played(self, samples: Samples, at: float) -> None:
        """Audio of ours was heard at ``at`` seconds: place it on the inbound media clock."""
        assert self._codec is not None
        assert self._chain is not None
        epoch = self._started_at if self._leading is None else self._leading.slope.delay
        start = max(0, round((at - epoch) * self._codec.rate))
        if abs(start - self._played_position) < _CLOCK_STEP * self._codec.rate or start < self._played_position:
            start = self._played_position
        self._played_position = start + len(samples)
        self._chain.played(Frame(samples, self._codec.rate, Track.OUTBOUND, start, 0, 0))

    # --- The end -----------------------------------------------------------------------------------------------------

    def hang_up(self, reason: str) -> None:
        """A processor ends the stream."""
        self.close(1000, reason, "closed")

    def start_deadline(self) -> None:
        """The time a peer has for its start message is over."""
        if self.stream is None:
            self.close(1008, "no start message in time", "policy")

    def check_silence(self, now: float) -> None:
        """End a stream that has been without media for longer than the settings allow."""
        limit = self.endpoint.settings.media_silence_seconds
        if limit is not None and self.stream is not None and now - self.last_media > limit:
            self.close(1008, f"no media for {limit:g} s", "lost")

    def close(self, code: int, text: str, reason: str) -> None:
        """End the stream from this side.

        Args:
            code: WebSocket close code (RFC 6455 §7.4).
            text: Words for the peer and the log.
            reason: What ``on_stop`` is told: ``stop``, ``closed``, ``lost``, ``policy``, ``shutdown`` or ``error``.
        """
        if not self.ended:
            self.end(code, text, reason)
            self._outlet.close(code, text)

    def end(self, code: int, text: str, reason: str) -> None:
        """The stream is over, whoever ended it: settle what is open and run every ``on_stop``, once."""
        if self.ended:
            return
        self.ended = True
        if self._playback is not None and self._chain is not None:
            for name in self._playback.close():
                self._chain.call("on_mark", name, MarkOutcome.UNCONFIRMED)
            self.endpoint.pacer.forget(self._playback)
        if self.stream is not None:
            self.stream.close_code = code
            self.stream.close_reason = text
            if self.endpoint.live.get(self.stream.sid) is self:
                del self.endpoint.live[self.stream.sid]
        self._finishing = asyncio.ensure_future(self._finish(code, text, reason))

    async def _finish(self, code: int, text: str, reason: str) -> None:
        now = self.endpoint.clock()
        try:
            if self._chain is not None:
                await self._chain.stop(reason)
        finally:
            self._settle(code, text, reason, now)

    def _settle(self, code: int, text: str, reason: str, now: float) -> None:
        self._log.info(
            "stream stopped" if self.stream is not None else "connection ended before start",
            reason=reason,
            close_code=code,
            close_reason=text,
            seconds=round(now - self._started_at, 3),
            frames=self.frames_received,
            lost=self.frames_lost,
            duplicates=self._duplicates,
            bad=self._bad,
            sent=self.frames_sent,
            codec=None if self._codec is None else str(self._codec),
            pipeline=self.pipeline,
        )
        self.endpoint.metrics.stream_ended(self, reason)
        self.endpoint.sessions.discard(self)
        self.endpoint.count()
        self.done.set()

    # --- For the metrics ---------------------------------------------------------------------------------------------

    @property
    def frames_sent(self) -> int:
        """Media messages sent."""
        return 0 if self._playback is None else self._playback.frames_sent

    @property
    def underruns(self) -> int:
        """How often the far end ran dry in the middle of something."""
        return 0 if self._playback is None else self._playback.underruns

    @property
    def codec_name(self) -> str:
        """The codec's name for a label, ``none`` before the start message."""
        return "none" if self._codec is None else self._codec.name
