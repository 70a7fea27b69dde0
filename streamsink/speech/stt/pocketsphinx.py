"""PocketSphinx (extra ``speech``): the embedded engine, with a model of its own, in a few processes.

It needs no network and no download, hears American English, and is as good as its age: use it with a grammar or
keywords where you can. The pool bounds what it costs: what it cannot take is a marked hole, never the call's trouble.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import importlib.util
import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import structlog

from streamsink.child import Child
from streamsink.errors import ChildDied, SpeechError
from streamsink.speech.events import Transcript, Word
from streamsink.speech.transcription import Capabilities, Engine, EngineOptions, Recognition, Voice
from streamsink.speech.transcription_counts import counts

log = structlog.get_logger(__name__)

RATE = 16_000
"""Hz; the model's."""
DECODERS = 4
"""A worker's; each of 90 MB, and made when so many people first talk at once. Two talkers on PCMU fill half a core."""
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

TELEPHONE_MEAN = "44.3,29.9,-35.0,49.0,-16.4,-2.9,21.4,-34.5,13.9,-5.5,-5.7,15.6,-13.1"
"""The cepstral mean a call of 8 kHz begins with: that of speech sent through PCMU. The model's own is of 16 kHz."""
WIDEBAND_MEAN = "52.8,-0.5,3.7,19.9,-6.1,7.2,-1.9,-9.5,-2.9,-5.1,7.1,-2.7,3.1"
"""Likewise for audio with more than 4 kHz of band."""

Answer: TypeAlias = dict[str, Any]
"""What a worker says to one question."""


