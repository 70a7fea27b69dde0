"""sherpa-onnx (extra ``sherpa-onnx``): streaming models of one's own choice, https://k2-fsa.github.io/sherpa/onnx/.

What lies in the model's folder says what it is: ``tokens.txt`` and

    encoder*.onnx decoder*.onnx joiner*.onnx    a transducer, such as Zipformer
    encoder*.onnx decoder*.onnx                 Paraformer
    one other *.onnx                            CTC: of NeMo where the folder's name has ``nemo`` in it, else Zipformer

Of two of a kind, the one with ``int8`` in its name is taken: it is what a processor is quick with.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from streamsink.errors import SpeechError
from streamsink.speech.stt.pool import PooledEngine, model_folder
from streamsink.speech.transcription import Capabilities, EngineOptions

MODELS = "https://github.com/k2-fsa/sherpa-onnx/releases/tag/asr-models"
LONGEST_TOKEN = 0.3
"""Seconds; models tell where a token begins, so this is where the last of a word is taken to end."""
_PARTS = ("encoder", "decoder", "joiner")


class SherpaOnnx(PooledEngine):
    """Streaming models in worker processes; words come while they are spoken."""

    name = "sherpa-onnx"
    package = ("sherpa_onnx", "sherpa-onnx")
    worker = "streamsink.speech.stt.sherpa_onnx_worker"
    decoders = 8
    capabilities = Capabilities(rates=(16_000,), interim=True, words=True)

    def settings(self, options: EngineOptions) -> dict[str, Any]:
        """Check that the folder holds a streaming model."""
        if options.grammar is not None or options.keywords:
            raise SpeechError("sherpa-onnx takes neither a grammar nor keywords: leave them out")
        return _model(model_folder(self.name, options, MODELS))


def _model(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("*.onnx"), key=lambda path: ("int8" not in path.name, path.name))
    parts = {part: next((str(path) for path in found if path.name.startswith(part)), None) for part in _PARTS}
    files = {part: path for part, path in parts.items() if path is not None}
    if not (folder / "tokens.txt").is_file():
        raise SpeechError(f"{folder} is no model of sherpa-onnx: it has no tokens.txt")
    if set(files) == set(_PARTS):
        kind = "transducer"
    elif set(files) == {"encoder", "decoder"}:
        kind = "paraformer"
    elif found and not files:
        kind = "nemo_ctc" if "nemo" in folder.name.lower() else "zipformer2_ctc"
        files = {"model": str(found[0])}
    else:
        raise SpeechError(
            f"{folder} is no streaming model of sherpa-onnx: wanted encoder*, decoder* and joiner*.onnx, encoder* and "
            "decoder*.onnx, or one other *.onnx"
        )
    return {"kind": kind, "files": {"tokens": str(folder / "tokens.txt"), **files}}


def words_of(tokens: list[str], starts: list[float]) -> list[tuple[str, float, float]]:
    """Put tokens together to words: each that begins with a space (or ``▁``) begins one."""
    words: list[tuple[str, float, float]] = []
    for token, start, after in itertools.zip_longest(tokens, starts, starts[1:], fillvalue=math.inf):
        end = min(float(after), float(start) + LONGEST_TOKEN)
        text = str(token).replace("▁", " ")
        if words and not text.startswith(" "):
            word, began, _ = words[-1]
            words[-1] = word + text, began, end
        else:
            words.append((text.strip(), float(start), end))
    return [word for word in words if word[0]]
