"""Many calls at once, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
from websockets.frames import CloseCode

from streamsink import wire
from streamsink.codec import CodecSpec
from streamsink.errors import CallRefused, SimulationError
from streamsink.log import escape
from streamsink.simulator.call import Call
from streamsink.simulator.far_end import Durations, FarEnd
from streamsink.simulator.options import SimulateOptions
from streamsink.simulator.report import Report
from streamsink.simulator.script import (
    Step,
    call_script,
    encode_payloads,
    perform,
    read_audio,
    read_capture,
    silence_script,
)

CLOSE_TIMEOUT = 10.0
"""Seconds an endpoint has to answer our close."""
GRACE = 2.0
"""Seconds without a returned frame after which what is still missing counts as lost."""

QUIET = 2.0
"""Seconds without a sound from the endpoint after which a call that is saved is over."""
LONGEST = 60.0
"""Seconds such a call goes on behind its audio at most; who plays without end is to be given `seconds`."""

_ENCODINGS = {"PCMU": "audio/x-mulaw", "PCMA": "audio/x-alaw", "G722": "audio/G722", "L16": "audio/x-L16"}
_OPENING_AT_ONCE = 32


class Simulation:
    """A run of `SimulateOptions`: everything is read and checked when it is made, nothing is connected before `run`.

    Raises:
        SimulationError: An option cannot be used.
        CodecError: The codec cannot.
    """

    def __init__(self, options: SimulateOptions) -> None:
        options.check()
        self.options = options
        self._uri = options.endpoint()
        self._trust = options.trust() if self._uri.secure else None
        self._parameters = options.custom_parameters()
        self._codec: CodecSpec | None
        self._payloads: list[bytes] = []
        self._silence: list[bytes] = []
        self._replayed: tuple[Step, ...] = ()
        self._frames: int | None = None
        if options.file is not None:
            self._codec = CodecSpec.parse(options.codec)
            audio = read_audio(options.file, self._codec.rate)
            self._payloads = encode_payloads(audio, self._codec)
            if self._listens_on:
                # A codec with a memory takes a while from the last sound to silence.
                silence = np.zeros(-len(audio) % self._codec.frame_samples + self._codec.rate, np.int16)
                coded = encode_payloads(np.concatenate((audio, silence)), self._codec)
                self._silence = coded[len(self._payloads) :]
            if options.seconds is not None:
                self._frames = max(1, round(options.seconds * 1000 / self._codec.ptime))
            elif not options.loop:
                self._frames = len(self._payloads)
        elif options.replay is not None:
            path, self._codec, self._replayed = read_capture(options.replay)
            self._frames = sum(step.media for step in self._replayed)
            if self._uri.resource_name == "/":
                self._uri.path = path
        path = self._uri.resource_name
        if not (path.isascii() and path.isprintable() and path.startswith("/")) or " " in path:
            raise SimulationError(f"the path {escape(path)!r} cannot stand in an HTTP request")
        self._turnaround = Durations()
        self._late = Durations()
        self._calls: list[Call] = []

    @property
    def progress(self) -> tuple[int, int | None]:
        """Frames done, and frames in all: None where there is no end."""
        done = sum(call.match.sent + call.events["skipped"] for call in self._calls)
        return done, None if self._frames is None else self._frames * self.options.streams

    def stop(self) -> None:
        """End all calls as if their audio were over."""
        for call in self._calls:
            call.finish()

    async def run(self) -> Report:
        """Open all calls, play, hang up, and tell what came of it."""
        self._calls = [
            Call(
                self._uri,
                self._turnaround,
                token=self.options.token,
                codec=self._codec,
                writer=wire.PlatformWriter(uuid.uuid4().hex) if self._payloads else None,
                keep=self.options.save is not None and index == 0,
                pong=not self.options.no_pong,
            )
            for index in range(self.options.streams)
        ]
        failures = []
        gate = asyncio.Semaphore(_OPENING_AT_ONCE)
        try:
            try:
                async with asyncio.TaskGroup() as opening:
                    for call in self._calls:
                        opening.create_task(self._open(call, gate))
            except* CallRefused as refused:
                failures = [str(error) for error in refused.exceptions]
                self.stop()
            begin = time.perf_counter()
            spread = self._codec.ptime / 1000 / len(self._calls) if self._codec is not None else 0.0
            async with asyncio.TaskGroup() as calls:
                for index, call in enumerate(self._calls):
                    if call.opened_at:
                        playing = calls.create_task(self._play(index, call, begin + index * spread))
                        calls.create_task(self._attend(call, playing))
        finally:
            for call in self._calls:
                call.abort()
        return self._report(failures)

    async def _open(self, call: Call, gate: asyncio.Semaphore) -> None:
        """Connect, upgrade and greet."""
        async with gate:
            await call.open(self._trust)
        if call.writer is not None and self._codec is not None:
            start = call.writer.start(
                account_sid=str(uuid.uuid4()),
                call_sid=str(uuid.uuid4()),
                encoding=_ENCODINGS[self._codec.name],
                sample_rate=self._codec.rate,
                custom_parameters=self._parameters,
                name=self.options.name,
            )
            call.send(call.writer.connected())
            call.send(start)

    async def _play(self, index: int, call: Call, begin: float) -> None:
        script: Iterable[Step] = self._replayed
        if call.writer is not None and self._codec is not None:
            chance = random.Random(f"{self.options.seed} {index}")
            script = call_script(
                call.writer,
                self._payloads,
                self._codec.ptime,
                frames=self._frames,
                dtmf=self.options.dtmf.upper(),
                skip=lambda: chance.random() < self.options.lose,
            )
        await perform(script, call.perform, self._late, begin=begin)
        if index == 0 and self._listens_on and call.writer is not None and call.far_end is not None:
            await self._listen_on(call.writer, call, call.far_end)
        call.finish()

    @property
    def _listens_on(self) -> bool:
        """Whether the call goes on behind its audio, to hear what the endpoint answers."""
        return self.options.save is not None and self.options.seconds is None and not self.options.expect_echo

    async def _listen_on(self, writer: wire.PlatformWriter, call: Call, far_end: FarEnd) -> None:
        """Be silent until the endpoint has been silent too."""
        assert self._codec is not None
        assert self._frames is not None
        begin = time.perf_counter()
        ended = begin - call.opened_at

        def over(at: float) -> bool:
            return at > LONGEST or ended + at > max(ended, far_end.sound_until) + QUIET

        script = silence_script(writer, self._silence, self._codec.ptime, sent=self._frames, over=over)
        await perform(script, call.perform, self._late, begin=begin)

    async def _attend(self, call: Call, playing: asyncio.Task[None]) -> None:
        """See one call through: its script, what still comes back, the end."""
        await call.over.wait()
        playing.cancel()
        if self.options.expect_echo or self.options.save is not None:
            while not call.settled.is_set() and (rest := call.active_at + GRACE - time.perf_counter()) > 0:
                await _wait(call.settled, rest)
        call.hang_up()
        if not await _wait(call.closed, CLOSE_TIMEOUT):
            call.abort(f"the endpoint did not answer the close within {CLOSE_TIMEOUT:g} s; its log tells why")
            await call.closed.wait()

    def _report(self, failures: list[str]) -> Report:
        calls = self._calls
        codes = [call.close_code for call in calls if call.close_code is not None]
        report = Report(
            streams=self.options.streams,
            frames_sent=sum(call.match.sent for call in calls),
            frames_received=sum(call.match.returned for call in calls),
            lost=sum(call.match.missing for call in calls) if self.options.expect_echo else 0,
            turnaround_ms=self._turnaround.percentiles(),
            underruns=sum(call.far_end.underruns for call in calls if call.far_end is not None),
            close_code=next((code for code in codes if code != CloseCode.NORMAL_CLOSURE), codes[0] if codes else None),
            late_ms=self._late.percentiles(),
            events=sum((call.events for call in calls), Counter()),
            failures=failures + [call.failure for call in calls if call.failure is not None],
        )
        if self.options.save is not None and (failure := self._save(self.options.save)):
            report.failures.append(failure)
        return report

    def _save(self, path: Path) -> str | None:
        """Write what the first call's participant heard; returns why that failed, if it did."""
        far_end = self._calls[0].far_end
        if far_end is None or self._codec is None:
            return "--save: the capture has no start message that tells the codec, so nothing is saved"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                soundfile.write(file, far_end.heard(), self._codec.rate, format="WAV", subtype="PCM_16")
        except (OSError, soundfile.SoundFileError) as error:
            return f"--save: {path} cannot be written: {error}"
        return None


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await event.wait()
    return False


async def simulate(options: SimulateOptions) -> Report:
    """Run a simulation on the running event loop.

    Refused and broken calls are told in the report, not raised.

    Raises:
        SimulationError: An option cannot be used; nothing was connected.
        CodecError: The codec cannot; likewise.
    """
    return await Simulation(options).run()
