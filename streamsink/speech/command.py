"""Any program as a synthesizer: started for each sentence, its WAV played as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import struct
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from streamsink.audio import Samples
from streamsink.errors import SpeechError
from streamsink.speech.synthesis import Spoken, Synthesizer

if TYPE_CHECKING:
    from streamsink.config import SpeechSettings

PATIENCE = 30.0
"""Seconds a program may take for its next output."""
END_PATIENCE = 1.0
"""Seconds it may go on once it has closed its output."""
_READ = 16_384
_HEADER_LIMIT = 65_536
"""Octets a program may write before its audio."""
_STDERR_KEPT = 200
_RATES = range(8000, 192_001)

_PCM, _EXTENSIBLE = 1, 0xFFFE
_FMT = struct.Struct("<HHIIHH")
_CHUNK = struct.Struct("<4sI")
# What programs write as the data's length that cannot go back and mend it: it ends where the output does.
_LENGTH_UNKNOWN = 0x7FFF0000


class Command(Synthesizer):
    """A program that writes WAV, 16-bit PCM, to standard output, run without a shell.

    ``{text}`` and ``{voice}`` in its arguments are replaced. Without ``{text}`` it gets the text on standard input,
    where no other user of the machine can see it.
    """

    def __init__(self, settings: SpeechSettings) -> None:
        assert settings.command is not None, "SpeechSettings checks it"
        self._arguments = shlex.split(settings.command)
        self._program = self._arguments[0]
        self._voice = settings.voice
        self._takes_text = any("{text}" in argument for argument in self._arguments)
        self._takes_voice = any("{voice}" in argument for argument in self._arguments)
        self._found = False
        self._closed = False

    def check(self, voice: str | None) -> None:
        """See that there is such a program, and that a voice is given where the command has a place for it.

        Raises:
            SpeechError: It is not so.
        """
        if voice is not None and not self._takes_voice:
            raise SpeechError(f"the speech command takes no voice, got {voice!r}: put {{voice}} into its arguments")
        if voice is None and self._voice is None and self._takes_voice:
            raise SpeechError("the speech command has {voice} in it and there is none: set `voice` in [speech]")
        if not self._found and shutil.which(self._program) is None:
            raise SpeechError(f"the speech command {self._program!r} is not installed, or not a program: see [speech]")
        self._found = True

    async def open(self) -> None:
        """See that there is such a program.

        Raises:
            SpeechError: There is not.
        """
        self.check(None)

    async def close(self) -> None:
        """Start no more programs; those that run belong to whoever listens."""
        self._closed = True

    async def speak(self, text: str, voice: str | None = None) -> AsyncGenerator[Spoken, None]:
        """Run the program for one sentence.

        Raises:
            SpeechError: It cannot be run, failed, hung, or wrote something else.
        """
        self.check(voice)
        if self._closed:
            raise SpeechError("the endpoint has ended: nothing can be spoken any more")
        fields = {"{text}": text, "{voice}": voice or self._voice or ""}
        run = _Run(self._program, text)
        try:
            await run.start([_filled(argument, fields) for argument in self._arguments], not self._takes_text)
            form = await run.wave_format()
            async for samples in run.samples(form):
                yield Spoken(samples, form.rate, 0)
            await run.check_status()
        finally:
            await run.end()
        yield Spoken(np.zeros(0, np.int16), form.rate, len(text))


def _filled(argument: str, fields: dict[str, str]) -> str:
    """Put the fields in, each once: what a text has in braces stays."""
    if argument in fields:
        return fields[argument]
    before, found, after = argument.partition("{text}")
    parts = [before.replace("{voice}", fields["{voice}"])]
    if found:
        parts += [fields["{text}"], _filled(after, fields)]
    return "".join(parts)


class _WaveFormat(NamedTuple):
    channels: int
    rate: int
    octets: int | None
    """Of the samples; None: to the end of the output."""


class _Run:
    """One run of the program."""

    def __init__(self, program: str, text: str) -> None:
        self._program = program
        self._text = text
        self._process: Process | None = None
        self._complaining: asyncio.Task[bytes] | None = None

    async def start(self, arguments: list[str], on_stdin: bool) -> None:
        try:
            # A session of its own: what it starts in turn ends with it.
            self._process = await asyncio.create_subprocess_exec(
                *arguments, stdin=PIPE if on_stdin else DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            raise SpeechError(f"the speech command {self._program!r} cannot be run: {error.strerror}") from None
        assert self._process.stderr is not None
        self._complaining = asyncio.ensure_future(_tail(self._process.stderr))
        if self._process.stdin is not None:
            self._process.stdin.write(self._text.encode())
            self._process.stdin.close()

    async def wave_format(self) -> _WaveFormat:
        """Read up to the first sample.

        Raises:
            SpeechError: What comes is no WAV of 16-bit PCM.
        """
        head = await self._exactly(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            raise await self._failed("wrote something else than WAV to standard output")
        form: _WaveFormat | None = None
        for _ in range(_HEADER_LIMIT // _CHUNK.size):
            name, length = _CHUNK.unpack(await self._exactly(_CHUNK.size))
            if name == b"data":
                if form is None:
                    break
                return form._replace(octets=length if 0 < length < _LENGTH_UNKNOWN else None)
            if length > _HEADER_LIMIT:
                break
            # Chunks begin at even places.
            body = await self._exactly(length + length % 2)
            if name == b"fmt ":
                form = await self._format(body)
        raise await self._failed("wrote a WAV without a format or without samples")

    async def _format(self, body: bytes) -> _WaveFormat:
        if len(body) < _FMT.size:
            raise await self._failed("wrote a WAV whose format is cut off")
        tag, channels, rate, _, _, bits = _FMT.unpack_from(body)
        if tag == _EXTENSIBLE and len(body) >= 26:
            tag = int.from_bytes(body[24:26], "little")
        if tag != _PCM or bits != 16 or not channels or rate not in _RATES:
            raise await self._failed(
                f"wrote WAV of format {tag}, {bits} bits, {channels} channels, {rate} Hz; wanted 16-bit PCM (format 1) "
                f"of {_RATES[0]} to {_RATES[-1]} Hz"
            )
        return _WaveFormat(channels, rate, None)

    async def samples(self, form: _WaveFormat) -> AsyncGenerator[Samples, None]:
        """The samples as they come, channels mixed into one."""
        width = 2 * form.channels
        left = form.octets
        carry = b""
        while left is None or left > 0:
            octets = await self._some(_READ if left is None else min(_READ, left))
            if not octets:
                break
            left = left if left is None else left - len(octets)
            octets = carry + octets
            whole = len(octets) - len(octets) % width
            carry = octets[whole:]
            frames = np.frombuffer(octets[:whole], "<i2").reshape(-1, form.channels)
            yield frames[:, 0] if form.channels == 1 else frames.mean(axis=1).astype(np.int16)

    async def check_status(self) -> None:
        """Wait for the program's end.

        Raises:
            SpeechError: It ended with a status other than 0.
        """
        assert self._process is not None
        # What stands behind the samples is of no use, but a full pipe would hold the program.
        while await self._some(_READ):
            pass
        status = await self._status()
        if status is None:
            raise await self._failed("closed its output and did not end")
        if status:
            raise await self._failed("failed")

    async def end(self) -> None:
        """End the program, if it still runs, with all that it has started."""
        if self._process is not None:
            self._kill()
            assert self._process.stdout is not None
            # Read to its end, or asyncio keeps the pipe open.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_PATIENCE):
                    while await self._process.stdout.read(_READ):
                        pass
            await self._process.wait()
        if self._complaining is not None:
            self._complaining.cancel()

    def _kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _exactly(self, count: int) -> bytes:
        """So many octets.

        Raises:
            SpeechError: The output ends before.
        """
        octets = b""
        while len(octets) < count:
            more = await self._some(count - len(octets))
            if not more:
                raise await self._failed("ended before it had written a WAV")
            octets += more
        return octets

    async def _some(self, limit: int) -> bytes:
        """What it has written, at most ``limit`` octets; none at its end."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._process.stdout.read(limit)
        except TimeoutError:
            raise SpeechError(
                f"the speech command {self._program!r} wrote nothing for {PATIENCE:g} s and was ended"
            ) from None

    async def _status(self) -> int | None:
        """What it ended with; None: it runs on with its output closed."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_PATIENCE):
                return await self._process.wait()
        return None

    async def _failed(self, what: str) -> SpeechError:
        """The error, with how the program ended and what it complained of, but without the text."""
        assert self._process is not None
        assert self._complaining is not None
        assert self._process.stdout is not None
        status = None
        if self._process.stdout.at_eof():
            status = await self._status()
        else:
            self._kill()
        complaint = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_PATIENCE):
                complaint = (await self._complaining).decode(errors="replace").replace(self._text, "…").strip()
        ended = f" (status {status})" if status else ""
        told = f": {complaint[-_STDERR_KEPT:]}" if complaint else ""
        return SpeechError(f"the speech command {self._program!r} {what}{ended}{told}")


async def _tail(stream: asyncio.StreamReader) -> bytes:
    """Read to the end and keep the last of it."""
    kept = b""
    while octets := await stream.read(_READ):
        kept = (kept + octets)[-4 * _STDERR_KEPT :]
    return kept
