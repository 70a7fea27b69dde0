from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamsink
from streamsink.audio import Frame, Track
from streamsink.codec import Resampler
from streamsink.errors import TalkBackOff
from streamsink.processor import SLOW_CALL, SLOW_CALLS, SLOW_WITHIN, Chain, Frames, MarkOutcome, Processor
from streamsink.stream import Stream
from tests.streams import Counts, counting, frame, make_stream

# The package offers a function of the module's name.
processor_module = importlib.import_module("streamsink.processor")


@pytest.fixture
async def stream(tmp_path: Path) -> Stream:
    return make_stream(tmp_path)


async def turn() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


class Witness(Processor):
    """Writes down what happens to it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def on_start(self, stream: Stream) -> None:
        self.seen.append(("start", stream.sid))

    def on_frame(self, frame: Frame) -> None:
        self.seen.append(("frame", frame.start))

    def on_played(self, frame: Frame) -> None:
        self.seen.append(("played", frame.start))

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        self.seen.append(("dtmf", digit, duration_ms))

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        self.seen.append(("mark", name, outcome.name))

    async def on_stop(self, reason: str) -> None:
        self.seen.append(("stop", reason))


class Slow(Witness):
    """Starts when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def on_start(self, stream: Stream) -> None:
        await self.go.wait()
        await super().on_start(stream)


def chain_of(*processors: Processor, counts: Counts | None = None, clock: Callable[[], float] = lambda: 0.0) -> Chain:
    return Chain([(type(p).__name__.lower(), p) for p in processors], counts or Counts(), clock)


# --- Life ------------------------------------------------------------------------------------------------------------


async def test_a_processor_sees_everything_in_order_and_its_end_once(stream: Stream) -> None:
    witness = Witness()
    chain = chain_of(witness)
    chain.start(stream)
    await turn()
    chain.frame(frame(counting(0, 160)))
    chain.call("on_dtmf", "5", 200)
    chain.frame(frame(counting(0, 160), 160))
    chain.played(frame(counting(0, 160), 80, track=Track.OUTBOUND))
    chain.call("on_mark", "m", MarkOutcome.PLAYED)
    await chain.stop("stop")
    chain.frame(frame(counting(0, 160), 320))
    chain.call("on_mark", "late", MarkOutcome.PLAYED)
    await chain.stop("closed")
    assert witness.seen == [
        ("start", "7d56"),
        ("frame", 0),
        ("dtmf", "5", 200),
        ("frame", 160),
        ("played", 80),
        ("mark", "m", "PLAYED"),
        ("stop", "stop"),
    ]


async def test_what_arrives_during_on_start_is_held_and_delivered_in_order(stream: Stream) -> None:
    slow, quick = Slow(), Witness()
    chain = chain_of(slow, quick)
    chain.start(stream)
    chain.frame(frame(counting(0, 160)))
    await turn()
    chain.call("on_dtmf", "1", 100)
    chain.frame(frame(counting(0, 160), 160))
    assert slow.seen == []
    assert quick.seen[1:] == [("frame", 0), ("dtmf", "1", 100), ("frame", 160)]
    slow.go.set()
    await turn()
    chain.frame(frame(counting(0, 160), 320))
    assert slow.seen == [("start", "7d56"), ("frame", 0), ("dtmf", "1", 100), ("frame", 160), ("frame", 320)]


async def test_a_stream_that_ends_during_on_start_still_delivers_what_was_held(stream: Stream) -> None:
    slow = Slow()
    chain = chain_of(slow)
    chain.start(stream)
    chain.frame(frame(counting(0, 160)))
    stopping = asyncio.ensure_future(chain.stop("lost"))
    await turn()
    assert not stopping.done()
    slow.go.set()
    await stopping
    assert slow.seen == [("start", "7d56"), ("frame", 0), ("stop", "lost")]


class NoArgStart(Witness):
    async def on_start(self) -> None:  # type: ignore[override]
        pass


class NoArgStop(Witness):
    async def on_stop(self) -> None:  # type: ignore[override]
        pass


class ExitsInStart(Witness):
    async def on_start(self, stream: Stream) -> None:
        raise SystemExit(3)


class ExitsInFrame(Witness):
    def on_frame(self, frame: Frame) -> None:
        raise SystemExit(3)


class ExitsInMark(Witness):
    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        raise SystemExit(3)


class ExitsInStop(Witness):
    async def on_stop(self, reason: str) -> None:
        raise SystemExit(3)


