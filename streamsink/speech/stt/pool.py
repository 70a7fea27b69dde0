"""Engines that work in this machine: a few processes, whose decoders are leased an utterance at a time.

Processes, not threads: some engines hold the GIL, and those that let go of it still end the process they are in when a
model is broken. The pool bounds what they cost: what it cannot take is a marked hole, never the call's trouble.
"""

from __future__ import annotations

import abc
import asyncio
import bisect
import contextlib
import importlib.util
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import msgspec
import structlog

from streamsink.child import Child
from streamsink.errors import ChildDied, SpeechError
from streamsink.speech.events import Transcript, Word
from streamsink.speech.transcription import Engine, EngineOptions, Recognition, Voice
from streamsink.speech.transcription_counts import counts

log = structlog.get_logger(__name__)

MOST_QUEUED = 4
"""Utterances a worker that wait for a decoder; with more, the newest is a hole."""
CHUNK = 0.1
"""Seconds of audio sent at once."""
INTERIM = 0.3
"""Seconds of audio between two interim transcripts."""
BEHIND = 0.5
"""Seconds of waiting audio from which on there are no interim transcripts."""
STUCK = 10.0
"""Seconds a worker may take for one answer."""
START_AGAIN = (0.0, 0.1, 1.0, 10.0)
"""Seconds before a dead worker is replaced; the longer the more often it died without having worked."""

Answer: TypeAlias = dict[str, Any]
"""What a worker says to one question."""


class PooledEngine(Engine):
    """An engine in worker processes.

    Attributes:
        name: As users write it.
        package: What must be installed, and with which extra that comes.
        worker: The module that workers run.
        decoders: How many utterances a worker has under way, at most.
        stuck: Seconds a worker may take for one answer.
        most_waiting: Seconds of an utterance that may wait for its worker.
    """

    name: ClassVar[str]
    package: ClassVar[tuple[str, str]]
    worker: ClassVar[str]
    decoders: ClassVar[int] = 4
    stuck: ClassVar[float] = STUCK
    most_waiting: ClassVar[float] = 10.0

    def __init__(self, options: EngineOptions) -> None:
        package, extra = self.package
        if importlib.util.find_spec(package) is None:
            raise SpeechError(f"the engine `{self.name}` is not installed: pip install 'streamsink[{extra}]'")
        if options.url is not None:
            raise SpeechError(f"{self.name} works in this machine: drop `url`")
        self.language = options.language
        self._options = options
        self.interim = options.interim and self.capabilities.interim
        self._settings = msgspec.json.encode(self.settings(options)).decode()
        self._workers = options.workers or max(1, len(os.sched_getaffinity(0)) - 1)
        self._pool: Pool | None = None

    @abc.abstractmethod
    def settings(self, options: EngineOptions) -> dict[str, Any]:
        """Check the options and make of them what the workers are started with, fit for JSON.

        Raises:
            SpeechError: Something is missing or cannot be done.
        """

    async def start(self) -> None:
        """Start the workers.

        Raises:
            SpeechError: They cannot load what the options name.
        """
        self._pool = Pool(self, self._settings, self._workers)
        await self._pool.start()

    def open(self, voice: Voice) -> Recognition:
        """Begin with an utterance."""
        assert self._pool is not None, "not started"
        return PooledUtterance(voice, self, self._pool)

    async def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            await self._pool.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that live."""
        return [] if self._pool is None else self._pool.pids

    def begin(self, voice: Voice) -> dict[str, Any]:
        """What a decoder is told when an utterance begins."""
        return {}

    def ended(self, voice: Voice, answer: Answer) -> None:
        """An utterance was transcribed."""


def existing(path: Path, what: str) -> Path:
    """A path as workers can open it.

    Raises:
        SpeechError: Nothing is there.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise SpeechError(f"there is no {what} {path}: give a path that exists")
    return path


def model_folder(name: str, options: EngineOptions, where: str) -> Path:
    """The folder of the model that an engine without one of its own needs.

    Args:
        name: The engine's.
        options: What the user chose.
        where: Where models are to be had.

    Raises:
        SpeechError: It was not named, or is not there. Nothing is ever downloaded.
    """
    if options.model is None:
        raise SpeechError(f"{name} has no model of its own: unpack one from {where} and give model=FOLDER")
    folder = existing(Path(options.model), "model")
    if not folder.is_dir():
        raise SpeechError(f"{folder} is no folder: give the one the model's files are in")
    return folder


