"""The embedded engine in its worker processes: what it hears, what load and death do to it, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import soundfile

from streamsink.codec import CodecSpec, Resampler
from streamsink.errors import ChildDied, SpeechError
from streamsink.speech.events import EngineError, Transcript
from streamsink.speech.stt import pocketsphinx, pool
from streamsink.speech.stt.pocketsphinx import DECODERS, Pocketsphinx
from streamsink.speech.stt.pool import MOST_QUEUED, Pool
from streamsink.speech.transcription import EngineOptions, Event, Recognition, Voice, find_engine
from streamsink.speech.transcription_counts import counts

pytest.importorskip("pocketsphinx", reason="needs the speech extra")

on_one_loop = pytest.mark.asyncio(loop_scope="module")

TESTDATA = Path(os.environ.get("STREAMSINK_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata")) / "speech"
needs_speech = pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"needs recorded speech; there is no {TESTDATA}")

BRIDGE = "hello this is a test of the conference bridge"
SECOND = 32_000
"""Octets."""


def speech(name: str, codec: str = "L16@16000h") -> bytes:
    """A file as it arrives at 16 kHz, having gone through a codec, with some silence around."""
    samples = soundfile.read(TESTDATA / f"{name}_16k.wav", dtype="int16")[0]
    samples = np.concatenate([np.zeros(4800, np.int16), samples, np.zeros(6400, np.int16)])
    spec = CodecSpec.parse(codec)
    if spec.rate != 16_000:
        samples = Resampler(16_000, spec.rate).push(samples)
    decoded = spec.decoder().decode(spec.encoder().encode(samples[: len(samples) // 160 * 160]))
    return (decoded if spec.rate == 16_000 else Resampler(spec.rate, 16_000).push(decoded)).astype("<i2").tobytes()


@contextlib.asynccontextmanager
async def engine(**options: object) -> AsyncIterator[Pocketsphinx]:
    made = find_engine("pocketsphinx", EngineOptions(**{"workers": 1, **options}))  # type: ignore[arg-type]
    assert isinstance(made, Pocketsphinx)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def voice(rate: int = 16_000) -> Voice:
    return Voice("linear16", 16_000, rate)


async def events(recognition: Recognition) -> list[Event]:
    return [event async for event in recognition]


async def said(engine: Pocketsphinx, audio: bytes, voice: Voice) -> str:
    recognition = engine.open(voice)
    recognition.push(audio)
    recognition.finish()
    final = (await events(recognition))[-1]
    assert isinstance(final, Transcript)
    assert final.final
    return final.text


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def started() -> AsyncIterator[Pocketsphinx]:
    """An engine with one worker, for all tests that need no other: it takes a second to start."""
    async with engine() as started:
        yield started


@pytest.fixture
def made(started: Pocketsphinx) -> Iterator[Pocketsphinx]:
    """That engine; whatever a test does to it, all its decoders are free afterwards."""
    yield started
    assert free(started) == [list(range(DECODERS))]


def free(engine: Pocketsphinx) -> list[list[int]]:
    """Each worker's free decoders."""
    assert engine._pool is not None
    return [worker.free for worker in engine._pool._workers]


