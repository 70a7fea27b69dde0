"""The face of the codec path: specs, and the errors of what they make."""

from __future__ import annotations

import runpy
import sys

import msgspec
import numpy as np
import pytest

from streamsink import codec
from streamsink.audio import Samples
from streamsink.codec import AutoL16Decoder, ByteOrder, CodecSpec
from streamsink.errors import CodecError

L16_RATES = [8000, 16_000, 24_000, 32_000, 44_100, 48_000]


@pytest.mark.parametrize(
    ("text", "canonical", "name", "rate", "ptime"),
    [
        ("PCMU", "PCMU@8000h@20i", "PCMU", 8000, 20),
        ("PCMU@8000h@20i", "PCMU@8000h@20i", "PCMU", 8000, 20),
        ("pcmu@40i", "PCMU@8000h@40i", "PCMU", 8000, 40),
        ("mulaw", "PCMU@8000h@20i", "PCMU", 8000, 20),
        ("PCMA@30i@8000h", "PCMA@8000h@30i", "PCMA", 8000, 30),
        ("PCMA@64000b@1c", "PCMA@8000h@20i", "PCMA", 8000, 20),
        ("x-alaw@120I", "PCMA@8000h@120i", "PCMA", 8000, 120),
        ("G722", "G722@20i", "G722", 16_000, 20),
        ("g722@8000h", "G722@20i", "G722", 16_000, 20),
        ("G722@16000h@10i@64000b", "G722@10i", "G722", 16_000, 10),
        ("L16", "L16@16000h@20i", "L16", 16_000, 20),
        ("L16@24000h@40i", "L16@24000h@40i", "L16", 24_000, 40),
        ("L16@40i@24000h@384000b", "L16@24000h@40i", "L16", 24_000, 40),
        ("linear16@44100H@10i", "L16@44100h@10i", "L16", 44_100, 10),
    ],
)
def test_parse(text: str, canonical: str, name: str, rate: int, ptime: int) -> None:
    spec = CodecSpec.parse(text)
    assert (spec.name, spec.rate, spec.ptime, str(spec)) == (name, rate, ptime, canonical)
    assert CodecSpec.parse(canonical) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a codec of PCMU, PCMA, G722, L16, got '' in ''"),
        ("OPUS@48000h", "expected a codec of PCMU, PCMA, G722, L16, got 'OPUS' in 'OPUS@48000h'"),
        ("audio/pcmu", "expected a codec of PCMU, PCMA, G722, L16, got 'audio/pcmu' in 'audio/pcmu'"),
        ("PCMU@", "got '' in 'PCMU@'"),
        ("PCMU@20", "got '20' in 'PCMU@20'"),
        ("PCMU@-20i", "got '-20i' in 'PCMU@-20i'"),
        ("PCMU@20i ", "got '20i ' in 'PCMU@20i '"),
        ("PCMU@٢٠i", "got '٢٠i' in 'PCMU@٢٠i'"),
        ("PCMU@20x", "expected a modifier such as 8000h (rate), 20i (ptime), 64000b (bitrate) or 1c (channels)"),
        ("PCMU@20i@8000h@30i", "modifier '30i' is the second of its kind in 'PCMU@20i@8000h@30i'"),
        ("PCMU@16000h", "PCMU has 8000 Hz, got 16000 in 'PCMU@16000h'"),
        ("G722@48000h", "G722 has 8000, 16000 Hz, got 48000 in 'G722@48000h'"),
        ("L16@11025h", "L16 has 8000, 16000, 24000, 32000, 44100, 48000 Hz, got 11025 in 'L16@11025h'"),
        ("PCMU@9i", "expected a ptime from 10 to 120 ms, got 9 in 'PCMU@9i'"),
        ("PCMU@121i", "expected a ptime from 10 to 120 ms, got 121 in 'PCMU@121i'"),
        ("L16@44100h@25i", "25 ms at 44100 Hz is no whole number of samples in 'L16@44100h@25i'"),
        ("L16@2c", "expected 1 channel, got 2 in 'L16@2c'"),
        ("PCMU@0c", "expected 1 channel, got 0 in 'PCMU@0c'"),
        ("PCMU@32000b", "PCMU at 8000 Hz has 64000 bit/s, got 32000 in 'PCMU@32000b'"),
        ("x" * 100, f"got '{'x' * 56}... in '{'x' * 56}..."),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(CodecError) as caught:
        CodecSpec.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("encodings", "rates", "name"),
    [
        (["x-mulaw", "mulaw", "pcmu", "ulaw"], [8000], "PCMU"),
        (["x-alaw", "alaw", "pcma"], [8000], "PCMA"),
        (["g722", "x-g722"], [8000, 16_000], "G722"),
        (["x-l16", "l16", "pcm", "linear16"], L16_RATES, "L16"),
    ],
)
def test_every_encoding_of_the_protocol(encodings: list[str], rates: list[int], name: str) -> None:
    for encoding in encodings:
        for spelling in (encoding, encoding.upper(), f"audio/{encoding}", f"Audio/{encoding.title()}"):
            for rate in rates:
                heard = 16_000 if name == "G722" else rate
                assert CodecSpec.from_media_format(spelling, rate) == CodecSpec(name, heard, 20)


