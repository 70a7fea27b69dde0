"""G.722 against the ITU-T's vectors, against two libraries, and against the Recommendation transcribed."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import av
import G722
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamsink._codecs import G722Decoder, G722Encoder
from streamsink.audio import Samples
from streamsink.errors import CodecError
from tests.g722_model import Codec as Model

TESTDATA = Path(os.environ.get("STREAMSINK_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))
VECTORS = TESTDATA / "g722"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason=f"no ITU-T vectors in {VECTORS}")

FRAMINGS = [1, 2, 3, 7, 80, 127, 128, 129, 160, 161, 320, 8000]  # octets


def own_input() -> Samples:
    """Two seconds of integer arithmetic, the same everywhere: a chirp with noise, rising to full scale and cut."""
    n = np.arange(32_000, dtype=np.int64)
    phase = (n * n * 3) % 65_536
    triangle = np.abs(phase - 32_768) - 16_384
    noise = (n * 1_103_515_245 + 12_345) // 65_536 % 4096 - 2048
    loudness = n * 3
    samples: Samples = np.clip((triangle + noise) * loudness // 32_768, -32_768, 32_767).astype(np.int16)
    return samples


def speech() -> Samples:
    path = TESTDATA / "speech" / "librivox_0880_16k.wav"
    if not path.exists():
        pytest.skip(f"no speech in {path.parent}")
    samples: Samples = soundfile.read(path, dtype="int16")[0]
    return samples[: len(samples) // 320 * 320].copy()  # FFmpeg's encoder fills up its last frame


def signals() -> dict[str, Samples]:
    random = np.random.default_rng(722)
    alternate = np.arange(8000) % 2
    return {
        "random": random.integers(-32_768, 32_768, 16_000, dtype=np.int16),
        "quiet": random.integers(-3, 4, 8000, dtype=np.int16),
        "silence": np.zeros(8000, np.int16),
        "highest": np.full(8000, 32_767, np.int16),
        "lowest": np.full(8000, -32_768, np.int16),
        "nyquist": np.where(alternate, -32_768, 32_767).astype(np.int16),
        "speech": speech(),
    }


def by_frames(codes: bytes, framing: int, mode: int = 1) -> Samples:
    decoder = G722Decoder(mode)  # type: ignore[arg-type]
    return np.concatenate([decoder.decode(codes[i : i + framing]) for i in range(0, len(codes), framing)])


def encoded_by_frames(samples: Samples, framing: int) -> bytes:
    encoder = G722Encoder()
    return b"".join(encoder.encode(samples[i : i + framing]) for i in range(0, len(samples), framing))


@needs_vectors
@pytest.mark.parametrize("framing", FRAMINGS)
def test_itu_vectors_encoder(framing: int) -> None:
    samples = np.fromfile(VECTORS / "inpsp.bin", "<i2")
    expected = np.fromfile(VECTORS / "codspw.cod", "<u2").astype(np.uint8)
    assert encoded_by_frames(samples, 2 * framing) == expected.tobytes()
    assert encoded_by_frames(samples, 2 * framing + 1) == expected.tobytes()


@needs_vectors
@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_itu_vectors_decoder(framing: int, mode: int) -> None:
    codes = np.fromfile(VECTORS / "codspw.cod", "<u2").astype(np.uint8).tobytes()
    expected = np.fromfile(VECTORS / f"outsp{mode}.bin", "<i2")
    np.testing.assert_array_equal(by_frames(codes, framing, mode), expected)


def test_a_strangers_checkout_proves_the_codec() -> None:
    """Digests of what the model makes of `own_input`."""
    codes = G722Encoder().encode(own_input())
    digests = [hashlib.sha256(codes).hexdigest()]
    digests += [hashlib.sha256(by_frames(codes, 160, mode).astype("<i2").tobytes()).hexdigest() for mode in (1, 2, 3)]
    assert digests == [
        "718d81e5760b9f2f9d04dea4854d1f0a7a3919b67b40dec9b4932793a1b6549c",
        "98fd078bb28043865d8631a3042df6fc9b4ae36c7f9221b2b0fc5cae12f434b5",
        "d7034f4469d3b479b0c025a4d07544b8be1d7d3a084266daf5f39bebf803c5bb",
        "31df6441a027475d01f5d6a0741e20ffb14b9609a224048acc67ad8b04305bd6",
    ]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", ["random", "quiet", "silence", "highest", "lowest", "nyquist", "speech"])
def test_like_pypi_g722(name: str, framing: int) -> None:
    samples = signals()[name]
    expected = G722.G722(16_000, 64_000).encode(samples)
    assert encoded_by_frames(samples, 2 * framing) == expected
    np.testing.assert_array_equal(by_frames(expected, framing), G722.G722(16_000, 64_000).decode(expected))


@settings(deadline=None, max_examples=60)
@given(octets=st.binary(max_size=4000), cuts=st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_any_octets_in_any_framing_decode_like_pypi_g722(octets: bytes, cuts: list[int]) -> None:
    decoder = G722Decoder()
    parts, at = [np.zeros(0, np.int16)], 0
    while at < len(octets):
        cut = cuts[len(parts) % len(cuts)]
        parts.append(decoder.decode(octets[at : at + cut]))
        at += cut
    expected = np.array(G722.G722(16_000, 64_000).decode(octets), np.int16)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_any_samples_in_any_framing_encode_alike(seed: int, cuts: list[int]) -> None:
    samples = np.random.default_rng(seed).integers(-32_768, 32_768, sum(cuts) // 2 * 2, dtype=np.int16)
    encoder = G722Encoder()
    assert b"".join(map(encoder.encode, np.split(samples, np.cumsum(cuts)))) == G722Encoder().encode(samples)


def test_like_ffmpeg() -> None:
    samples = signals()["speech"]
    encoder = av.CodecContext.create("g722", "w")
    encoder.sample_rate = 16_000
    encoder.format = av.AudioFormat("s16")
    encoder.layout = "mono"
    encoder.open()
    frame = av.AudioFrame.from_ndarray(samples[None, :], format="s16", layout="mono")
    frame.sample_rate = 16_000
    codes = b"".join(bytes(packet) for packet in encoder.encode(frame))
    assert G722Encoder().encode(samples) == codes

    decoder = av.CodecContext.create("g722", "r")
    decoder.layout = "mono"
    decoded = [part.to_ndarray()[0] for part in decoder.decode(av.Packet(codes))]
    np.testing.assert_array_equal(G722Decoder().decode(codes), np.concatenate(decoded))


def model_inputs() -> dict[str, NDArray[np.int16]]:
    """Full-scale input that other libraries encode otherwise: they leave out the transmit filter's LIMIT."""
    taps = np.array([3, -11, -11, 53, 12, -156, 32, 362, -210, -805, 951, 3876])
    taps = np.concatenate([taps, taps[::-1]])
    alternate = np.where(np.arange(24) % 2, -1, 1)
    n = np.arange(4000)
    random = np.random.default_rng(1)
    return {
        "loudest low band": np.tile(np.where(taps > 0, 32_767, -32_768), 160).astype(np.int16),
        "loudest high band": np.tile(np.where(taps * alternate > 0, 32_767, -32_768), 160).astype(np.int16),
        "square": np.where(n // 8 % 2, -32_768, 32_767).astype(np.int16),
        "slow square": np.where(n // 80 % 2, -32_768, 32_767).astype(np.int16),
        "random signs": np.where(random.random(8000) < 0.5, -32_768, 32_767).astype(np.int16),
    }


@pytest.mark.parametrize("name", model_inputs())
def test_full_scale_as_the_recommendation_has_it(name: str) -> None:
    samples = model_inputs()[name]
    codes = Model().encode(samples.tolist())
    assert encoded_by_frames(samples, 320) == codes
    for mode in (1, 2, 3):
        assert by_frames(codes, 160, mode).tolist() == Model(mode).decode(codes)


@pytest.mark.parametrize("seed", range(4))
def test_repeated_codes_overflow_as_the_recommendation_has_it(seed: int) -> None:
    """Each octet held for 50: the zero predictor saturates between its additions, where PyPI's G722 adds up first."""
    random = np.random.default_rng(seed)
    codes = np.repeat(random.integers(0, 256, 100, dtype=np.uint8), 50).tobytes()
    for mode in (1, 2, 3):
        assert by_frames(codes, 160, mode).tolist() == Model(mode).decode(codes)


def test_an_odd_sample_waits_for_its_partner() -> None:
    samples = own_input()[:321]
    encoder = G722Encoder()
    parts = [encoder.encode(samples[:1]), encoder.encode(samples[1:4]), encoder.encode(samples[4:])]
    assert [len(part) for part in parts] == [0, 2, 158]
    assert b"".join(parts) == G722Encoder().encode(samples[:320])


def test_nothing_in_nothing_out() -> None:
    assert G722Encoder().encode(np.zeros(0, np.int16)) == b""
    empty = G722Decoder().decode(b"")
    assert (empty.dtype, empty.shape) == (np.dtype(np.int16), (0,))


def test_decoded_arrays_own_their_memory() -> None:
    decoder = G722Decoder()
    first = decoder.decode(bytes(range(256)))
    kept = first.copy()
    decoder.decode(bytes(range(255, -1, -1)))
    np.testing.assert_array_equal(first, kept)
    assert first.flags.owndata
    assert first.flags.writeable


@pytest.mark.parametrize("mode", [0, 4, -1])
def test_unknown_mode(mode: int) -> None:
    with pytest.raises(CodecError, match=rf"^G\.722 has the modes 1, 2 and 3, got {mode}$"):
        G722Decoder(mode)  # type: ignore[arg-type]


def test_an_encoder_takes_no_arguments() -> None:
    with pytest.raises(TypeError):
        G722Encoder(2)  # type: ignore[call-arg]


def test_two_threads_in_one_decoder_are_told_so_and_crash_nothing() -> None:
    """A minute of audio releases the GIL, so the second thread finds the first inside."""
    decoder = G722Decoder()
    minute = bytes(480_000)
    outcomes: list[str] = []
    gate = threading.Barrier(4)

    def enter() -> None:
        gate.wait()
        for _ in range(20):
            try:
                outcomes.append(str(len(decoder.decode(minute))))
            except CodecError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 80
    assert set(outcomes) == {"960000", "this object is at work in another thread; give each thread its own"}
    assert len(decoder.decode(minute)) == 960_000
