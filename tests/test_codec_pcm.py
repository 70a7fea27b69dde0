"""G.711 and L16 against the standard library."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsink._codecs import G711Decoder, G711Encoder, L16Decoder, L16Encoder
from streamsink.audio import Samples
from streamsink.errors import CodecError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the standard library's, up to 3.12
    import audioop

EVERY_SAMPLE: Samples = np.arange(-32_768, 32_768).astype(np.int16)
EVERY_OCTET = bytes(range(256))


@pytest.mark.parametrize(
    ("law", "compress", "expand"),
    [("PCMU", audioop.lin2ulaw, audioop.ulaw2lin), ("PCMA", audioop.lin2alaw, audioop.alaw2lin)],
)
def test_g711_like_audioop(law, compress, expand) -> None:  # type: ignore[no-untyped-def]
    assert G711Encoder(law).encode(EVERY_SAMPLE) == compress(EVERY_SAMPLE.tobytes(), 2)
    assert G711Decoder(law).decode(EVERY_OCTET).tobytes() == expand(EVERY_OCTET, 2)


def test_g711_digests() -> None:
    """Of every sample encoded and every octet decoded, as audioop of Python 3.11 does."""
    digests = {}
    for law in ("PCMU", "PCMA"):
        encoded = G711Encoder(law).encode(EVERY_SAMPLE)
        decoded = G711Decoder(law).decode(EVERY_OCTET).astype("<i2").tobytes()
        digests[law] = [hashlib.sha256(each).hexdigest()[:16] for each in (encoded, decoded)]
    assert digests == {
        "PCMU": ["81d633c9e6972a18", "3dab54339e520bb2"],
        "PCMA": ["38488f6fd710f468", "e04788d110e58ff8"],
    }


def test_g711_knows_two_laws() -> None:
    for make in (G711Decoder, G711Encoder):
        with pytest.raises(CodecError, match=r"^G\.711 has the laws PCMU and PCMA, got PCMX$"):
            make("PCMX")  # type: ignore[arg-type]


@given(samples=st.lists(st.integers(-32_768, 32_767)))
def test_l16_both_ways(samples: list[int]) -> None:
    array = np.array(samples, np.int16)
    for byteorder, dtype in (("little", "<i2"), ("big", ">i2")):
        wire = L16Encoder(byteorder).encode(array)  # type: ignore[arg-type]
        assert wire == array.astype(dtype).tobytes()
        np.testing.assert_array_equal(L16Decoder(byteorder).decode(wire), array)  # type: ignore[arg-type]


@given(wire=st.binary(max_size=200), cuts=st.lists(st.integers(0, 9), min_size=1))
def test_l16_carries_odd_octets_over(wire: bytes, cuts: list[int]) -> None:
    for byteorder, dtype in (("little", "<i2"), ("big", ">i2")):
        decoder = L16Decoder(byteorder)  # type: ignore[arg-type]
        parts, at = [], 0
        for cut in [*cuts, len(wire)]:
            parts.append(decoder.decode(wire[at : at + cut]))
            at += cut
        expected = np.frombuffer(wire[: len(wire) // 2 * 2], dtype)
        np.testing.assert_array_equal(np.concatenate(parts), expected)
        assert decoder.byteorder == byteorder


@pytest.mark.parametrize("byteorder", ["middle", "auto", ""])
def test_l16_knows_two_orders(byteorder: str) -> None:
    for make in (L16Decoder, L16Encoder):
        with pytest.raises(CodecError, match=rf"^L16 has the byte orders little and big, got {byteorder}$"):
            make(byteorder)  # type: ignore[arg-type]


def test_long_blocks_run_without_the_gil_and_come_out_alike() -> None:
    samples = np.random.default_rng(16).integers(-32_768, 32_768, 1_000_000, dtype=np.int16)
    for byteorder, dtype in (("little", "<i2"), ("big", ">i2")):
        wire = L16Encoder(byteorder).encode(samples)  # type: ignore[arg-type]
        assert wire == samples.astype(dtype).tobytes()
        np.testing.assert_array_equal(L16Decoder(byteorder).decode(wire), samples)  # type: ignore[arg-type]