@pytest.mark.parametrize("broken", [NoArgStart, NoArgStop, ExitsInStart, ExitsInFrame, ExitsInMark, ExitsInStop])
async def test_whatever_a_processor_does_the_others_go_on_to_their_end(broken: type[Witness], stream: Stream) -> None:
    witness, counts = Witness(), Counts()
    chain = chain_of(broken(), witness, counts=counts)
    chain.start(stream)
    await turn()
    chain.frame(frame(counting(0, 160)))
    chain.call("on_mark", "m", MarkOutcome.PLAYED)
    await chain.stop("stop")
    assert witness.seen == [("start", "7d56"), ("frame", 0), ("mark", "m", "PLAYED"), ("stop", "stop")]
    assert counts.errors == [broken.__name__.lower()]


async def test_an_attribute_of_ones_own_called_dropped_is_left_alone(stream: Stream) -> None:
    class Dropped(Witness):
        dropped = "the call"

    counts = Counts()
    chain = chain_of(Dropped(), counts=counts)
    chain.start(stream)
    await chain.stop("stop")
    assert (counts.errors, counts.dropped) == ([], [])


async def test_what_a_chain_says_of_its_processors() -> None:
    class Quiet(Processor):
        speaks = False

    assert chain_of(Quiet()).names == ["quiet"]
    assert (chain_of(Quiet()).wants_played, chain_of(Quiet(), Witness()).wants_played) == (False, True)


# --- Retiring --------------------------------------------------------------------------------------------------------


class Failing(Witness):
    """Fails in one hook, after it has been seen."""

    hook = ""

    def fail(self, hook: str) -> None:
        if self.hook == hook:
            raise RuntimeError(f"{hook} is broken")

    async def on_start(self, stream: Stream) -> None:
        await super().on_start(stream)
        self.fail("on_start")

    def on_frame(self, frame: Frame) -> None:
        super().on_frame(frame)
        self.fail("on_frame")

    def on_played(self, frame: Frame) -> None:
        super().on_played(frame)
        self.fail("on_played")

    def on_dtmf(self, digit: str, duration_ms: int) -> None:
        super().on_dtmf(digit, duration_ms)
        self.fail("on_dtmf")

    def on_mark(self, name: str, outcome: MarkOutcome) -> None:
        super().on_mark(name, outcome)
        self.fail("on_mark")

    async def on_stop(self, reason: str) -> None:
        await super().on_stop(reason)
        self.fail("on_stop")


START, FRAME, PLAYED = ("start", "7d56"), ("frame", 0), ("played", 0)
DTMF, MARK = ("dtmf", "1", 100), ("mark", "m", "CLEARED")
STOP, ERROR = ("stop", "stop"), ("stop", "error")
SEEN = {
    "": [START, FRAME, PLAYED, DTMF, MARK, STOP],
    "on_start": [START],
    "on_frame": [START, FRAME, ERROR],
    "on_played": [START, FRAME, PLAYED, ERROR],
    "on_dtmf": [START, FRAME, PLAYED, DTMF, ERROR],
    "on_mark": [START, FRAME, PLAYED, DTMF, MARK, ERROR],
    "on_stop": [START, FRAME, PLAYED, DTMF, MARK, STOP],
}


async def play_all(chain: Chain, stream: Stream) -> None:
    chain.start(stream)
    await turn()
    chain.frame(frame(counting(0, 160)))
    chain.played(frame(counting(0, 160), track=Track.OUTBOUND))
    chain.call("on_dtmf", "1", 100)
    chain.call("on_mark", "m", MarkOutcome.CLEARED)
    await chain.stop("stop")


