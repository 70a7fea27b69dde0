"""The child process of `espeak`: the only place that loads eSpeak NG, which is under the GPL.

Names and numbers are those of its ``speak_lib.h``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import espeakng_loader

from streamsink.child import answer

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8_ENDPAUSE = 0x1001
_EE_OK = 0
_EVENT_LIST_TERMINATED, _EVENT_WORD = 0, 1
_BUFFER_MS = 200


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        # Characters, the first being 1.
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        # Of each language an octet of priority, its code and a zero; then a zero.
        ("languages", ctypes.c_void_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )

    def codes(self) -> Iterator[bytes]:
        at = self.languages
        while at and ctypes.string_at(at, 1) != b"\0":
            code = ctypes.string_at(at + 1)
            yield code
            at += len(code) + 2


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Espeak:
    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = (
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        )
        self._library.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        data = espeakng_loader.get_data_path()
        self._variants = Path(data) / "voices" / "!v"
        self.rate: int = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MS, data.encode(), _INITIALIZE_DONT_EXIT
        )
        self.pcm = bytearray()
        # For each word the sample it begins at and the number of characters before it.
        self.words: list[tuple[int, int]] = []
        # Kept: the library calls it as long as it lives.
        self._callback = _Callback(self._on_audio)
        self._library.espeak_SetSynthCallback(self._callback)

    def set_voice(self, voice: str) -> bool:
        language, plus, variant = voice.partition("+")
        # One that is missing would be passed over in silence.
        if plus and not (variant.isalnum() and (self._variants / variant).is_file()):
            return False
        return self._set_voice(voice.encode()) or self._set_voice(
            self._identifiers.get(language.lower().encode(), b"") + (plus + variant).encode()
        )

    def _set_voice(self, name: bytes) -> bool:
        status: int = self._library.espeak_SetVoiceByName(name)
        return bool(name) and status == _EE_OK

    @functools.cached_property
    def _identifiers(self) -> dict[bytes, bytes]:
        """Of each language's code the voice: not every code is the name of one, `en-gb` for example."""
        found: dict[bytes, bytes] = {}
        voices = self._library.espeak_ListVoices(None)
        index = 0
        while voices[index]:
            for code in voices[index].contents.codes():
                found.setdefault(code.lower(), voices[index].contents.identifier)
            index += 1
        return found

    def synthesize(self, text: str) -> bool:
        self.pcm.clear()
        self.words.clear()
        octets = text.encode() + b"\0"
        status: int = self._library.espeak_Synth(octets, len(octets), 0, 0, 0, _CHARS_UTF8_ENDPAUSE, None, None)
        return status == _EE_OK

    def _on_audio(self, wav: Any, count: int, events: Any) -> int:
        if wav and count:
            self.pcm += ctypes.string_at(wav, 2 * count)
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            if events[index].type == _EVENT_WORD:
                self.words.append((events[index].sample, events[index].text_position - 1))
            index += 1
        return 0


_espeak: _Espeak | None = None


def reply(message: Any) -> Iterator[object]:
    """Answer one message as `process` describes; a piece a word."""
    global _espeak
    text, voice = message
    if _espeak is None:
        _espeak = _Espeak()
    if not _espeak.set_voice(voice):
        yield (
            f"espeak has no voice {voice[:40]!r}; wanted a language such as en-us, en-gb, de or fr, "
            "with +f2 or another variant behind it if you like"
        )
        return
    if text and not _espeak.synthesize(text):
        yield "espeak failed to speak a text"
        return
    done = 0
    for sample, before in _espeak.words if text else ():
        # A number or a compound is several words to espeak: only one that begins behind a space ends another.
        if 2 * sample > done and text[before - 1 : before].isspace():
            yield [bytes(_espeak.pcm[done : 2 * sample]), _espeak.rate, before]
            done = 2 * sample
    if text:
        yield [bytes(_espeak.pcm[done:]), _espeak.rate, len(text)]
    yield None


if __name__ == "__main__":
    answer(reply)