@pytest.mark.parametrize(
    ("encoding", "rate", "channels", "message"),
    [
        ("audio/opus", 48_000, 1, "got 'audio/opus' in mediaFormat"),
        ("", 8000, 1, "got '' in mediaFormat"),
        ("audio/audio/pcmu", 8000, 1, "got 'audio/audio/pcmu' in mediaFormat"),
        ("a\r\nb\x1b[0m\0", 8000, 1, r"got 'a\r\nb\x1b[0m\x00' in mediaFormat"),
        ("é" * 5000, 8000, 1, f"got '{'é' * 56}... in mediaFormat"),
        ("audio/x-mulaw", 8000, 2, "expected 1 channel, got 2 in mediaFormat"),
        ("audio/x-mulaw", 44_100, 1, "PCMU has 8000 Hz, got 44100 in mediaFormat"),
        ("audio/x-L16", 0, 1, "got 0 in mediaFormat"),
        ("audio/x-L16", -16_000, 1, "got -16000 in mediaFormat"),
        ("audio/x-L16", 10**80, 1, f"got 1{'0' * 56}... in mediaFormat"),
    ],
)
def test_media_format_says_what_is_wrong(encoding: str, rate: int, channels: int, message: str) -> None:
    with pytest.raises(CodecError) as caught:
        CodecSpec.from_media_format(encoding, rate, channels)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "bytes_per_second", "frame_samples", "samples_in_961"),
    [
        ("PCMU", 8000, 160, 961),
        ("PCMA@40i", 8000, 320, 961),
        ("G722", 8000, 320, 1922),
        ("L16@24000h", 48_000, 480, 480),
        ("L16@44100h@10i", 88_200, 441, 480),
    ],
)
def test_arithmetic(text: str, bytes_per_second: int, frame_samples: int, samples_in_961: int) -> None:
    spec = CodecSpec.parse(text)
    counted = (spec.bytes_per_second, spec.frame_samples, spec.samples_in(961))
    assert counted == (bytes_per_second, frame_samples, samples_in_961)


def test_with_ptime() -> None:
    assert CodecSpec.parse("L16@24000h").with_ptime(40) == CodecSpec.parse("L16@24000h@40i")
    with pytest.raises(CodecError, match=r"^expected a ptime from 10 to 120 ms, got 5 for L16@24000h@20i$"):
        CodecSpec.parse("L16@24000h").with_ptime(5)


def test_specs_are_values() -> None:
    spec = CodecSpec.parse("PCMU")
    assert {spec: 1}[CodecSpec("PCMU", 8000)] == 1
    with pytest.raises(AttributeError):
        spec.rate = 1  # type: ignore[misc]
    assert msgspec.to_builtins(spec) == {"name": "PCMU", "rate": 8000, "ptime": 20}


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("text", ["PCMU", "PCMA@40i", "G722", "L16@8000h", "L16@24000h@40i"])
def test_a_frame_there_and_back(text: str, byteorder: ByteOrder) -> None:
    assert byteorder != "auto"
    spec = CodecSpec.parse(text)
    samples = (9000 * np.sin(np.arange(10 * spec.frame_samples) / 20)).astype(np.int16)
    payload = spec.encoder(byteorder).encode(samples)
    assert len(payload) == 10 * spec.ptime * spec.bytes_per_second // 1000
    decoder = spec.decoder(byteorder)
    decoded = decoder.decode(payload)
    assert decoded.shape == samples.shape
    delay = 22 if spec.name == "G722" else 0  # of its two mirror filters, which also take a while to adapt
    late = len(samples) // 2
    assert np.abs(decoded[late:].astype(int) - samples[late - delay : len(samples) - delay]).max() < 600
    assert decoder.byteorder == (byteorder if spec.name == "L16" else "little")


class Unbuffered:
    pass


@pytest.mark.parametrize("text", ["PCMU", "PCMA", "G722", "L16"])
@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("text", r"expected a payload as bytes, got <class 'str'>"),
        (None, r"expected a payload as bytes, got <class 'NoneType'>"),
        (Unbuffered(), r"expected a payload as bytes, got <class 'tests\.test_codec\.Unbuffered'>"),
        (np.zeros(4, np.int16), r"expected a payload as bytes, got <class 'numpy\.ndarray'> with items of 2 bytes"),
        (memoryview(b"abcd")[::2], r"expected a payload as bytes, got <class 'memoryview'>"),
    ],
)
def test_payloads_that_are_none(text: str, payload: object, message: str) -> None:
    with pytest.raises(CodecError, match=f"^{message}$"):
        CodecSpec.parse(text).decoder().decode(payload)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["PCMU", "PCMA", "G722", "L16"])
