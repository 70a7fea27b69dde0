"""Makes the model beside it: a streaming CTC model in 4 kB that knows the words of `tests.vendors`.

Run as `python -m tests.tones_nemo.make` where the package `onnx` is installed. A word is a tone, and each tone is
loudest in a mel band of its own; so a word's score is the level of its band, averaged over four frames of 10 ms, and
the blank's is a constant between tone and silence. What it takes and gives, the caches among it, is what sherpa-onnx
wants of NeMo's streaming models:
https://github.com/k2-fsa/sherpa-onnx/blob/master/sherpa-onnx/csrc/online-nemo-ctc-model.cc.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.vendors import WORDS

BANDS = (10, 15, 20, 26, 31, 35, 38, 42)
"""Mel bands of 400, 600 … 1800 Hz, of 80."""
BLANK = -8.0
"""Between the level of a tone and that of silence, as logarithms."""
FRAMES, AVERAGED = 32, 4
CACHES = ("cache_last_channel", "cache_last_time", "cache_last_channel_len")


def model() -> onnx.ModelProto:
    words = len(WORDS)
    weights = np.zeros((80, words + 1), np.float32)
    weights[BANDS, range(words)] = 1
    bias = np.zeros(words + 1, np.float32)
    bias[words] = BLANK
    constants = {
        "weights": weights,
        "bias": bias,
        "shape": np.array([1, -1, AVERAGED, 80], np.int64),
        "averaged": np.array([AVERAGED], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Transpose", ["audio_signal"], ["frames"], perm=[0, 2, 1]),
        node("Reshape", ["frames", "shape"], ["groups"]),
        node("ReduceMean", ["groups"], ["levels"], axes=[2], keepdims=0),
        node("MatMul", ["levels", "weights"], ["scores"]),
        node("Add", ["scores", "bias"], ["logits"]),
        node("LogSoftmax", ["logits"], ["logprobs"], axis=-1),
        node("Div", ["length", "averaged"], ["encoded_lengths"]),
        *(node("Identity", [name], [f"{name}_next"]) for name in CACHES),
    ]
    real, whole = TensorProto.FLOAT, TensorProto.INT64
    value = helper.make_tensor_value_info
    shapes = {name: (whole, [1]) if name.endswith("len") else (real, [1, 1, 1, 1]) for name in CACHES}
    inputs = [value("audio_signal", real, [1, 80, "frames"]), value("length", whole, [1])]
    inputs += [value(name, *shape) for name, shape in shapes.items()]
    outputs = [value("logprobs", real, [1, "groups", words + 1]), value("encoded_lengths", whole, [1])]
    outputs += [value(f"{name}_next", *shape) for name, shape in shapes.items()]
    initial = [numpy_helper.from_array(constant, name) for name, constant in constants.items()]
    graph = helper.make_graph(nodes, "tones", inputs, outputs, initial)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    facts = {"window_size": FRAMES, "chunk_shift": FRAMES, "subsampling_factor": AVERAGED, "vocab_size": words}
    facts |= {f"cache_last_{what}_dim{number}": 1 for what in ("channel", "time") for number in (1, 2, 3)}
    helper.set_model_props(made, {**{key: str(fact) for key, fact in facts.items()}, "normalize_type": ""})
    onnx.checker.check_model(made)
    return made


if __name__ == "__main__":
    folder = Path(__file__).parent
    onnx.save(model(), folder / "model.onnx")
    lines = [f"▁{word} {number}" for number, word in enumerate(WORDS)]
    (folder / "tokens.txt").write_text("\n".join([*lines, f"<blk> {len(WORDS)}"]) + "\n", encoding="utf-8")
