"""What resampling costs and how good it is, beside soxr and libsamplerate.

Speed: µs to push 20 ms and get what is due, the libraries by turns, a call each. soxr runs at QQ, its fastest, and at
LQ to show what the next better one holds back; samplerate at sinc_fastest. "Held back" is how many milliseconds of
output are missing at worst after any push, measured in the stream, and is what a listener waits on top of the filter.

Quality: a sine is swept over the whole band, a frequency at a time; drawn are its own level (the response) and the
level of everything else that came out (images, aliases, distortion, rounding), against soxr at VHQ. Then two tones,
whose spectrum shows what is added between and around them. 16-bit samples limit both to about -98 dB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import samplerate
import soxr
from numpy.typing import NDArray

from benchmarks.bench_codecs import OURS, Call, speech_like, timed
from streamsink.audio import Samples
from streamsink.codec import Resampler

mpl.use("agg")
from matplotlib import pyplot as plt

PAIRS = [(8000, 16_000), (16_000, 8000), (24_000, 16_000), (16_000, 24_000), (44_100, 16_000), (8000, 48_000)]
PAIRS += [(48_000, 8000), (48_000, 16_000), (44_101, 8000)]
SHOWN = ((8000, 16_000), (16_000, 8000), (44_100, 16_000))
"""The pairs whose sweep is drawn."""
CALLS = 3000
PEAK = 20_000

Pushes = dict[str, Call]
Whole = Callable[[Samples], Samples]


def contestants(rate_in: int, rate_out: int) -> Pushes:
    """Who takes a frame and returns what is due."""
    pushes: Pushes = {OURS: Resampler(rate_in, rate_out).push}
    for quality in ("QQ", "LQ"):
        stream = soxr.ResampleStream(rate_in, rate_out, 1, dtype="int16", quality=quality)
        pushes[f"soxr {quality}"] = stream.resample_chunk
    sinc = samplerate.Resampler("sinc_fastest", channels=1)
    ratio = rate_out / rate_in
    pushes["samplerate sinc_fastest"] = lambda frame: sinc.process(frame.astype(np.float32), ratio)
    return pushes


def held_back(push: Call, frames: list[Samples], rate_in: int, rate_out: int) -> float:
    """Milliseconds of output missing at worst after any push; what the first pushes have yet to fill counts."""
    taken, given, worst = 0, 0, 0.0
    for frame in frames[:100]:
        given += len(push(frame))  # type: ignore[arg-type]
        taken += len(frame)
        worst = max(worst, taken * rate_out // rate_in - given)
    return worst * 1000 / rate_out


def speed(calls: int) -> list[str]:
    """The table of both."""
    lines = ["| rates | who | p50 µs | p99 µs | times ours | held back |", "|---|---|--:|--:|--:|--:|"]
    for rate_in, rate_out in PAIRS:
        frame = rate_in // 50
        samples = speech_like(rate_in, 20)
        frames = [samples[i * frame % (len(samples) - frame) :][:frame].copy() for i in range(calls)]
        late = {who: held_back(push, frames, rate_in, rate_out) for who, push in contestants(rate_in, rate_out).items()}
        taken = timed(contestants(rate_in, rate_out), frames)
        ours = float(np.median(taken[OURS]))
        for who, each in taken.items():
            median = float(np.median(each))
            ratio = "" if who == OURS else f"{median / ours:.1f}"
            lines.append(
                f"| {rate_in} → {rate_out} | {who} | {median:.2f} | {np.percentile(each, 99):.2f} | {ratio} | "
                f"{late[who]:.1f} ms |"
            )
    return lines


def decibels(level: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Against the sine that went in."""
    return 20 * np.log10(np.asarray(level) / PEAK + 1e-7)


def sine(rate: int, frequency: float, seconds: float = 0.5) -> Samples:
    """One frequency, dithered, so that rounding is noise."""
    t = np.arange(int(rate * seconds))
    dither = np.random.default_rng(5).uniform(-0.5, 0.5, len(t))
    samples: Samples = np.round(PEAK * np.sin(2 * np.pi * frequency * t / rate) + dither).astype(np.int16)
    return samples


