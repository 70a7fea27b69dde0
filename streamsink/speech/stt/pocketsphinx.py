"""PocketSphinx (extra ``speech``): the embedded engine, with a model of its own, in a few processes.

It needs no network and no download, hears American English, and is as good as its age: use it with a grammar or
keywords where you can.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
from pathlib import Path
from typing import Any

from streamsink.child import asked_once
from streamsink.errors import SpeechError
from streamsink.speech.stt.pool import Answer, PooledEngine, existing
from streamsink.speech.transcription import Capabilities, EngineOptions, Voice

RATE = 16_000
"""Hz; the model's."""
DECODERS = 4
"""A worker's; each of 90 MB, and made when so many people first talk at once. Two talkers on PCMU fill half a core."""
TELEPHONE_MEAN = "44.3,29.9,-35.0,49.0,-16.4,-2.9,21.4,-34.5,13.9,-5.5,-5.7,15.6,-13.1"
"""The cepstral mean a call of 8 kHz begins with: that of speech sent through PCMU. The model's own is of 16 kHz."""
WIDEBAND_MEAN = "52.8,-0.5,3.7,19.9,-6.1,7.2,-1.9,-9.5,-2.9,-5.1,7.1,-2.7,3.1"
"""Likewise for audio with more than 4 kHz of band."""

_TRY = 20.0
"""Seconds."""
# `ERROR: "jsgf.c", line 899: Failed …`, whose place is in PocketSphinx' own source.
_COMPLAINT = re.compile(r".*ERROR: \"[^\"]*\", line \d+: (.*\S)")


class Pocketsphinx(PooledEngine):
    """PocketSphinx in worker processes."""

    name = "pocketsphinx"
    package = ("pocketsphinx", "speech")
    worker = "streamsink.speech.stt.pocketsphinx_worker"
    decoders = DECODERS
    capabilities = Capabilities(rates=(RATE,), interim=True, words=True)

    def settings(self, options: EngineOptions) -> dict[str, Any]:
        """Check what PocketSphinx cannot do."""
        if options.grammar is not None and options.keywords:
            raise SpeechError("pocketsphinx takes a grammar or keywords, not both: drop one")
        if options.language is not None and options.model is None and options.language.lower() not in ("en", "en-us"):
            raise SpeechError(
                f"pocketsphinx comes with a model of en-US only, not {options.language}: give model=FOLDER, or take "
                "another engine"
            )
        self.language = options.language or "en-US"
        settings: dict[str, Any] = {"config": _config(options), "keywords": list(options.keywords)}
        if options.grammar is not None:
            settings["grammar"] = str(existing(options.grammar, "grammar"))
        for keyword in options.keywords:
            _check_keyword(keyword)
        return settings

    def check(self) -> None:
        """Have a process try the grammar or the keywords, once: what is wrong with them is told at the start.

        Raises:
            SpeechError: They cannot be used.
        """
        if self._options.grammar is not None or self._options.keywords:
            _try(self._settings)

    def begin(self, voice: Voice) -> dict[str, Any]:
        """Begin with the cepstral mean of the track so far: decoders change from utterance to utterance."""
        mean = voice.memory.get("cepstral mean")
        if mean is None:
            mean = TELEPHONE_MEAN if voice.call_rate <= 8000 else WIDEBAND_MEAN
        return {"mean": mean}

    def ended(self, voice: Voice, answer: Answer) -> None:
        """Keep the track's cepstral mean."""
        voice.memory["cepstral mean"] = answer["mean"]


def _config(options: EngineOptions) -> dict[str, Any]:
    # The second pass would cost as much as the first, after the talker has stopped. The bounds on what is searched for
    # halve the work and cost no word.
    config: dict[str, Any] = {"fwdflat": False, "maxhmmpf": 3000, "maxwpf": 20}
    if options.model is not None:
        folder = existing(Path(options.model), "model")
        dictionary = next(folder.glob("*.dict"), None)
        language = next((path for ending in ("*.lm.bin", "*.lm") for path in folder.glob(ending)), None)
        acoustic = next((path.parent for path in folder.rglob("mdef")), None)
        if dictionary is None or language is None or acoustic is None:
            raise SpeechError(
                f"{folder} is no model of PocketSphinx: wanted a folder with *.dict, *.lm.bin and one with mdef in it"
            )
        config |= {"hmm": str(acoustic), "lm": str(language), "dict": str(dictionary)}
    return config


@functools.cache
def _try(settings: str) -> None:
    """Load what a worker would.

    Raises:
        SpeechError: It cannot be loaded.
    """
    load = {"do": "load", "decoder": 0, "question": 0}
    try:
        answer, complaints = asked_once(Pocketsphinx.worker, settings, load, timeout=_TRY)
    except (OSError, subprocess.SubprocessError):
        # No verdict on what was given: the first call's worker has one.
        return
    if "error" in answer:
        told = [found[1] for found in map(_COMPLAINT.match, complaints.splitlines()) if found is not None]
        cause = "; ".join(told) or answer["error"]
        raise SpeechError(f"pocketsphinx cannot use this grammar or these keywords: {cause}")


def _check_keyword(keyword: str) -> None:
    phrase, slash, threshold = keyword.partition("/")
    with contextlib.suppress(ValueError):
        if phrase.strip() and (not slash or 0 < float(threshold) <= 1):
            return
    raise SpeechError(f"{keyword!r} is no keyword: write the words, or words/threshold such as yes/1e-10")
