"""A Whisper model of random weights: it says nonsense, but the real package loads it and says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DEPTH, HEADS, LAYERS = 64, 4, 1


def make(folder: Path) -> None:
    """Write the files that CTranslate2's converter would; needs what faster-whisper itself needs."""
    from ctranslate2.specs import whisper_spec
    from faster_whisper.tokenizer import _LANGUAGE_CODES
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    languages = [f"<|{code}|>" for code in _LANGUAGE_CODES]
    special = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    special += [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))

    tokens = letters + special
    spec = whisper_spec.WhisperSpec(LAYERS, HEADS, LAYERS, HEADS)
    _fill(spec, len(tokens))
    spec.register_vocabulary(tokens)
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = [tokens.index("<|endoftext|>")]
    spec.config.lang_ids = [tokens.index(language) for language in languages]
    spec.config.alignment_heads = [(0, 0)]
    spec.validate()
    spec.optimize()
    spec.save(str(folder))


def _fill(spec: Any, vocabulary: int) -> None:
    random = np.random.default_rng(1)

    def weights(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.05).astype(np.float32)

    def linear(layer: Any, out: int, into: int) -> None:
        layer.weight, layer.bias = weights(out, into), weights(out)

    def norm(layer: Any) -> None:
        layer.gamma, layer.beta = np.ones(DEPTH, np.float32), np.zeros(DEPTH, np.float32)

    def attention(layer: Any, *out: int) -> None:
        norm(layer.layer_norm)
        for part, size in zip(layer.linear, out, strict=True):
            linear(part, size, DEPTH)

    def block(layer: Any) -> None:
        attention(layer.self_attention, 3 * DEPTH, DEPTH)
        norm(layer.ffn.layer_norm)
        linear(layer.ffn.linear_0, 4 * DEPTH, DEPTH)
        linear(layer.ffn.linear_1, DEPTH, 4 * DEPTH)

    encoder, decoder = spec.encoder, spec.decoder
    encoder.conv1.weight, encoder.conv1.bias = weights(DEPTH, 80, 3), weights(DEPTH)
    encoder.conv2.weight, encoder.conv2.bias = weights(DEPTH, DEPTH, 3), weights(DEPTH)
    encoder.position_encodings.encodings = weights(1500, DEPTH)
    decoder.position_encodings.encodings = weights(448, DEPTH)
    decoder.embeddings.weight = decoder.projection.weight = weights(vocabulary, DEPTH)
    for side in (encoder, decoder):
        norm(side.layer_norm)
        for layer in side.layer:
            block(layer)
    for layer in decoder.layer:
        attention(layer.attention, DEPTH, 2 * DEPTH, DEPTH)