class Pocketsphinx(Engine):
    """PocketSphinx in worker processes."""

    capabilities = Capabilities(rates=(RATE,), interim=True, words=True)

    def __init__(self, options: EngineOptions) -> None:
        if importlib.util.find_spec("pocketsphinx") is None:
            raise SpeechError("the engine `pocketsphinx` is not installed: pip install 'streamsink[speech]'")
        if options.grammar is not None and options.keywords:
            raise SpeechError("pocketsphinx takes a grammar or keywords, not both: drop one")
        if options.language is not None and options.model is None and options.language.lower() not in ("en", "en-us"):
            raise SpeechError(
                f"pocketsphinx comes with a model of en-US only, not {options.language}: give model=FOLDER, or take "
                "another engine"
            )
        if options.url is not None:
            raise SpeechError("pocketsphinx works in this machine: drop `url`")
        self._language = options.language or "en-US"
        self._interim = options.interim
        self._options: dict[str, Any] = {"config": _config(options), "keywords": list(options.keywords)}
        if options.grammar is not None:
            self._options["grammar"] = str(_existing(options.grammar, "grammar"))
        for keyword in options.keywords:
            _check_keyword(keyword)
        self._workers = options.workers or max(1, (os.cpu_count() or 2) - 1)
        self._pool: Pool | None = None

    async def start(self) -> None:
        """Start the workers.

        Raises:
            SpeechError: They cannot load what the options name.
        """
        self._pool = Pool(msgspec.json.encode(self._options).decode(), self._workers)
        await self._pool.start()

    def open(self, voice: Voice) -> Recognition:
        """Begin with an utterance."""
        assert self._pool is not None, "not started"
        return _Utterance(voice, self._pool, self._language, interim=self._interim)

    async def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            await self._pool.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that live."""
        return [] if self._pool is None else self._pool.pids


def _config(options: EngineOptions) -> dict[str, Any]:
    # The second pass costs as much as the first, after the talker has stopped.
    config: dict[str, Any] = {"fwdflat": False, "loglevel": "FATAL", "samprate": float(RATE)}
    if options.model is not None:
        folder = _existing(Path(options.model), "model")
        dictionary = next(folder.glob("*.dict"), None)
        language = next((path for ending in ("*.lm.bin", "*.lm") for path in folder.glob(ending)), None)
        acoustic = next((path.parent for path in folder.rglob("mdef")), None)
        if dictionary is None or language is None or acoustic is None:
            raise SpeechError(
                f"{folder} is no model of PocketSphinx: wanted a folder with *.dict, *.lm.bin and one with mdef in it"
            )
        config |= {"hmm": str(acoustic), "lm": str(language), "dict": str(dictionary)}
    return config


def _existing(path: Path, what: str) -> Path:
    path = path.expanduser().absolute()
    if not path.exists():
        raise SpeechError(f"there is no {what} {path}: give a path that exists")
    return path


def _check_keyword(keyword: str) -> None:
    phrase, slash, threshold = keyword.partition("/")
    with contextlib.suppress(ValueError):
        if phrase.strip() and (not slash or 0 < float(threshold) <= 1):
            return
    raise SpeechError(f"{keyword!r} is no keyword: write the words, or words/threshold such as yes/1e-10")


class _Utterance(Recognition):
    """One utterance, on whichever decoder is free; tried again once when its worker dies."""

    most_waiting = 10.0

    def __init__(self, voice: Voice, pool: Pool, language: str, *, interim: bool) -> None:
        super().__init__(voice)
        self._pool = pool
        self._language = language
        self._interim = interim
        # All of it, for the second try.
        self._heard: list[bytes] = []
        self._told = ""

    async def run(self) -> None:
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
            mean = self.voice.memory.get("cepstral mean")
            if mean is None:
                mean = TELEPHONE_MEAN if self.voice.call_rate <= 8000 else WIDEBAND_MEAN
            busy = (await decoder.ask("begin", mean=mean))["busy"]
            async for audio, interim in self._chunks():
                answer = await decoder.ask("audio", audio=audio, interim=interim)
                busy += answer["busy"]
                if answer["text"] and answer["text"] != self._told:
                    self._told = answer["text"]
                    self.emit(Transcript(0, 0, self._told, False, 0.0, self.audio.seconds, language=self._language))
            answer = await decoder.ask("end")
        self.voice.memory["cepstral mean"] = answer["mean"]
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
            due = self._interim and since >= INTERIM
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
                language=self._language,
            )
        )


class Pool:
    """The worker processes, and who may use their decoders.

    Args:
        options: What the workers are started with.
        workers: How many.
    """

    def __init__(self, options: str, workers: int) -> None:
        self._options = options
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
            await asyncio.gather(*(self._start_worker() for _ in range(self._size)))
        except ChildDied as error:
            raise SpeechError(f"pocketsphinx does not start: {error}; standard error tells more") from error
        except OSError as error:
            raise SpeechError(f"pocketsphinx does not start: {error.strerror}") from error

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
        except TimeoutError:
            raise SpeechError(f"no decoder was free for {STUCK:g} s: more cores or fewer talkers") from None
        finally:
            if turn in self._queue:
                self._queue.remove(turn)
            elif not turn.cancelled() and turn.done() and sys.exc_info()[0] is not None:
                # Its turn came as it gave up.
                self._give_back(turn.result())

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        for task in self._tasks.copy():
            task.cancel()
        await asyncio.gather(*(worker.close() for worker in self._workers))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _freest(self) -> _Decoder | None:
        """Take a decoder of the worker that has the fewest talkers."""
        workers = [worker for worker in self._workers if worker.free]
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
        worker = _Worker(self._options)
        try:
            await worker.start()
        except BaseException:
            worker.kill()
            raise
        self._workers.append(worker)
        self._task(self._attend(worker))
        self._serve()

    async def _attend(self, worker: _Worker) -> None:
        """Read a worker's answers until it dies, then replace it."""
        cause = await worker.read()
        self._workers.remove(worker)
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

    def __init__(self, options: str) -> None:
        self._child = Child("streamsink.speech.stt.pocketsphinx_worker", options)
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
                f"pocketsphinx cannot load what it was given ({answer['error']}): standard error tells why"
            )
        self.free = list(range(DECODERS))

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
            async with asyncio.timeout(STUCK):
                answer: Answer = await asked
        except TimeoutError:
            self._child.kill()
            raise ChildDied(f"a worker took more than {STUCK:g} s for an answer and was ended") from None
        if "error" in answer:
            raise SpeechError(f"pocketsphinx failed: {answer['error']}")
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