def test_any_buffer_of_octets_is_a_payload(text: str) -> None:
    octets = bytes(range(250))
    expected = CodecSpec.parse(text).decoder().decode(octets)
    for payload in (bytearray(octets), memoryview(octets), np.frombuffer(octets, np.uint8)):
        np.testing.assert_array_equal(CodecSpec.parse(text).decoder().decode(payload), expected)  # type: ignore[arg-type]


def misaligned() -> Samples:
    return np.ndarray(4, np.int16, bytes(9), 1)


@pytest.mark.parametrize("text", ["PCMU", "PCMA", "G722", "L16"])
@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (b"bytes", r"expected samples as a numpy array of int16, got <class 'bytes'>"),
        ([1, 2], r"expected samples as a numpy array of int16, got <class 'list'>"),
        (np.zeros(4), r"expected samples of dtype int16 in native byte order, got dtype float64"),
        (np.zeros(4, np.uint16), r"expected samples of dtype int16 in native byte order, got dtype uint16"),
        (np.zeros(4, ">i2"), r"expected samples of dtype int16 in native byte order, got dtype >i2"),
        (np.zeros((4, 1), np.int16), r"expected samples of shape \(n,\), got an array of 2 dimensions"),
        (np.int16(1), r"expected samples as a numpy array of int16, got <class 'numpy\.int16'>"),
        (np.zeros((), np.int16), r"expected samples of shape \(n,\), got an array of 0 dimensions"),
        (np.zeros(8, np.int16)[::2], r"expected contiguous, aligned samples, got a stride of 4 bytes; copy them first"),
        (np.zeros(8, np.int16)[::-1], r"expected contiguous, aligned samples, got a stride of -2 bytes; copy .*"),
        (misaligned(), r"expected contiguous, aligned samples, got a stride of 2 bytes off an odd address; copy .*"),
    ],
)
def test_samples_that_are_none(text: str, samples: Samples, message: str) -> None:
    with pytest.raises(CodecError, match=f"^{message}$"):
        CodecSpec.parse(text).encoder().encode(samples)


def test_frames_as_processors_see_them_can_be_encoded() -> None:
    samples = np.arange(320, dtype=np.int16)
    samples.flags.writeable = False
    assert CodecSpec.parse("L16").encoder().encode(samples[10:]) == samples[10:].tobytes()


def speech_like(rate: int, seconds: float, peak: int) -> Samples:
    n = np.arange(int(rate * seconds))
    samples: Samples = (peak * np.sin(n * 0.05) * np.sin(n * 0.003)).astype(np.int16)
    return samples


@pytest.mark.parametrize("peak", [3, 300, 32_000])
@pytest.mark.parametrize("framing", [1, 2, 7, 640, 1280])
@pytest.mark.parametrize("order", ["little", "big"])
def test_auto_finds_the_byte_order(order: ByteOrder, framing: int, peak: int) -> None:
    assert order != "auto"
    spec = CodecSpec.parse("L16@16000h")
    samples = speech_like(16_000, 0.5, peak)
    wire = bytes(2000) + spec.encoder(order).encode(samples)
    decoder = spec.decoder("auto")
    decoded = np.concatenate([decoder.decode(wire[i : i + framing]) for i in range(0, len(wire), framing)])
    assert decoder.byteorder == order
    np.testing.assert_array_equal(decoded[-4000:], samples[-4000:])  # whatever the first frames were taken for


def test_auto_reads_silence_as_little_and_waits() -> None:
    decoder = AutoL16Decoder(8000)
    for _ in range(100):
        decoder.decode(bytes(320))
    orders = [decoder.byteorder]
    decoder.decode(speech_like(8000, 0.1, 9000).astype(">i2").tobytes())
    assert [*orders, decoder.byteorder] == ["little", "big"]


def test_auto_is_little_on_a_tie() -> None:
    decoder = AutoL16Decoder(8000)
    assert decoder.decode(b"\1\1\2\2\1\1").tolist() == [257, 514, 257]
    assert decoder.byteorder == "little"


def test_auto_keeps_its_order_after_200_ms() -> None:
    decoder = AutoL16Decoder(8000)
    assert decoder.decode(speech_like(8000, 0.2, 9000).astype(">i2").tobytes()).tolist() == (
        speech_like(8000, 0.2, 9000).tolist()
    )
    loud = speech_like(8000, 5, 32_000)
    np.testing.assert_array_equal(decoder.decode(loud.tobytes()), loud.byteswap())
    assert decoder.byteorder == "big"


def test_ten_thousand_of_each() -> None:
    for text in ("PCMU", "PCMA", "G722", "L16"):
        spec = CodecSpec.parse(text)
        assert len({id(made) for made in [spec.decoder() for _ in range(10_000)]}) == 10_000
        assert len({id(made) for made in [spec.encoder() for _ in range(10_000)]}) == 10_000


def test_an_unbuilt_checkout_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streamsink._codecs", None)
    with pytest.raises(ImportError, match=r"extension is not built: run `pip install -e \.` in the checkout$"):
        runpy.run_path(codec.__file__)
