"""Codecs and resampling: what a stream's payloads are, and their way to int16 arrays and back.

All of it runs in C (``codecs/``); this module names things and picks them, and calls go straight to C. That includes
G.711: for a 20 ms frame, audioop with ``np.frombuffer`` takes 2.5 times as long to decode and 6 times as long to encode
as a table in C that fills the array itself, so audioop is only what the tests compare with. L16 is in C for the same
reason (3 times numpy's speed) and because an odd octet has to wait for the next payload.

Decoders, encoders and resamplers hold the state that crosses frames, so each direction of each track has its own, and
none is shared between threads: a second thread that enters one at work gets a :exc:`CodecError`. Blocks of more than
20 ms run without the GIL.
"""

from __future__ import annotations

import re
from typing import Final, Literal, Protocol

import msgspec
import numpy as np

from streamsink.audio import Samples
from streamsink.errors import CodecError

try:
    from streamsink._codecs import (
        G711Decoder,
        G711Encoder,
        G722Decoder,
        G722Encoder,
        L16Decoder,
        L16Encoder,
        Resampler,
    )
except ImportError as error:
    raise ImportError("streamsink's C extension is not built: run `pip install -e .` in the checkout") from error

__all__ = ["PTIMES", "AutoL16Decoder", "ByteOrder", "CodecSpec", "Decoder", "Encoder", "Resampler"]

ByteOrder = Literal["little", "big", "auto"]
"""How L16's two octets lie on the wire; ``auto`` finds out by listening."""


class Decoder(Protocol):
    """Turns one track's payloads into samples, in order."""

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """What an encoder that answers this track must be given; ``little`` where the codec has no choice."""

    def decode(self, payload: bytes, /) -> Samples:
        """Decode one payload.

        Args:
            payload: Raw codec octets, any number of them.

        Returns:
            Mono PCM, shape ``(n,)``, int16, an array of its own.

        Raises:
            CodecError: The payload is not bytes, or another thread is inside this decoder.
        """


class Encoder(Protocol):
    """Turns samples into one stream's payloads, in order."""

    def encode(self, samples: Samples, /) -> bytes:
        """Encode samples.

        Args:
            samples: Mono PCM at the codec's rate, shape ``(n,)``, int16, contiguous. G.722 makes an octet of two
                samples; an odd one is kept and goes out with the next call.

        Returns:
            Raw codec octets.

        Raises:
            CodecError: Wrong type, dtype, shape or stride, or another thread is inside this encoder.
        """


_ALIASES: Final = {
    **dict.fromkeys(("pcmu", "ulaw", "mulaw", "x-mulaw"), "PCMU"),
    **dict.fromkeys(("pcma", "alaw", "x-alaw"), "PCMA"),
    **dict.fromkeys(("g722", "x-g722"), "G722"),
    **dict.fromkeys(("l16", "x-l16", "pcm", "linear16"), "L16"),
}

# The first is the default. G.722's RTP clock says 8000 (RFC 3551 §4.5.2); its audio is 16 kHz whichever is written.
# SignalWire documents L16 at 16000 and 24000.
_RATES: Final = {
    "PCMU": (8000,),
    "PCMA": (8000,),
    "G722": (16000, 8000),
    "L16": (16000, 8000, 24000, 32000, 44100, 48000),
}

_MODIFIER: Final = re.compile(r"([0-9]{1,9})([hibc])", re.ASCII | re.IGNORECASE)
PTIMES: Final = range(10, 121)
"""Packet times a stream may have, in milliseconds."""


def _quoted(text: object) -> str:
    """The peer's text, escaped and cut, fit for a message."""
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _checked_rate(name: str, rate: int, where: str) -> int:
    if rate not in _RATES[name]:
        offered = ", ".join(str(each) for each in sorted(_RATES[name]))
        raise CodecError(f"{name} has {offered} Hz, got {_quoted(rate)}{where}")
    return 16000 if name == "G722" else rate


def _checked_ptime(rate: int, ptime: int, where: str) -> int:
    if ptime not in PTIMES:
        raise CodecError(f"expected a ptime from {PTIMES[0]} to {PTIMES[-1]} ms, got {ptime}{where}")
    if rate * ptime % 1000:
        raise CodecError(f"{ptime} ms at {rate} Hz is no whole number of samples{where}")
    return ptime


