"""A synthesizer in a child process of its own: for what is under the GPL, global to a process, or slow.

It is sent ``[text, voice]``, one at a time, and answers ``[PCM, Hz, text_end]`` any number of times, then None when all
was said, or else the reason as text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import structlog

from streamsink.child import Child
from streamsink.errors import ChildDied, SpeechError
from streamsink.speech.synthesis import Spoken, Synthesizer

log = structlog.get_logger(__name__)

PATIENCE = 30.0
"""Seconds a child may take for one answer; the first may have a model to load before it."""


class ProcessSynthesizer(Synthesizer):
    """Sends each sentence to a child and waits until the whole of it is there.

    A sentence nobody waits for any more is finished in the child and dropped: engines cannot be stopped within one,
    and a new process costs more than the rest of it.

    Args:
        name: What messages call it.
        module: The child's.
        voice: The voice where a text asks for none.
    """

    def __init__(self, name: str, module: str, voice: str) -> None:
        self.name = name
        self._module = module
        self._voice = voice
        self._child: Child | None = None
        self._closed = False
        # Held while the child is at work; whoever waits longest is next.
        self._turn = asyncio.Lock()
        # The event loop keeps no hold on its tasks.
        self._working: asyncio.Task[list[Spoken]] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._child is None else self._child.pid

    async def open(self) -> None:
        """Start the child and have it load the default voice.

        Raises:
            SpeechError: It cannot be started, or there is no such voice.
        """
        self.check(None)
        await self._exchange("", self._voice)

    async def try_voice(self, voice: str) -> None:
        """Have the child load a voice.

        Raises:
            SpeechError: There is no such voice, or the child failed.
        """
        self.check(voice)
        await self._exchange("", voice)

    async def speak(self, text: str, voice: str | None = None) -> AsyncGenerator[Spoken, None]:
        """Speak one sentence; what comes first comes when all of it is there.

        Raises:
            SpeechError: There is no such voice, or the child failed, died or hung. The next sentence has a new one.
        """
        self.check(voice)
        for piece in await self._exchange(text, voice or self._voice):
            yield piece

    async def close(self) -> None:
        """End the child."""
        self._closed = True
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait({self._working})
        if self._child is not None:
            await self._child.close()

    async def _exchange(self, text: str, voice: str) -> list[Spoken]:
        await self._turn.acquire()
        self._working = asyncio.ensure_future(self._work(text, voice))
        # The answer is read to its end even when nobody wants it: the next one begins behind it.
        self._working.add_done_callback(lambda work: self._turn.release())
        return await asyncio.shield(self._working)

    async def _work(self, text: str, voice: str) -> list[Spoken]:
        child = await self._ready()
        child.send([text, voice])
        pieces: list[Spoken] = []
        try:
            while True:
                async with asyncio.timeout(PATIENCE):
                    answer = await child.receive()
                if answer is None:
                    return pieces
                if isinstance(answer, str):
                    raise SpeechError(answer)
                pcm, rate, text_end = answer
                pieces.append(Spoken(np.frombuffer(pcm, np.int16), rate, text_end))
        except ChildDied as error:
            await self._drop()
            raise SpeechError(f"{self.name} failed: {error}; the next text starts it again") from None
        except TimeoutError:
            await self._drop()
            raise SpeechError(
                f"{self.name} did not answer within {PATIENCE:g} s and was ended; the next text starts it again"
            ) from None

    async def _ready(self) -> Child:
        """The child, started anew where it died while it had nothing to do."""
        if self._closed:
            raise SpeechError("the endpoint has ended: nothing can be spoken any more")
        if self._child is not None and self._child.status is not None:
            log.warning("speech engine ended while idle", engine=self.name, status=self._child.status)
            self._child = None
        if self._child is None:
            child = Child(self._module)
            try:
                await child.start()
            except OSError as error:
                raise SpeechError(f"{self.name} cannot be started: {error.strerror}") from None
            self._child = child
        return self._child

    async def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            log.warning("speech engine ended", engine=self.name, status=child.status)
            child.kill()
            await child.close()
