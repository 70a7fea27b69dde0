"""A vendor's WebSocket for as long as somebody is listened to, whatever becomes of single connections.

Audio is kept until the vendor has told what was said in it, so a new connection begins where the words of the last one
ended. What is kept is bounded: what a longer outage pushes out is told as a hole.
"""

from __future__ import annotations

import abc
import asyncio
import bisect
import contextlib
import logging
import os
import random
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, Transcript
from streamsink.speech.transcription import Event, Recognition, Voice

MESSAGE_SECONDS = 0.1
"""Audio in a message: five frames cost a fifth of the work of five messages."""
LONGEST_DELAY = 10.0
"""Seconds between two tries to connect, at most."""
LASTED = 30.0
"""Seconds after which a connection that fails is no sequel of the failure before."""
_SAME = 0.001
"""Seconds; audio that begins this close to the end of the last continues it."""
_POLICY = 1008

# At debug level the library logs what it sends and receives: the key, the audio and the words.
_library_log = logging.getLogger(f"{__name__}.websockets")
_library_log.setLevel(logging.WARNING)


class Refused(SpeechError):
    """The vendor will not serve us however often we ask; the message says how to mend it."""


class Dialect(abc.ABC):
    """How one vendor is spoken to in one recognition; without I/O. All times are seconds since the first sample.

    Attributes:
        vendor: Its name, for messages.
        remedies: What to do about HTTP statuses that no retry will change.
        keep_alive: What to say when there was no audio for a while; None: nothing.
        url: Where it listens.
        done: Whether all that was said up to :meth:`close` has been answered.
    """

    vendor: ClassVar[str]
    remedies: ClassVar[dict[int, str]]
    keep_alive: ClassVar[str | None] = None
    url: str
    done: bool = False

    @property
    @abc.abstractmethod
    def settled(self) -> float:
        """Up to where no audio is needed any more."""

    @abc.abstractmethod
    def headers(self) -> dict[str, str]:
        """Headers of the upgrade request, the key among them."""

    @abc.abstractmethod
    def open(self) -> Iterable[str]:
        """A new connection: what to say first. What the last one left unsettled will be sent again."""

    @abc.abstractmethod
    def audio(self, audio: bytes, start: float, seconds: float) -> str | bytes:
        """Audio is about to be sent: as a message."""

    @abc.abstractmethod
    def received(self, message: str) -> Iterable[Event]:
        """Take a message of the vendor's.

        Raises:
            Refused: It will not serve us.
            ConnectionError: This connection is of no more use; its text is a word for the cause.
            msgspec.MsgspecError: The message cannot be read.
        """

    def reply(self) -> str | None:
        """What to say to what was received just now, if anything."""
        return None

    @abc.abstractmethod
    def close(self) -> str | None:
        """No more audio comes: what to say, if anything."""