@pytest.mark.parametrize("hook", SEEN)
async def test_a_hook_that_raises_retires_that_processor_alone(
    hook: str, stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, healthy, counts = Failing(), Witness(), Counts()
    failing.hook = hook
    await play_all(chain_of(failing, healthy, counts=counts), stream)
    assert failing.seen == SEEN[hook]
    assert healthy.seen == SEEN[""]
    assert counts.errors == (["failing"] if hook else [])
    logged = capsys.readouterr().out
    assert logged.count("processor retired") == len(counts.errors)
    assert logged.count(f"RuntimeError: {hook} is broken") == len(counts.errors)
    if hook:
        line = next(line for line in logged.splitlines() if "processor retired" in line)
        assert all(part in line for part in ("stream=7d56", "call=76ac", "processor=failing", f"hook={hook}"))


@pytest.mark.parametrize("hook", [hook for hook in SEEN if hook])
async def test_a_cancellation_of_a_processors_own_making_retires_it_too(hook: str, stream: Stream) -> None:
    class Cancelling(Failing):
        def fail(self, hook: str) -> None:
            if self.hook == hook:
                raise asyncio.CancelledError

    cancelling, healthy, counts = Cancelling(), Witness(), Counts()
    cancelling.hook = hook
    await play_all(chain_of(cancelling, healthy, counts=counts), stream)
    assert cancelling.seen == SEEN[hook]
    assert healthy.seen == SEEN[""]
    assert counts.errors == ["cancelling"]


async def test_one_failure_is_told_once_even_when_letting_go_fails_too(
    stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hopeless(Failing):
        def fail(self, hook: str) -> None:
            if hook in ("on_frame", "on_stop"):
                raise RuntimeError(f"{hook} is broken")

    hopeless, counts = Hopeless(), Counts()
    await play_all(chain_of(hopeless, counts=counts), stream)
    assert hopeless.seen == SEEN["on_frame"]
    assert counts.errors == ["hopeless"]
    assert capsys.readouterr().out.count("processor retired") == 1


async def test_a_failure_among_the_held_frames_drops_the_rest(stream: Stream) -> None:
    failing, counts = Failing(), Counts()
    failing.hook = "on_frame"
    chain = chain_of(failing, counts=counts)
    chain.start(stream)
    chain.frame(frame(counting(0, 160)))
    chain.frame(frame(counting(0, 160), 160))
    await chain.stop("stop")
    assert failing.seen == SEEN["on_frame"]
    assert counts.errors == ["failing"]


class Clock:
    """Advances by what each call of ``on_frame`` is said to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("slow_calls", "errors"), [(SLOW_CALLS - 1, []), (SLOW_CALLS, ["dawdler"])])
async def test_slow_calls_retire_a_processor(slow_calls: int, errors: list[str], stream: Stream) -> None:
    clock, counts = Clock(), Counts()

    class Dawdler(Witness):
        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            # Every other call is quick: it is their number that counts.
            slow = frame.start % 2 == 0 and frame.start < 2 * slow_calls
            clock.now += SLOW_CALL * (1.01 if slow else 0.99)

    dawdler, healthy = Dawdler(), Witness()
    chain = chain_of(dawdler, healthy, counts=counts, clock=clock)
    chain.start(stream)
    await turn()
    for start in range(20):
        chain.frame(frame(counting(0, 1), start))
    await chain.stop("stop")
    frames = range(2 * slow_calls - 1) if errors else range(20)
    assert dawdler.seen == [START, *(("frame", start) for start in frames), ERROR if errors else STOP]
    assert healthy.seen == [START, *(("frame", start) for start in range(20)), STOP]
    assert counts.errors == errors


async def test_slow_calls_far_apart_retire_nobody(stream: Stream) -> None:
    clock, counts = Clock(), Counts()

    class Dawdler(Witness):
        def on_frame(self, frame: Frame) -> None:
            super().on_frame(frame)
            clock.now += SLOW_CALL * 1.01

    dawdler = Dawdler()
    chain = chain_of(dawdler, counts=counts, clock=clock)
    chain.start(stream)
    await turn()
    for start in range(100):
        clock.now += SLOW_WITHIN / (SLOW_CALLS - 1)
        chain.frame(frame(counting(0, 1), start))
    await chain.stop("stop")
    assert (counts.errors, len(dawdler.seen)) == ([], 102)


@pytest.mark.parametrize("obedient", [True, False])
@pytest.mark.parametrize("hook", ["on_start", "on_stop"])
async def test_an_async_hook_that_hangs_is_given_up(
    hook: str, obedient: bool, stream: Stream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processor_module, "HOOK_TIMEOUT", 0.02)
    released, left = asyncio.Event(), asyncio.Event()

    class Hanging(Witness):
        async def hang(self) -> None:
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    if obedient:
                        left.set()
                        raise
            left.set()

        async def on_start(self, stream: Stream) -> None:
            await super().on_start(stream)
            if hook == "on_start":
                await self.hang()

        async def on_stop(self, reason: str) -> None:
            await super().on_stop(reason)
            if hook == "on_stop":
                await self.hang()

    hanging, healthy, counts = Hanging(), Witness(), Counts()
    chain = chain_of(hanging, healthy, counts=counts)
    async with asyncio.timeout(50):
        chain.start(stream)
        await turn()
        chain.frame(frame(counting(0, 160)))
        await chain.stop("stop")
    assert hanging.seen == ([START] if hook == "on_start" else [START, FRAME, STOP])
    assert healthy.seen == [START, FRAME, STOP]
    assert counts.errors == ["hanging"]
    assert "took longer than 0.02 s" in capsys.readouterr().out
    released.set()
    async with asyncio.timeout(50):
        await left.wait()


async def test_stopping_can_itself_be_cancelled(stream: Stream) -> None:
    left = asyncio.Event()

    class Patient(Witness):
        async def on_stop(self, reason: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                left.set()

    counts = Counts()
    chain = chain_of(Patient(), counts=counts)
    chain.start(stream)
    await turn()
    stopping = asyncio.ensure_future(chain.stop("shutdown"))
    await turn()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    async with asyncio.timeout(50):
        await left.wait()
    assert counts.errors == []


# --- Rates -----------------------------------------------------------------------------------------------------------


class Collector(Processor):
    def __init__(self, sample_rate: int | None) -> None:
        self.sample_rate = sample_rate
        self.frames: list[Frame] = []

    def on_frame(self, frame: Frame) -> None:
        self.frames.append(frame)


async def test_processors_of_one_rate_share_a_resampler_and_others_get_audio_as_it_comes(stream: Stream) -> None:
    collectors = [Collector(None), Collector(8000), Collector(16000), Collector(16000)]
    chain = chain_of(*collectors)
    chain.start(stream)
    await turn()
    audio = (8000 * np.sin(np.arange(1600) / 5)).astype(np.int16)
    for start in range(0, 1600, 160):
        chain.frame(frame(audio[start : start + 160], 4000 + start))
    await chain.stop("stop")
    as_it_comes, own_rate, doubled, shared = (collector.frames for collector in collectors)
    assert [f.start for f in as_it_comes] == list(range(4000, 5600, 160))
    assert all(a is b for a, b in zip(as_it_comes, own_rate, strict=True))
    assert all(a is b for a, b in zip(doubled, shared, strict=True))
    assert [(f.start, len(f.samples), f.sample_rate, f.lost) for f in doubled] == [
        (start, 320, 16000, 0) for start in range(8000, 11_200, 320)
    ]
    resampler = Resampler(8000, 16000)
    assert np.array_equal(np.concatenate([f.samples for f in doubled]), resampler.push(audio))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 24000, 44100, 48000])
@pytest.mark.parametrize("lost", [160, 1600, 80_000, 480_000])
async def test_a_loss_keeps_its_length_at_every_rate(rate: int, lost: int, stream: Stream) -> None:
    collector = Collector(rate)
    chain = chain_of(collector)
    chain.start(stream)
    await turn()
    ones = np.full(1600, 9000, np.int16)
    chain.frame(frame(ones, 0))
    chain.frame(frame(ones, 1600 + lost, lost=lost))
    chain.frame(frame(ones, 3200 + lost))
    await chain.stop("stop")
    first, second, third = collector.frames
    assert first.start == 0
    assert (first.lost, third.lost) == (0, 0)
    assert second.start == len(first.samples) + second.lost
    assert third.start == second.start + len(second.samples)
    assert abs(second.lost - lost * rate / 8000) <= 1
    assert abs(third.start + len(third.samples) - (4800 + lost) * rate / 8000) <= 1


async def test_tracks_have_resamplers_of_their_own(stream: Stream) -> None:
    collector = Collector(16000)
    chain = chain_of(collector)
    chain.start(stream)
    await turn()
    loud, silent = np.full(160, 20_000, np.int16), np.zeros(160, np.int16)
    for start in range(0, 800, 160):
        chain.frame(frame(loud, start))
        chain.frame(frame(silent, start, track=Track.OUTBOUND))
    await chain.stop("stop")
    outbound = [f for f in collector.frames if f.track is Track.OUTBOUND]
    assert [f.start for f in outbound] == [0, 320, 640, 960, 1280]
    assert not any(f.samples.any() for f in outbound)


# --- The decorated function ------------------------------------------------------------------------------------------


async def test_a_function_reads_every_frame_and_ends_with_the_stream(stream: Stream) -> None:
    seen: list[Any] = []

    @streamsink.processor(sample_rate=8000, speaks=False)
    async def listener(stream: Stream, frames: Frames, *, gain: float = 1.0) -> None:
        """Listens."""
        seen.append((stream.sid, gain))
        seen.extend([heard.start async for heard in frames])
        seen.append("end")

    assert (listener.__name__, listener.__doc__, listener.sample_rate, listener.speaks) == (
        "listener",
        "Listens.",
        8000,
        False,
    )
    counts = Counts()
    chain = chain_of(listener(gain=2.0), counts=counts)
    chain.start(stream)
    await turn()
    for start in (0, 160, 320):
        chain.frame(frame(counting(0, 160), start))
    await chain.stop("stop")
    assert seen == [("7d56", 2.0), 0, 160, 320, "end"]
    assert (counts.errors, counts.dropped) == ([], [])


async def test_a_function_that_falls_behind_loses_the_oldest_frames_and_they_are_counted(stream: Stream) -> None:
    go = asyncio.Event()
    seen: list[int] = []

    @streamsink.processor(queue_frames=4)
    async def slow(stream: Stream, frames: Frames) -> None:
        await go.wait()
        seen.extend([heard.start async for heard in frames])

    instance, counts = slow(), Counts()
    chain = chain_of(instance, counts=counts)
    chain.start(stream)
    await turn()
    for start in range(10):
        chain.frame(frame(counting(0, 1), start))
    assert instance.dropped == 6
    go.set()
    await chain.stop("stop")
    assert seen == [6, 7, 8, 9]
    assert (counts.errors, counts.dropped) == ([], [("slow", 6)])


async def test_a_function_that_raises_is_retired_and_told_once(
    stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    @streamsink.processor()
    async def broken(stream: Stream, frames: Frames) -> None:
        async for _ in frames:
            raise RuntimeError("broken")

    counts, healthy = Counts(), Witness()
    chain = chain_of(broken(), healthy, counts=counts)
    chain.start(stream)
    await turn()
    for start in (0, 160, 320):
        chain.frame(frame(counting(0, 160), start))
        await turn()
    await chain.stop("stop")
    assert counts.errors == ["broken"]
    assert capsys.readouterr().out.count("RuntimeError: broken") == 1
    assert healthy.seen == [START, ("frame", 0), ("frame", 160), ("frame", 320), STOP]


async def test_a_function_that_raises_after_the_last_frame_is_told_too(stream: Stream) -> None:
    @streamsink.processor()
    async def broken(stream: Stream, frames: Frames) -> None:
        async for _ in frames:
            pass
        raise RuntimeError("broken")

    counts = Counts()
    chain = chain_of(broken(), counts=counts)
    chain.start(stream)
    await chain.stop("stop")
    assert counts.errors == ["broken"]


async def test_a_function_may_return_before_the_stream_ends(stream: Stream) -> None:
    seen: list[int] = []

    @streamsink.processor()
    async def first(stream: Stream, frames: Frames) -> None:
        async for heard in frames:
            seen.append(heard.start)
            return

    counts = Counts()
    chain = chain_of(first(), counts=counts)
    chain.start(stream)
    await turn()
    for start in (0, 160, 320):
        chain.frame(frame(counting(0, 160), start))
        await turn()
    await chain.stop("stop")
    assert seen == [0]
    assert (counts.errors, counts.dropped) == ([], [])


async def test_a_function_that_does_not_end_is_cancelled(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_module, "HOOK_TIMEOUT", 0.02)
    cancelled = asyncio.Event()

    @streamsink.processor()
    async def endless(stream: Stream, frames: Frames) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    counts = Counts()
    chain = chain_of(endless(), counts=counts)
    chain.start(stream)
    await turn()
    async with asyncio.timeout(50):
        await chain.stop("stop")
        await cancelled.wait()
    assert counts.errors == ["endless"]


def test_what_is_not_an_async_function_of_two_is_refused() -> None:
    def plain(stream: Stream, frames: Frames) -> None: ...

    async def alone(stream: Stream) -> None: ...

    for function in (plain, alone):
        with pytest.raises(TypeError, match="async def f"):
            streamsink.processor()(function)  # type: ignore[arg-type]


async def test_a_sentence_that_says_all_needs_no_traceback(stream: Stream, capsys: pytest.CaptureFixture[str]) -> None:
    class Mute(Failing):
        def fail(self, hook: str) -> None:
            if hook == "on_frame":
                raise TalkBackOff("this pipeline may not speak")

    await play_all(chain_of(Mute()), stream)
    told = capsys.readouterr().out
    assert "this pipeline may not speak" in told
    assert "Traceback" not in told