@on_one_loop
@needs_speech
async def test_words_with_their_times_and_interims_on_the_way(made: Pocketsphinx) -> None:
    audio = speech("flite-rms_s1")
    recognition = made.open(voice())
    told: list[Event] = []

    async def listen() -> None:
        async for event in recognition:
            told.append(event)
            more.set()

    more = asyncio.Event()
    listening = asyncio.ensure_future(listen())
    for start in range(0, SECOND * 3, SECOND // 10):
        recognition.push(audio[start : start + SECOND // 10])
        if start == SECOND * 2:
            # Nothing else is waiting by then.
            await more.wait()
    recognition.push(audio[SECOND * 3 :])
    recognition.finish()
    await listening
    *interims, final = [event for event in told if isinstance(event, Transcript)]
    assert len(told) == len(interims) + 1
    assert interims
    assert not any(interim.final for interim in interims)
    assert (final.text, final.final, final.language) == (BRIDGE, True, "en-US")
    assert " ".join(word.word for word in final.words) == BRIDGE
    assert (final.start, final.end) == (final.words[0].start, final.words[-1].end)
    # The file has 0.1 s of silence before its first word, we added 0.3.
    assert 0.3 < final.start < 0.6
    assert final.confidence is not None
    assert 0.3 < final.confidence <= 1.0
    # Who is behind gets no interims.
    dropped = counts.dropped["interim"]
    late = made.open(voice())
    late.push(audio[: SECOND * 2])
    for start in range(SECOND * 2, len(audio), SECOND // 10):
        late.push(audio[start : start + SECOND // 10])
    late.finish()
    first = (await events(late))[0]
    assert isinstance(first, Transcript)
    assert counts.dropped["interim"] > dropped
    # A telephone's band, from its first word on; the track's mean is kept.
    telephone = voice(8000)
    assert await said(made, speech("flite-rms_s1", "PCMU"), telephone) == BRIDGE
    mean = telephone.memory["cepstral mean"]
    assert mean != pocketsphinx.TELEPHONE_MEAN
    assert await said(made, speech("flite-rms_s2", "PCMU"), telephone) == "please leave a message after the tone"
    assert telephone.memory["cepstral mean"] != mean
    assert await said(made, bytes(SECOND), voice()) == ""


@on_one_loop
@needs_speech
async def test_a_grammar_of_cards_is_recognised_exactly(tmp_path: Path) -> None:
    grammar = tmp_path / "cards.jsgf"
    grammar.write_text(
        "#JSGF V1.0;\ngrammar cards;\npublic <cards> = <card>+;\n<card> = <rank> of <suit>;\n"
        "<rank> = ace | two | three | four | five | six | seven | eight | nine | ten | jack | queen | king;\n"
        "<suit> = clubs | diamonds | hearts | spades;\n"
    )
    async with engine(grammar=grammar, interim=False) as made:
        recognition = made.open(voice())
        recognition.push(speech("cards_005", "G722"))
        recognition.finish()
        (final,) = await events(recognition)
        assert isinstance(final, Transcript)
        assert final.text == "eight of spades four of clubs seven of hearts"
        assert final.confidence is None
        assert [word.word for word in final.words] == final.text.split()


@on_one_loop
@needs_speech
async def test_keywords_are_found_among_other_words() -> None:
    async with engine(keywords=("conference bridge/1e-30", "next tuesday/1e-20", "test")) as made:
        assert "conference bridge" in await said(made, speech("flite-rms_s1"), voice())
        assert await said(made, speech("flite-rms_s3"), voice()) == "next tuesday"
        assert await said(made, speech("flite-rms_s2"), voice()) == ""


@on_one_loop
@needs_speech
async def test_a_killed_worker_costs_no_word(made: Pocketsphinx) -> None:
    audio = speech("flite-rms_s1")
    recognition = made.open(voice())
    told = aiter(recognition)
    for start in range(0, SECOND * 2, SECOND // 10):
        recognition.push(audio[start : start + SECOND // 10])
    first = await anext(told)
    assert isinstance(first, Transcript)
    (pid,) = made.pids
    retried, deaths = counts.retried, counts.deaths
    os.kill(pid, signal.SIGKILL)
    recognition.push(audio[SECOND * 2 :])
    recognition.finish()
    final = [event async for event in told][-1]
    assert isinstance(final, Transcript)
    assert (final.text, final.final) == (BRIDGE, True)
    assert (counts.retried, counts.deaths) == (retried + 1, deaths + 1)
    assert len(made.pids) == 1
    assert made.pids != [pid]


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> list[signal.Signals]:
    """Signals for the worker that is asked next, one a question."""
    signals: list[signal.Signals] = []
    ask = pool._Worker.ask

    async def struck(worker: pool._Worker, number: int, do: str, **more: object) -> dict[str, object]:
        if not signals:
            return await ask(worker, number, do, **more)
        number_of_signal = signals.pop(0)
        os.kill(worker.pid, number_of_signal)
        with monkeypatch.context() as patch:
            if number_of_signal == signal.SIGSTOP:
                patch.setattr(Pocketsphinx, "stuck", 0.05)
            return await ask(worker, number, do, **more)

    monkeypatch.setattr(pool._Worker, "ask", struck)
    return signals


@on_one_loop
async def test_an_utterance_that_kills_twice_is_given_up_and_others_go_on(
    made: Pocketsphinx, strike: list[signal.Signals]
) -> None:
    strike += [signal.SIGKILL, signal.SIGKILL]
    recognition = made.open(voice())
    recognition.push(bytes(SECOND))
    recognition.finish()
    assert await events(recognition) == [
        EngineError("two workers died of the same utterance, or at the same time", recoverable=False)
    ]
    assert await said(made, bytes(SECOND), voice()) == ""


@on_one_loop
async def test_a_worker_that_is_stuck_is_ended(made: Pocketsphinx, strike: list[signal.Signals]) -> None:
    (pid,) = made.pids
    strike.append(signal.SIGSTOP)
    assert await said(made, bytes(SECOND), voice()) == ""
    assert made.pids
    assert made.pids != [pid]


@on_one_loop
async def test_a_worker_that_cannot_be_replaced_is_tried_again(
    made: Pocketsphinx, strike: list[signal.Signals], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "START_AGAIN", (0.0, 0.0))
    start = pool._Worker.start
    refusals = [OSError(11, "no room"), SpeechError("no model"), ChildDied("at once")]

    async def refused(worker: pool._Worker) -> None:
        if refusals:
            raise refusals.pop()
        await start(worker)

    monkeypatch.setattr(pool._Worker, "start", refused)
    strike.append(signal.SIGKILL)
    assert await said(made, bytes(SECOND), voice()) == ""
    assert refusals == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(ChildDied("it died"), "does not start: it died; standard error"), (OSError(11, "no room"), "start: no room")],
)
@on_one_loop
async def test_workers_that_do_not_start_are_told(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    async def refused(worker: pool._Worker) -> None:
        raise error

    monkeypatch.setattr(pool._Worker, "start", refused)
    with pytest.raises(SpeechError, match=told):
        async with engine():
            pass


@on_one_loop
async def test_who_finds_no_decoder_waits_and_too_many_are_holes(made: Pocketsphinx) -> None:
    talking = [made.open(voice()) for _ in range(DECODERS)]
    waiting = [made.open(voice()) for _ in range(MOST_QUEUED)]
    one_too_many = made.open(voice())
    for recognition in (*talking, *waiting):
        recognition.push(bytes(SECOND // 10))
    assert await events(one_too_many) == [
        EngineError(f"{MOST_QUEUED} utterances wait for a decoder: more cores or fewer talkers", recoverable=False)
    ]
    await waiting[0].close()
    for recognition in (*talking, *waiting[1:]):
        recognition.finish()
    for recognition in (*talking, *waiting[1:]):
        final = (await events(recognition))[-1]
        assert isinstance(final, Transcript)
        assert final.final


@on_one_loop
async def test_who_gives_up_as_its_turn_comes_gives_it_on(made: Pocketsphinx) -> None:
    assert made._pool is not None
    async with contextlib.AsyncExitStack() as others:
        for _ in range(DECODERS - 1):
            await others.enter_async_context(made._pool.lease())
        async with made._pool.lease():
            waiting = asyncio.ensure_future(made._pool.lease().__aenter__())
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert free(made) == [[DECODERS - 1]]


@on_one_loop
async def test_workers_that_fall_behind_cost_the_utterance(made: Pocketsphinx) -> None:
    recognition = made.open(voice())
    for _ in range(11):
        recognition.push(bytes(SECOND))
    assert await events(recognition) == [
        EngineError("the workers are 10 s behind: more cores or fewer talkers", recoverable=False)
    ]


@on_one_loop
async def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "STUCK", 0.01)
    with pytest.raises(SpeechError, match=r"no decoder was free for 0\.01 s"):
        async with Pool(Pocketsphinx(EngineOptions()), "{}", 1).lease():
            pass


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"grammar": Path("/no/such.jsgf")}, "there is no grammar /no/such.jsgf: give a path that exists"),
        ({"grammar": Path("/"), "keywords": ("yes",)}, "takes a grammar or keywords, not both"),
        ({"keywords": ("yes/often",)}, "'yes/often' is no keyword: write the words, or words/threshold such as"),
        ({"keywords": ("/1e-3",)}, "'/1e-3' is no keyword"),
        ({"language": "de-DE"}, "a model of en-US only, not de-DE: give model=FOLDER"),
        ({"model": "/no/model"}, "there is no model /no/model"),
        ({"model": "/proc/self/fdinfo"}, "is no model of PocketSphinx: wanted a folder with *.dict"),
        ({"url": "https://example.org"}, "works in this machine: drop `url`"),
    ],
)
def test_what_cannot_be_used_is_told_at_once(options: dict[str, object], told: str) -> None:
    with pytest.raises(SpeechError) as error:
        Pocketsphinx(EngineOptions(**options))  # type: ignore[arg-type]
    assert told in str(error.value)


def test_a_missing_package_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpeechError, match=r"not installed: pip install 'streamsink\[speech\]'"):
        Pocketsphinx(EngineOptions())


@on_one_loop
async def test_what_the_workers_cannot_load_is_told_at_the_start(tmp_path: Path) -> None:
    grammar = tmp_path / "broken.jsgf"
    grammar.write_text("#JSGF V1.0;\ngrammar x;\npublic <x> = qwertzuiop;\n")
    with pytest.raises(SpeechError, match="pocketsphinx cannot load what it was given"):
        async with engine(grammar=grammar):
            pass


@on_one_loop
async def test_a_model_of_ones_own(tmp_path: Path) -> None:
    from pocketsphinx import get_model_path

    own = Path(get_model_path()) / "en-us"
    async with engine(model=str(own), language="en-GB") as made:
        assert await said(made, bytes(SECOND), voice()) == ""