class LinkRecognition(Recognition):
    """Carries audio to a vendor and its events back.

    Args:
        voice: What will be heard.
        dialect: How the vendor is spoken to.

    Attributes:
        keep_seconds: Audio kept for a new connection.
        first_delay: Seconds before the second try to connect; doubled with each, half of it left to chance.
        final_seconds: How long the vendor may take to tell the last words once no more audio comes.
        pause: Seconds without audio after which a connection is kept alive.
    """

    keep_seconds: float = 30.0
    first_delay: float = 0.5
    final_seconds: float = 5.0
    pause: float = 4.0

    def __init__(self, voice: Voice, dialect: Dialect) -> None:
        super().__init__(voice)
        self._dialect = dialect
        # Audio read and not settled, oldest first, and where it begins; the first `_sent` are on this connection.
        self._kept: deque[tuple[float, bytes]] = deque()
        self._sent = 0
        # Whether this connection has been told everything.
        self._spoken = False
        # Audio that waits to fill a message.
        self._part = bytearray()
        self._part_start = 0.0
        self._finished = False
        self._limit: asyncio.Timeout | None = None
        self._failures = 0
        self._holes = 0

    def finish(self) -> None:
        """No more audio comes: the vendor gets its last seconds from now on."""
        super().finish()
        self._finished = True
        self._set_limit()

    def _set_limit(self) -> None:
        if self._finished and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self.final_seconds)

    async def run(self) -> None:
        """Connect, and again when a connection fails, until all is said.

        Raises:
            Refused: The vendor will not serve us.
        """
        try:
            async with asyncio.timeout(None) as self._limit:
                self._set_limit()
                while True:
                    if await self._connection():
                        break
                    await asyncio.sleep(self._delay())
        except TimeoutError:
            self._hole(self._dialect.settled, self.audio.seconds)

    async def _connection(self) -> bool:
        """One connection, from its upgrade to its end; whether all has been said."""
        vendor = self._dialect.vendor
        opened = asyncio.get_running_loop().time()
        try:
            async with connect(
                self._dialect.url,
                additional_headers=self._dialect.headers(),
                compression=None,
                close_timeout=1,
                logger=_library_log,
            ) as socket:
                return await self._converse(socket)
        except InvalidStatus as error:
            status = error.response.status_code
            if 400 <= status < 500 and status not in (408, 429):
                remedy = self._dialect.remedies.get(status, "check the engine's options")
                raise Refused(f"{vendor} refused with HTTP {status}: {remedy}") from None
            cause = f"HTTP {status}"
        except ConnectionClosed as error:
            code = 1006 if error.rcvd is None else error.rcvd.code
            if code == _POLICY:
                raise Refused(
                    f"{vendor} closed with {code}, a breach of its policy: check the engine's options"
                ) from None
            cause = f"closed with {code}"
        except (msgspec.MsgspecError, UnicodeDecodeError):
            cause = "a message that cannot be read"
        except (OSError, InvalidHandshake) as error:
            cause = str(error) if type(error) is ConnectionError else type(error).__name__
        finally:
            self._sent = 0
            self._spoken = False
        if asyncio.get_running_loop().time() - opened > LASTED:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            self.emit(EngineError(f"the connection to {vendor} failed ({cause}); trying again", recoverable=True))
        return False

    async def _converse(self, socket: ClientConnection) -> bool:
        for first in self._dialect.open():
            await socket.send(first)
        speaking = asyncio.create_task(self._speak(socket))
        try:
            async for message in socket:
                for event in self._dialect.received(message if isinstance(message, str) else message.decode()):
                    self.emit(event)
                    self._failures = 0
                reply = self._dialect.reply()
                if reply is not None:
                    await socket.send(reply)
                self._settle()
                if self._all_said:
                    return True
            if self._all_said:
                return True
            raise ConnectionError("closed")
        finally:
            speaking.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await speaking

    @property
    def _all_said(self) -> bool:
        return self._spoken and self._dialect.done

    async def _speak(self, socket: ClientConnection) -> None:
        """Send what is kept, then what comes, to its end."""
        self._cut()
        due = self._dialect.settled
        more = True
        while more:
            while self._sent < len(self._kept):
                start, audio = self._kept[self._sent]
                self._sent += 1
                self._hole(due, start)
                seconds = self._seconds(audio)
                due = start + seconds
                await socket.send(self._dialect.audio(audio, start, seconds))
            try:
                async with asyncio.timeout(self.pause):
                    more = await self._gather()
            except TimeoutError:
                if self._part:
                    self._keep_part()
                elif self._dialect.keep_alive is not None:
                    await socket.send(self._dialect.keep_alive)
        last = self._dialect.close()
        if last is not None:
            await socket.send(last)
        self._spoken = True
        if self._dialect.done:
            await socket.close()

    async def _gather(self) -> bool:
        """Keep a message's worth of audio; whether there may be more."""
        async for at, audio in self.audio:
            if self._part and at - self._part_start - self._seconds(self._part) > _SAME:
                self._keep_part()
            if not self._part:
                self._part_start = at
            self._part += audio
            if self._seconds(self._part) >= MESSAGE_SECONDS:
                self._keep_part()
                return True
        more = bool(self._part)
        if more:
            self._keep_part()
        return more

    def _keep_part(self) -> None:
        self._kept.append((self._part_start, bytes(self._part)))
        self._part.clear()
        # What goes has nearly always been sent, and is only missed when this connection fails.
        while self._kept[-1][0] - self._kept[0][0] > self.keep_seconds:
            self._kept.popleft()
            self._sent = max(0, self._sent - 1)

    def _settle(self) -> None:
        settled = self._dialect.settled
        while self._sent and self._kept[0][0] + self._seconds(self._kept[0][1]) <= settled + _SAME:
            self._kept.popleft()
            self._sent -= 1

    def _cut(self) -> None:
        """Take off what is settled of the oldest message: nothing is told twice."""
        if self._kept:
            start, audio = self._kept[0]
            samples = round((self._dialect.settled - start) * self.voice.rate)
            octets = samples * self.voice.octets_per_second // self.voice.rate
            if octets > 0:
                self._kept[0] = start + samples / self.voice.rate, audio[octets:]

    def _hole(self, start: float, end: float) -> None:
        """Tell of audio that nobody will transcribe, if there is any."""
        if end - start > _SAME:
            self._holes -= 1
            self.emit(Transcript(self._holes, 0, "", final=True, start=start, end=end, dropped=True))

    def _seconds(self, audio: bytes | bytearray) -> float:
        return len(audio) / self.voice.octets_per_second

    def _delay(self) -> float:
        delay = min(self.first_delay * 2.0 ** min(self._failures - 1, 10), LONGEST_DELAY)
        return delay * random.uniform(0.5, 1.0)