class PooledUtterance(Recognition):
    """One utterance, on whichever decoder is free; tried again once when its worker dies.

    Args:
        voice: What will be heard.
        engine: Whose.
        pool: Its workers.
    """

    def __init__(self, voice: Voice, engine: PooledEngine, pool: Pool) -> None:
        self.most_waiting = engine.most_waiting
        super().__init__(voice)
        self._engine = engine
        self._pool = pool
        # All of it, for the second try.
        self._heard: list[bytes] = []
        self._told = ""

    async def run(self) -> None:
        """Transcribe it.

        Raises:
            SpeechError: It cannot be transcribed.
        """
        try:
            await self._transcribe()
        except ChildDied:
            counts.retried += 1
            try:
                await self._transcribe()
            except ChildDied:
                raise SpeechError("two workers died of the same utterance, or at the same time") from None

    async def _transcribe(self) -> None:
        async with self._pool.lease() as decoder:
            busy = (await decoder.ask("begin", **self._engine.begin(self.voice)))["busy"]
            async for audio, interim in self._chunks():
                answer = await decoder.ask("audio", audio=audio, interim=interim)
                busy += answer["busy"]
                if answer["text"] and answer["text"] != self._told:
                    self._told = answer["text"]
                    self.emit(
                        Transcript(0, 0, self._told, False, 0.0, self.audio.seconds, language=self._engine.language)
                    )
            answer = await decoder.ask("end")
        self._engine.ended(self.voice, answer)
        counts.worked(self.audio.seconds, busy + answer["busy"])
        self._final(answer)

    async def _chunks(self) -> AsyncIterator[tuple[bytes, bool]]:
        """What was heard before this try, then what comes; and whether an interim is wanted and can be had."""
        for audio in self._heard.copy():
            yield audio, False
        size = int(CHUNK * self.voice.octets_per_second)
        since = 0.0
        chunk = bytearray()
        async for _, audio in self.audio:
            if self.audio.dropped:
                raise SpeechError(f"the workers are {self.most_waiting:g} s behind: more cores or fewer talkers")
            chunk += audio
            if len(chunk) < size:
                continue
            since += len(chunk) / self.voice.octets_per_second
            due = self._engine.interim and since >= INTERIM
            wanted = due and self.audio.waiting < BEHIND
            if due:
                since = 0.0
                counts.dropped["interim"] += not wanted
            self._heard.append(bytes(chunk))
            yield self._heard[-1], wanted
            chunk.clear()
        if chunk:
            self._heard.append(bytes(chunk))
            yield self._heard[-1], False

    def _final(self, answer: Answer) -> None:
        words = tuple(Word(*word) for word in answer["words"])
        self.emit(
            Transcript(
                utterance=0,
                revision=0,
                text=answer["text"],
                final=True,
                start=words[0].start if words else 0.0,
                end=words[-1].end if words else self.audio.seconds,
                words=words,
                confidence=answer["confidence"],
                language=answer.get("language") or self._engine.language,
            )
        )