class CodecSpec(msgspec.Struct, frozen=True):
    """A codec with its rate and packet time, as ``L16@24000h@40i`` writes it.

    Attributes:
        name: ``PCMU``, ``PCMA``, ``G722`` or ``L16``.
        rate: Hz of the audio: 16000 for G722, whatever its declaration says.
        ptime: Milliseconds of audio a message carries.
    """

    name: str
    rate: int
    ptime: int = 20

    @classmethod
    def parse(cls, text: str) -> CodecSpec:
        """Read FreeSWITCH's ``NAME[@<rate>h][@<ptime>i][@<bitrate>b][@<channels>c]``.

        Modifiers come in any order; the name's case does not matter and any alias of it will do. Plain ``L16`` is at
        16000 Hz, the lower of the two rates that SignalWire documents; plain ``ptime`` is 20 ms.

        Raises:
            CodecError: Says what came and what is allowed.
        """
        where = f" in {_quoted(text)}"
        written, *modifiers = text.split("@")
        name = _ALIASES.get(written.lower())
        if name is None:
            raise CodecError(f"expected a codec of {', '.join(_RATES)}, got {_quoted(written)}{where}")
        values: dict[str, int] = {}
        for modifier in modifiers:
            match = _MODIFIER.fullmatch(modifier)
            if match is None:
                raise CodecError(
                    f"expected a modifier such as 8000h (rate), 20i (ptime), 64000b (bitrate) or 1c (channels), "
                    f"got {_quoted(modifier)}{where}"
                )
            unit = match[2].lower()
            if unit in values:
                raise CodecError(f"modifier {_quoted(modifier)} is the second of its kind{where}")
            values[unit] = int(match[1])
        rate = _checked_rate(name, values.get("h", _RATES[name][0]), where)
        spec = cls(name, rate, _checked_ptime(rate, values.get("i", 20), where))
        if values.get("c", 1) != 1:
            raise CodecError(f"expected 1 channel, got {values['c']}{where}")
        bitrate = 8 * spec.bytes_per_second
        if values.get("b", bitrate) != bitrate:
            raise CodecError(f"{name} at {rate} Hz has {bitrate} bit/s, got {values['b']}{where}")
        return spec

    @classmethod
    def from_media_format(cls, encoding: str, sample_rate: int, channels: int = 1) -> CodecSpec:
        """Read ``start.mediaFormat``, ignoring case, with or without ``audio/``.

        Args:
            encoding: Such as ``audio/x-mulaw``.
            sample_rate: Hz. G.722 may say 8000, its RTP clock, or 16000.
            channels: Only 1 can be used.

        Raises:
            CodecError: Says what came, escaped and cut short. An unknown encoding is never taken for another.
        """
        where = " in mediaFormat"
        name = _ALIASES.get(encoding.lower().removeprefix("audio/"))
        if name is None:
            known = ", ".join(sorted(_ALIASES))
            raise CodecError(f"expected an encoding of {known}, got {_quoted(encoding)}{where}")
        if channels != 1:
            raise CodecError(f"expected 1 channel, got {_quoted(channels)}{where}")
        return cls(name, _checked_rate(name, sample_rate, where))

    def __str__(self) -> str:
        # G.722 is written without a rate: platforms differ on whether it is 8000h or 16000h.
        rate = "" if self.name == "G722" else f"@{self.rate}h"
        return f"{self.name}{rate}@{self.ptime}i"

    def with_ptime(self, ptime: int) -> CodecSpec:
        """The same codec with another packet time in milliseconds.

        Raises:
            CodecError: It is out of range or no whole number of samples.
        """
        return CodecSpec(self.name, self.rate, _checked_ptime(self.rate, ptime, f" for {self}"))

    @property
    def bytes_per_second(self) -> int:
        """Octets of payload a second."""
        return 2 * self.rate if self.name == "L16" else 8000

    @property
    def frame_samples(self) -> int:
        """Samples in one packet time."""
        return self.rate * self.ptime // 1000

    def samples_in(self, nbytes: int) -> int:
        """Whole samples in that many octets of payload."""
        return nbytes * self.rate // self.bytes_per_second

    def decoder(self, byteorder: ByteOrder = "little") -> Decoder:
        """A decoder in its initial state.

        It takes 32 bytes for G.711 and L16 and 224 for G.722, so thousands may be made.

        Args:
            byteorder: Only L16 has one; RFC 3551 §4.5.11 says big, working code for this service uses little.
        """
        if self.name == "G722":
            return G722Decoder()
        if self.name == "L16":
            return AutoL16Decoder(self.rate) if byteorder == "auto" else L16Decoder(byteorder)
        return G711Decoder("PCMU" if self.name == "PCMU" else "PCMA")

    def encoder(self, byteorder: Literal["little", "big"] = "little") -> Encoder:
        """An encoder in its initial state, as large as the decoder; give it the decoder's ``byteorder``."""
        if self.name == "G722":
            return G722Encoder()
        if self.name == "L16":
            return L16Encoder(byteorder)
        return G711Encoder("PCMU" if self.name == "PCMU" else "PCMA")


class AutoL16Decoder:
    """L16 whose byte order is found by listening: read the wrong way round, audio is rough.

    For the first 200 ms that are not digital silence both readings' absolute first differences are summed and each
    payload is read in the order that is ahead, little on a tie. Then the order is fixed.
    """

    def __init__(self, rate: int) -> None:
        self._little = L16Decoder("little")
        self._roughness = [0, 0]  # of the little- and the big-endian reading
        self._last = np.zeros(1, np.int16)  # sample before the next payload, in little-endian reading
        self._samples_left = rate // 5  # to be listened to before the order is fixed

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """The order that payloads are read in now."""
        return "big" if self._roughness[1] < self._roughness[0] else "little"

    def decode(self, payload: bytes, /) -> Samples:
        """Decode one payload; see :class:`Decoder`."""
        samples = self._little.decode(payload)
        if self._samples_left > 0 and samples.any():
            run = np.concatenate((self._last, samples))
            self._last = samples[-1:].copy()
            for i, reading in enumerate((run, run.byteswap())):
                self._roughness[i] += int(np.abs(np.diff(reading.astype(np.int32))).sum())
            self._samples_left -= len(samples)
        return samples.byteswap() if self.byteorder == "big" else samples