class Timeline:
    """Where in a recognition's audio a moment of what was sent on one connection is; all in seconds."""

    def __init__(self) -> None:
        self.sent = 0.0
        # What had been sent and where the audio was, wherever it does not continue what was sent before.
        self._anchors: list[tuple[float, float]] = [(0.0, 0.0)]

    def add(self, start: float, seconds: float) -> None:
        """Audio is sent that begins at ``start``."""
        if not self.sent:
            self._anchors = [(0.0, start)]
        elif abs(self.place(self.sent) - start) > _SAME:
            self._anchors.append((self.sent, start))
        self.sent += seconds

    def place(self, moment: float) -> float:
        """Where it was; a border belongs to what was before it."""
        at = bisect.bisect_left(self._anchors, moment, key=lambda anchor: anchor[0])
        sent, start = self._anchors[max(at - 1, 0)]
        return start + moment - sent


def service_url(engine: str, url: str | None, usual: str) -> str:
    """Where a vendor's service is.

    Args:
        engine: Whose it is, for messages.
        url: What the user chose; None for where it usually is.
        usual: Where that is.

    Raises:
        SpeechError: It is no URL of a WebSocket.
    """
    if url is None:
        return usual
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname or parts.query or parts.fragment:
        raise SpeechError(f"{engine}: url is {url!r}; wanted one such as {usual}, without a query")
    return url


def read_key(engine: str, variable: str) -> str:
    """A vendor's key, from the environment: ``variable``, or the file that ``variable`` with ``_FILE`` names.

    Args:
        engine: Whose it is, for messages.
        variable: Such as ``OPENAI_API_KEY``.

    Raises:
        SpeechError: There is none, or it cannot be one; never shows what came.
    """
    key, source = os.environ.get(variable, ""), variable
    file = os.environ.get(f"{variable}_FILE")
    if not key and file:
        source = file
        try:
            key = Path(file).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise SpeechError(
                f"{engine}: {variable}_FILE names {file}, which cannot be read ({type(error).__name__})"
            ) from None
    key = key.strip()
    if not key:
        raise SpeechError(f"{engine} needs a key: set {variable}, or {variable}_FILE to the path of a file that has it")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise SpeechError(f"{engine}: the key in {source} (not shown) has characters other than visible ASCII")
    return key
