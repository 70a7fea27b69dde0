"""The process in which Vosk works: it lets go of the GIL, but Kaldi ends its process when it does not like something.

Run as ``python -m streamsink.speech.stt.vosk_worker OPTIONS``, a JSON object.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import vosk

from streamsink.speech.stt.worker import Message, Worker

RATE = 16_000


class Options(msgspec.Struct):
    """The model's folder, and the phrases that are all it shall recognise, if any."""

    model: str
    keywords: list[str] = []


class _Word(msgspec.Struct):
    word: str
    start: float
    end: float
    conf: float


class _Result(msgspec.Struct):
    """A final result; an empty one has no words."""

    text: str = ""
    result: list[_Word] = []


class _Partial(msgspec.Struct):
    partial: str = ""


_decode = msgspec.json.Decoder(_Result).decode
_decode_partial = msgspec.json.Decoder(_Partial).decode


class Recognizers(Worker):
    """One model, and for each utterance a recognizer of its own: one that is used again counts its time on."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._recognizers: dict[int, Any] = {}
        # What was recognised before a pause in the utterance.
        self._before: dict[int, list[_Result]] = {}

    def load(self, number: int, message: Message) -> Message:
        """Load the model."""
        vosk.SetLogLevel(-1)
        # By its path: by a name, Vosk would download it.
        self._model = vosk.Model(model_path=self._options.model)
        return {}

    def begin(self, number: int, message: Message) -> Message:
        """Begin with a new recognizer."""
        phrases = self._options.keywords
        # What is none of the phrases shall not be taken for one.
        grammar = [msgspec.json.encode([*phrases, "[unk]"]).decode()] if phrases else []
        self._recognizers[number] = vosk.KaldiRecognizer(self._model, RATE, *grammar)
        self._recognizers[number].SetWords(True)
        self._before[number] = []
        return {}

    def audio(self, number: int, message: Message) -> Message:
        """Take audio."""
        recognizer, before = self._recognizers[number], self._before[number]
        if recognizer.AcceptWaveform(message["audio"]):
            before.append(_decode(recognizer.Result()))
        if not message["interim"]:
            return {"text": None}
        return {"text": _text(*(part.text for part in before), _decode_partial(recognizer.PartialResult()).partial)}

    def end(self, number: int, message: Message) -> Message:
        """Recognise the rest."""
        parts = [*self._before.pop(number), _decode(self._recognizers.pop(number).FinalResult())]
        words = [word for part in parts for word in part.result if word.word != "[unk]"]
        return {
            "text": _text(*(part.text for part in parts)),
            "words": [(word.word, word.start, word.end) for word in words],
            "confidence": round(sum(word.conf for word in words) / len(words), 3) if words else None,
        }


def _text(*parts: str) -> str:
    return " ".join(word for part in parts for word in part.split() if word != "[unk]")


def main() -> None:
    """Work until there is nothing more to do."""
    Recognizers(msgspec.json.decode(sys.argv[1], type=Options)).work()


if __name__ == "__main__":
    main()
