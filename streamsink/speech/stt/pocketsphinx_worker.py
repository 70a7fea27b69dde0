"""The process in which PocketSphinx works: it holds the GIL while it decodes, which stalls an event loop for 267 ms.

Run as ``python -m streamsink.speech.stt.pocketsphinx_worker OPTIONS``, a JSON object. Every message gets one answer.
"""

from __future__ import annotations

import re
import sys
import tempfile
from typing import Any

import msgspec
from pocketsphinx import Decoder, set_loglevel

from streamsink.speech.stt.worker import Message, Worker

FRAMES_A_SECOND = 100
"""Of PocketSphinx' features: what its segments count in."""
BEFOREHAND = 2
"""Decoders: talkers who are planned on."""
KEYWORD_THRESHOLD = 1e-20
"""How likely a keyword must be against any other sound, where its user does not say."""

_FILLER = re.compile(r"<.*>|\[.*\]|\+\+.*\+\+|\(NULL\)")
_VARIANT = re.compile(r"\(\d+\)$")


class Options(msgspec.Struct):
    """How the decoders are made; ``config`` is PocketSphinx' own."""

    config: dict[str, Any]
    grammar: str | None = None
    keywords: list[str] = []


class Decoders(Worker):
    """PocketSphinx' decoders."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._decoders: dict[int, Any] = {}
        self._open: set[int] = set()

    def load(self, number: int, message: Message) -> Message:
        """Make the decoders that are made beforehand: it takes 0.4 s, in which nobody's words are heard."""
        for each in range(BEFOREHAND):
            self._decoders[each] = self._make()
        return {}

    def begin(self, number: int, message: Message) -> Message:
        """Begin an utterance with this cepstral mean."""
        if number not in self._decoders:
            self._decoders[number] = self._make()
        decoder = self._decoders[number]
        if number in self._open:
            decoder.end_utt()
        if message["mean"] is not None:
            decoder.set_cmn(message["mean"])
        decoder.start_utt()
        self._open.add(number)
        return {}

    def audio(self, number: int, message: Message) -> Message:
        """Take audio, and tell the words so far when they are wanted."""
        decoder = self._decoders[number]
        decoder.process_raw(message["audio"])
        return {"text": self._text(decoder) if message["interim"] else None}

    def end(self, number: int, message: Message) -> Message:
        """End the utterance and tell all about it."""
        decoder = self._decoders[number]
        self._open.discard(number)
        decoder.end_utt()
        return {
            "text": self._text(decoder),
            "words": self._words(decoder),
            "confidence": self._confidence(decoder),
            "mean": decoder.get_cmn(True),
        }

    def _make(self) -> Any:
        options = self._options
        # Standard error tells what is wrong with a grammar, and later nothing.
        config = options.config | {"loglevel": "ERROR"}
        try:
            if options.keywords:
                return self._keyword_spotter(config)
            if options.grammar is not None:
                config |= {"jsgf": options.grammar, "lm": None}
            return Decoder(**config)
        finally:
            set_loglevel("FATAL")

    def _keyword_spotter(self, config: dict[str, Any]) -> Any:
        with tempfile.NamedTemporaryFile("w", suffix=".kws", encoding="utf-8") as phrases:
            lines = [keyword_line(keyword) for keyword in self._options.keywords]
            phrases.writelines(f"{line}\n" for line in lines)
            phrases.flush()
            decoder = Decoder(**config | {"kws": phrases.name, "lm": None})
        # It would only leave them out.
        for word in " ".join(line.partition(" /")[0] for line in lines).split():
            if decoder.lookup_word(word) is None:
                raise ValueError(f"the dictionary has no {word!r}")
        return decoder

    def _text(self, decoder: Any) -> str:
        hypothesis = decoder.hyp()
        if hypothesis is None:
            return ""
        if self._options.keywords:
            # A keyword search lists the newest first.
            return " ".join(word for word, _, _ in self._words(decoder))
        return " ".join(_VARIANT.sub("", word) for word in hypothesis.hypstr.split() if not _FILLER.fullmatch(word))

    def _words(self, decoder: Any) -> list[tuple[str, float, float]]:
        words = [
            (_VARIANT.sub("", s.word).strip(), s.start_frame / FRAMES_A_SECOND, (s.end_frame + 1) / FRAMES_A_SECOND)
            for s in decoder.seg() or ()
            if not _FILLER.fullmatch(s.word)
        ]
        return sorted(words, key=lambda word: word[1])

    def _confidence(self, decoder: Any) -> float | None:
        hypothesis = decoder.hyp()
        if hypothesis is None or self._options.grammar is not None or self._options.keywords:
            # Only the search with a language model computes one.
            return None
        # It is the whole utterance's, which falls with every word.
        words = max(1, len(self._words(decoder)))
        probability: float = min(1.0, max(0.0, float(hypothesis.prob))) ** (1 / words)
        return round(probability, 3)


def keyword_line(keyword: str) -> str:
    """Write a keyword as PocketSphinx' lists have it: ``yes`` or ``yes/1e-10`` with a threshold of its own."""
    phrase, _, threshold = keyword.partition("/")
    return f"{phrase.strip().lower()} /{float(threshold or KEYWORD_THRESHOLD):g}/"


def main() -> None:
    """Answer until there is nothing more to do."""
    options = msgspec.json.decode(sys.argv[1], type=Options)
    Decoders(options).work()


if __name__ == "__main__":
    main()
