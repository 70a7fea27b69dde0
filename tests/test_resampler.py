"""The resampler's bounds, measured on many pairs of rates, and its state across pushes."""

from __future__ import annotations

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsink.audio import Samples
from streamsink.codec import Resampler
from streamsink.errors import CodecError

PAIRS = [
    (8000, 16_000),
    (16_000, 8000),
    (8000, 24_000),
    (24_000, 8000),
    (16_000, 24_000),
    (24_000, 16_000),
    (8000, 48_000),
    (48_000, 8000),
    (44_100, 16_000),
    (16_000, 44_100),
    (44_100, 48_000),
    (48_000, 44_100),
    (11_025, 48_000),
    (48_000, 11_025),
    (22_050, 8000),
    (192_000, 8000),
    (8000, 192_000),
    (44_101, 8000),  # coprime: rows of the table are interpolated
    (8000, 44_101),
    (9999, 10_000),
    (191_999, 192_000),
]


def sine(rate: int, frequency: float, seconds: float, peak: float = 28_000) -> Samples:
    t = np.arange(int(rate * seconds)) / rate
    return np.round(peak * np.sin(2 * np.pi * frequency * t + 0.3)).astype(np.int16)


def images(samples: Samples, rate: int, edge: float) -> float:
    """The largest amplitude above `edge` Hz; the window's side lobes are below -120 dB."""
    window = np.blackman(len(samples)) ** 2
    spectrum = np.abs(np.fft.rfft(samples * window)) / window.sum() * 2
    return float(spectrum[np.fft.rfftfreq(len(samples), 1 / rate) > edge].max(initial=0))


def phasor(samples: Samples, rate: int, frequency: float, first: int = 0) -> complex:
    """Amplitude and phase of the sine at `frequency`, sample 0 of the array being number `first` on the clock."""
    window = np.blackman(len(samples))
    t = (first + np.arange(len(samples))) / rate
    return complex(2 * np.sum(samples * window * np.exp(-2j * np.pi * frequency * t)) / window.sum())


def settled(samples: Samples) -> Samples:
    return samples[len(samples) // 4 :]


@pytest.mark.parametrize("pair", PAIRS)
def test_passband(pair: tuple[int, int]) -> None:
    for frequency in np.linspace(0.01, 0.42, 15) * min(pair):
        out = settled(Resampler(*pair).push(sine(pair[0], frequency, 0.4)))
        assert abs(20 * np.log10(abs(phasor(out, pair[1], frequency)) / 28_000)) < 0.2, frequency


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] > pair[1]])
def test_stopband_when_the_rate_falls(pair: tuple[int, int]) -> None:
    edge, highest = pair[1] / 2, pair[0] / 2
    frequencies = np.concatenate([np.linspace(edge, min(1.3 * edge, highest), 12), np.linspace(edge, highest, 12)])
    for frequency in frequencies:
        out = settled(Resampler(*pair).push(sine(pair[0], frequency, 0.4)))
        rms = np.sqrt(np.mean(out.astype(float) ** 2))
        assert 20 * np.log10(rms / (28_000 / np.sqrt(2)) + 1e-9) < -70, frequency


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] < pair[1] * 0.99])
def test_no_images_when_the_rate_rises(pair: tuple[int, int]) -> None:
    edge = pair[0] / 2
    for frequency in np.linspace(0.02, 0.49, 12) * pair[0]:
        out = settled(Resampler(*pair).push(sine(pair[0], frequency, 0.4)))
        assert 20 * np.log10(images(out, pair[1], edge) / 28_000 + 1e-9) < -70, frequency


@pytest.mark.parametrize("pair", PAIRS)
def test_group_delay(pair: tuple[int, int]) -> None:
    """`delay` is true to 0.02 of the faster rate's period, and at most 24 periods of the lower rate: 3 ms at 8 kHz."""
    resampler = Resampler(*pair)
    assert 0 < resampler.delay <= 24 / min(pair)
    frequency = 0.1 * min(pair)
    out = settled(Resampler(*pair).push(sine(pair[0], frequency, 0.4)))
    first = int(0.4 * pair[0]) * pair[1] // pair[0] - len(out)
    phase = np.angle(phasor(out, pair[1], frequency, first))
    periods = (0.3 - np.pi / 2 - phase) / (2 * np.pi)  # of a sine that began at 0.3
    lag = resampler.delay * frequency
    assert (lag - periods + 0.5) % 1 - 0.5 == pytest.approx(0, abs=0.02 * frequency / max(pair) + 1e-4)


@settings(deadline=None, max_examples=80)
@given(
    pair=st.tuples(st.integers(8000, 192_000), st.integers(8000, 192_000)) | st.sampled_from(PAIRS),
    cuts=st.lists(st.integers(0, 1500), max_size=12),
)
def test_every_push_returns_its_share_and_framing_does_not_matter(pair: tuple[int, int], cuts: list[int]) -> None:
    samples = np.random.default_rng(sum(cuts)).integers(-20_000, 20_000, sum(cuts), dtype=np.int16)
    resampler = Resampler(*pair)
    parts, pushed, returned = [np.zeros(0, np.int16)], 0, 0
    for part in np.split(samples, np.cumsum(cuts)):
        out = resampler.push(part)
        pushed += len(part)
        returned += len(out)
        assert returned == pushed * pair[1] // pair[0]
        parts.append(out)
    np.testing.assert_array_equal(np.concatenate(parts), Resampler(*pair).push(samples))


