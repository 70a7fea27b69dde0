"""The workers' side of a pool: what is alike in every process in which an engine works."""

from __future__ import annotations

import abc
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

from streamsink.child import answer, be_nice

Message: TypeAlias = dict[str, Any]

NICE = 5
"""How much less than the endpoint's own a worker's share of a busy core is."""


class Worker(abc.ABC):
    """Decoders by number; each transcribes one utterance at a time. Every message gets one answer."""

    @abc.abstractmethod
    def load(self, number: int, message: Message) -> Message:
        """Load what all decoders need; the first message."""

    @abc.abstractmethod
    def begin(self, number: int, message: Message) -> Message:
        """Begin an utterance, whatever became of the last."""

    @abc.abstractmethod
    def audio(self, number: int, message: Message) -> Message:
        """Take ``audio``, int16; answer with the ``text`` so far when ``interim`` is true, else None."""

    @abc.abstractmethod
    def end(self, number: int, message: Message) -> Message:
        """End the utterance: its ``text``, ``words`` (word, start, end), ``confidence`` and perhaps ``language``."""

    def work(self) -> None:
        """Answer until there is nothing more to do; the calls go first where there are too few cores."""
        be_nice(NICE)
        answer(self.reply)

    def reply(self, message: Message) -> Iterator[Message]:
        """Answer a message with one: what was asked for, or ``error``."""
        began = time.process_time()
        try:
            said = getattr(self, message["do"])(message["decoder"], message)
        except Exception as error:
            # Its words only while no words of anybody's can be in them.
            said = {"error": str(error) if message["do"] == "load" else type(error).__name__}
        said["question"] = message["question"]
        said["busy"] = time.process_time() - began
        yield said