class Pool:
    """The worker processes, and who may use their decoders.

    Args:
        engine: Whose workers they are.
        settings: What they are started with.
        workers: How many.
    """

    def __init__(self, engine: PooledEngine, settings: str, workers: int) -> None:
        self._engine = engine
        self._settings = settings
        self._size = workers
        self._workers: list[_Worker] = []
        self._queue: deque[asyncio.Future[_Decoder]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        # Workers that died, one after the other, without having worked.
        self._failures = 0
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that live."""
        return [worker.pid for worker in self._workers]

    async def start(self) -> None:
        """Start all workers.

        Raises:
            SpeechError: They cannot be started.
        """
        try:
            # All of them to the end: one that starts when another has failed would outlive the pool.
            starts = [self._start_worker() for _ in range(self._size)]
            for failure in await asyncio.gather(*starts, return_exceptions=True):
                if failure is not None:
                    raise failure
        except ChildDied as error:
            raise SpeechError(f"{self._engine.name} does not start: {error}; standard error tells more") from error
        except OSError as error:
            raise SpeechError(f"{self._engine.name} does not start: {error.strerror}") from error

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[_Decoder]:
        """Wait for a decoder and have it to oneself.

        Raises:
            SpeechError: Too many wait already.
        """
        loop = asyncio.get_running_loop()
        before = loop.time()
        decoder = self._freest()
        if decoder is None:
            decoder = await self._turn(loop)
        counts.queued(loop.time() - before)
        try:
            yield decoder
            self._failures = 0
        finally:
            self._give_back(decoder)

    async def _turn(self, loop: asyncio.AbstractEventLoop) -> _Decoder:
        """Wait in the queue."""
        if len(self._queue) >= MOST_QUEUED * self._size:
            raise SpeechError(f"{len(self._queue)} utterances wait for a decoder: more cores or fewer talkers")
        turn: asyncio.Future[_Decoder] = loop.create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(STUCK):
                return await turn
        except BaseException as error:
            if turn in self._queue:
                self._queue.remove(turn)
            elif not turn.cancelled():
                # Its turn came as it gave up.
                self._give_back(turn.result())
            if isinstance(error, TimeoutError):
                raise SpeechError(f"no decoder was free for {STUCK:g} s: more cores or fewer talkers") from None
            raise

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        # Those that read end with their worker; one that is being started ends at once.
        await asyncio.gather(*(worker.close() for worker in self._workers))
        for task in self._tasks.copy():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _freest(self) -> _Decoder | None:
        """Take a decoder of the worker that has the fewest talkers."""
        workers = [worker for worker in self._workers if worker.free and worker.alive]
        if not workers:
            return None
        worker = max(workers, key=lambda worker: len(worker.free))
        return _Decoder(worker, worker.free.pop(0))

    def _give_back(self, decoder: _Decoder) -> None:
        # In order: the lower ones are there already.
        bisect.insort(decoder.worker.free, decoder.number)
        self._serve()

    def _serve(self) -> None:
        while self._queue:
            if self._queue[0].done():
                self._queue.popleft()
                continue
            decoder = self._freest()
            if decoder is None:
                return
            self._queue.popleft().set_result(decoder)

    async def _start_worker(self) -> None:
        worker = _Worker(self._engine, self._settings)
        try:
            await worker.start()
        except BaseException:
            worker.kill()
            await worker.close()
            raise
        self._workers.append(worker)
        self._task(self._attend(worker))
        self._serve()

    async def _attend(self, worker: _Worker) -> None:
        """Read a worker's answers until it dies, then replace it."""
        cause = await worker.read()
        self._workers.remove(worker)
        await worker.close()
        if not self._closed:
            counts.deaths += 1
            log.warning("a transcription worker died", cause=cause)
            self._task(self._replace())

    async def _replace(self) -> None:
        while True:
            await asyncio.sleep(START_AGAIN[min(self._failures, len(START_AGAIN) - 1)])
            self._failures += 1
            try:
                await self._start_worker()
            except (SpeechError, ChildDied, OSError) as error:
                log.error("a transcription worker does not start again", cause=str(error))
            else:
                return

    def _task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Worker:
    """One process and what it was asked."""

    def __init__(self, engine: PooledEngine, settings: str) -> None:
        self._engine = engine
        self._child = Child(engine.worker, settings)
        # By the number of the question: whoever gave up on an answer leaves the decoder to somebody else.
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._questions = 0
        self.alive = True
        self.free: list[int] = []

    @property
    def pid(self) -> int:
        assert self._child.pid is not None
        return self._child.pid

    async def start(self) -> None:
        await self._child.start()
        self._child.send({"do": "load", "decoder": 0, "question": 0})
        answer = await self._child.receive()
        if "error" in answer:
            raise SpeechError(
                f"{self._engine.name} cannot load what it was given ({answer['error']}): standard error tells why"
            )
        self.free = list(range(self._engine.decoders))

    async def read(self) -> str:
        """Hand out answers until the process ends; tells how it did."""
        try:
            while True:
                answer = await self._child.receive()
                asked = self._asked.pop(answer["question"], None)
                if asked is not None and not asked.done():
                    asked.set_result(answer)
        except ChildDied as error:
            self.alive = False
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(ChildDied(str(error)))
            return str(error)

    async def ask(self, number: int, do: str, **more: Any) -> Answer:
        """Send a message about a decoder and wait for its answer.

        Raises:
            ChildDied: The process died, or took so long that it was ended.
            SpeechError: The process could not do it.
        """
        if not self.alive:
            raise ChildDied("the worker is dead")
        self._questions += 1
        asked = self._asked[self._questions] = asyncio.get_running_loop().create_future()
        self._child.send({"do": do, "decoder": number, "question": self._questions, **more})
        try:
            async with asyncio.timeout(self._engine.stuck):
                answer: Answer = await asked
        except TimeoutError:
            self.alive = False
            self._child.kill()
            raise ChildDied(f"a worker took more than {self._engine.stuck:g} s for an answer and was ended") from None
        if "error" in answer:
            raise SpeechError(f"{self._engine.name} failed: {answer['error']}")
        return answer

    async def close(self) -> None:
        await self._child.close()

    def kill(self) -> None:
        self._child.kill()


class _Decoder:
    """A decoder of a worker's, leased."""

    def __init__(self, worker: _Worker, number: int) -> None:
        self.worker = worker
        self.number = number

    async def ask(self, do: str, **more: Any) -> Answer:
        return await self.worker.ask(self.number, do, **more)
