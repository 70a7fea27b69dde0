"""Announce: plays a file or says a text to the caller."""

from __future__ import annotations

import asyncio
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile
import structlog

from streamsink.errors import ProcessorError
from streamsink.playout import Outcome
from streamsink.processor import Processor
from streamsink.speech.sentences import can_be_spoken
from streamsink.stream import Stream

if TYPE_CHECKING:
    from streamsink.playout import Playout

log = structlog.get_logger(__name__)

_DIGITS = frozenset("0123456789*#ABCD")


class Announce(Processor):
    """Plays a file or says a text when a call begins, or when a digit is pressed.

    Args:
        file: A sound file; either this or ``say`` is needed.
        say: A text.
        voice: Whose; the one of the settings when not given.
        on: When: ``start``, a digit, or several of these, separated by commas.
        interruptible: Whether any digit ends it; one of ``on`` begins it again either way.
    """

    def __init__(
        self,
        *,
        file: Path | None = None,
        say: str | None = None,
        voice: str | None = None,
        on: tuple[str, ...] = ("start",),
        interruptible: bool = True,
    ) -> None:
        if (file is None) == (say is None):
            raise ProcessorError("announce needs either file=… or say=…")
        for when in on:
            if when != "start" and when not in _DIGITS:
                raise ProcessorError(f"announce: on is {when!r}; wanted start, or one of 0-9 * # A-D")
        if not on:
            raise ProcessorError("announce: on is empty; wanted start, a digit, or several, separated by commas")
        if file is not None:
            file = Path(os.path.expanduser(file))
            _check_file(file)
        elif say is not None and not can_be_spoken(say):
            raise ProcessorError("announce: there is no word in say=…")
        self.says = say is not None
        self._file = file
        self._text = say
        self._voice = voice
        self._on = on
        self._interruptible = interruptible
        self._playout: Playout | None = None
        self._waiting: asyncio.Task[None] | None = None

    async def on_start(self, stream: Stream) -> None:
        """Announce it, where that is wanted at the start."""
        self._stream = stream
        if "start" in self._on:
            self._announce()

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        """End it, or begin it again."""
        wanted = digit in self._on
        if self._playout is not None and (wanted or self._interruptible):
            self._playout.cancel()
        if wanted:
            self._announce()

    def _announce(self) -> None:
        if self._text is not None:
            self._playout = self._stream.say(self._text, self._voice)
        else:
            assert self._file is not None
            self._playout = self._stream.play_file(self._file)
        self._waiting = asyncio.ensure_future(self._wait(self._playout))

    async def _wait(self, playout: Playout) -> None:
        """See it to its end: nobody else would tell the operator that callers hear nothing."""
        played = await playout
        if played.outcome is Outcome.FAILED:
            log.error(
                "announcement failed", stream=self._stream.sid, cause=str(played.error), played_ms=played.played_ms
            )
        if self._playout is playout:
            self._playout = None

    async def on_stop(self, reason: str) -> None:
        """End it, and let the last one tell how it ended."""
        if self._playout is not None:
            self._playout.cancel()
        if self._waiting is not None:
            await self._waiting


@functools.cache
def _check_file(path: Path) -> None:
    """Open it once, so that a file that cannot be played is told when the endpoint starts."""
    try:
        with open(path, "rb"):
            soundfile.info(path)
    except OSError as error:
        raise ProcessorError(f"announce: the file {str(path)!r} cannot be read: {error.strerror}") from None
    except soundfile.SoundFileError:
        raise ProcessorError(f"announce: {str(path)!r} is no sound file that could be played, such as a WAV") from None