def sweep(resample: Whole, rate_in: int, rate_out: int, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Levels in dB of the sine itself, and of all else, for each frequency."""
    levels = []
    for frequency in frequencies:
        out = resample(sine(rate_in, frequency)).astype(float)
        out = out[len(out) // 5 : -len(out) // 10]
        t = np.arange(len(out)) / rate_out
        basis = np.array([np.cos(2 * np.pi * frequency * t), np.sin(2 * np.pi * frequency * t), np.ones_like(t)]).T
        if frequency < rate_out / 2:
            parts = np.linalg.lstsq(basis, out, rcond=None)[0]
            own, rest = float(np.hypot(*parts[:2])), out - basis @ parts
        else:
            own, rest = 0.0, out  # it cannot be there: all that is is an alias
        levels.append((own, float(np.sqrt(2 * np.mean(rest**2)))))
    return decibels(np.array(levels)).T


def ours(rate_in: int, rate_out: int) -> Whole:
    """A resampler of ours for a whole signal."""
    return lambda samples: Resampler(rate_in, rate_out).push(samples)


def best(rate_in: int, rate_out: int) -> Whole:
    """And soxr's best."""
    return lambda samples: soxr.resample(samples, rate_in, rate_out, quality="VHQ")


def plot_sweeps(path: Path, points: int) -> list[str]:
    """Draw each pair's sweep; returns a table of what counts in them."""
    lines = ["| rates | who | 0 to 0.42 of the lower rate | else, at worst | delay |", "|---|---|--:|--:|--:|"]
    figure, rows = plt.subplots(len(SHOWN), 2, figsize=(11, 3.2 * len(SHOWN)), layout="constrained")
    for (rate_in, rate_out), (response, rest) in zip(SHOWN, rows, strict=True):
        lower = min(rate_in, rate_out)
        frequencies = np.linspace(0.005, 0.498, points) * rate_in
        for who, resample in {OURS: ours(rate_in, rate_out), "soxr VHQ": best(rate_in, rate_out)}.items():
            own, else_ = sweep(resample, rate_in, rate_out, frequencies)
            shown = own > -120
            response.plot(frequencies[shown] / 1000, own[shown], label=who)
            rest.plot(frequencies / 1000, else_, label=who)
            passed = own[frequencies <= 0.42 * lower]
            kept = else_[(frequencies <= 0.42 * lower) | (frequencies >= 0.5 * lower)]
            delay = f"{Resampler(rate_in, rate_out).delay * 1000:.2f} ms" if who == OURS else ""
            lines.append(
                f"| {rate_in} → {rate_out} | {who} | {passed.min():+.2f} to {passed.max():+.2f} dB | "
                f"{kept.max():.1f} dB | {delay} |"
            )
        response.set(title=f"{rate_in} → {rate_out} Hz: the sine itself", ylabel="dB", ylim=(-3, 0.5))
        rest.set(title=f"{rate_in} → {rate_out} Hz: everything else", ylim=(-110, 5))
        for axes in (response, rest):
            axes.axvline(0.42 * lower / 1000, color="grey", lw=0.8, ls=":")
            axes.axvline(0.5 * lower / 1000, color="grey", lw=0.8, ls="--")
            axes.grid(alpha=0.3)
    rows[0][0].legend()
    for axes in rows[-1]:
        axes.set_xlabel("kHz in; dotted 0.42 of the lower rate, dashed half of it")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return lines


def plot_two_tones(path: Path) -> None:
    """Draw the spectrum of two tones, 8000 to 16000 Hz."""
    tones = (sine(8000, 1000, 2) // 2 + sine(8000, 1300, 2) // 2).astype(np.int16)
    figure, axes = plt.subplots(figsize=(11, 3.6), layout="constrained")
    for who, resample in {OURS: ours(8000, 16_000), "soxr VHQ": best(8000, 16_000)}.items():
        out = resample(tones).astype(float)[4000:-4000]
        window = np.blackman(len(out)) ** 2
        spectrum = np.abs(np.fft.rfft(out * window)) / window.sum() * 2
        axes.plot(np.fft.rfftfreq(len(out), 1 / 16_000) / 1000, decibels(spectrum), label=who, lw=0.7, alpha=0.8)
    axes.set(xlabel="kHz", ylabel="dB", ylim=(-140, 0), title="1000 and 1300 Hz, 8000 → 16000 Hz")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(out: Path, quick: bool = False) -> str:
    """Measure, draw ``resampler_sweep.png`` and ``resampler_two_tones.png`` into `out`, and tell in Markdown."""
    lines = ["## Resampler", "", " ".join((__doc__ or "").split()), ""]
    lines += speed(300 if quick else CALLS)
    lines += ["", *plot_sweeps(out / "resampler_sweep.png", 40 if quick else 240)]
    plot_two_tones(out / "resampler_two_tones.png")
    lines += ["", "![sine sweep](resampler_sweep.png)", "", "![two tones](resampler_two_tones.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    print(run(results, quick="--quick" in sys.argv))