@pytest.mark.parametrize("pair", PAIRS)
def test_flush_gives_the_tail_and_resets(pair: tuple[int, int]) -> None:
    resampler = Resampler(*pair)
    click = np.zeros(pair[0] // 50, np.int16)
    click[-1] = 30_000
    whole = np.concatenate([resampler.push(click), resampler.flush()])
    peak = int(np.argmax(whole)) / pair[1] - (len(click) - 1) / pair[0]
    assert peak == pytest.approx(resampler.delay, abs=1.01 / min(pair))
    np.testing.assert_array_equal(resampler.push(click), Resampler(*pair).push(click))


def test_reset_forgets() -> None:
    noise = np.random.default_rng(1).integers(-20_000, 20_000, 1001, dtype=np.int16)
    resampler = Resampler(44_100, 16_000)
    resampler.push(noise)
    resampler.reset()
    np.testing.assert_array_equal(resampler.push(noise), Resampler(44_100, 16_000).push(noise))


@pytest.mark.parametrize("pair", PAIRS)
def test_full_scale_saturates(pair: tuple[int, int]) -> None:
    """A square wave rings beyond full scale: it is cut there, and nothing wraps."""
    square = np.where(np.arange(4000) // 40 % 2, -32_768, 32_767).astype(np.int16)
    out = Resampler(*pair).push(square)
    reference = soxr.resample(square.astype(np.float64), *pair, quality="HQ")
    delay = round(Resampler(*pair).delay * pair[1])
    middle = slice(len(out) // 3, len(out) // 3 * 2)
    wrapped = (out[delay:][middle] > 0) != (reference[: len(out) - delay][middle] > 0)
    steep = np.abs(reference[: len(out) - delay][middle]) < 30_000
    assert not np.any(wrapped & ~steep)
    assert (int(out.max()), int(out.min())) == (32_767, -32_768) or pair[0] > 3 * pair[1]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("level", [-32_000, -1, 0, 1, 32_000])
def test_a_constant_stays_one(pair: tuple[int, int], level: int) -> None:
    """To -70 dB in all, which is what the stopband may leave of its images."""
    out = settled(Resampler(*pair).push(np.full(pair[0] // 10, level, np.int16)))
    assert np.abs(out.astype(int) - level).max() <= abs(level) * 10 ** (-70 / 20) + 0.5


def test_equal_rates_pass_samples_as_they_are() -> None:
    samples = np.arange(160, dtype=np.int16)
    resampler = Resampler(11_025, 11_025)
    assert resampler.push(samples) is samples
    assert resampler.flush().shape == (0,)
    resampler.reset()
    assert resampler.delay == 0


def test_like_soxr_on_two_tones() -> None:
    """Against its best quality: the passband's ripple is all that is between them once both have settled."""
    rate_in, rate_out = 8000, 16_000
    tones = (sine(rate_in, 440, 1, 9000) + sine(rate_in, 1330, 1, 9000)).astype(np.int16)
    ours = Resampler(rate_in, rate_out)
    delay = round(ours.delay * rate_out)
    out = ours.push(tones).astype(float)[delay:]
    best = soxr.resample(tones.astype(np.float64), rate_in, rate_out, quality="VHQ")[: len(out)]
    assert np.abs(out - best)[2000:-2000].max() < 18_000 * (10 ** (0.13 / 20) - 1)


@pytest.mark.parametrize("pair", [(7999, 8000), (8000, 192_001), (0, 8000), (-8000, 8000), (8000, 10**9)])
def test_rates_out_of_range(pair: tuple[int, int]) -> None:
    message = rf"^rates from 8000 to 192000 Hz can be resampled, got {pair[0]} to {pair[1]}$"
    with pytest.raises(CodecError, match=message):
        Resampler(*pair)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (b"bytes", r"expected samples as a numpy array of int16, got <class 'bytes'>"),
        (np.zeros(4), r"expected samples of dtype int16 in native byte order, got dtype float64"),
        (np.zeros((2, 2), np.int16), r"expected samples of shape \(n,\), got an array of 2 dimensions"),
        (np.zeros(8, np.int16)[::2], r"expected contiguous, aligned samples, got a stride of 4 bytes; copy them first"),
    ],
)
@pytest.mark.parametrize("rate_out", [8000, 16_000])
def test_samples_that_are_none(samples: Samples, message: str, rate_out: int) -> None:
    with pytest.raises(CodecError, match=f"^{message}$"):
        Resampler(8000, rate_out).push(samples)


def test_ten_thousand() -> None:
    frame = np.arange(160, dtype=np.int16)
    made = [Resampler(8000, 16_000) for _ in range(10_000)]
    assert {resampler.push(frame).tobytes() for resampler in made} == {Resampler(8000, 16_000).push(frame).tobytes()}
