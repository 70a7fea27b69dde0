"""sherpa-onnx, Vosk and faster-whisper in their worker processes.

Models are too large to be in the tests. What stands in for each package (`tests/stand_ins`) has its API, which is held
against the package itself where that is installed; the worker processes, the pool and the way there are real.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamsink.audio import Samples
from streamsink.errors import SpeechError
from streamsink.speech.events import EngineError, Transcript
from streamsink.speech.stt.sherpa_onnx import words_of
from streamsink.speech.stt.worker import Worker
from streamsink.speech.transcription import Engine, EngineOptions, Event, Voice, find_engine
from tests.vendors import say, silence

ROOT = Path(__file__).parent.parent
STAND_INS = Path(__file__).parent / "stand_ins"

FILES = {
    "sherpa-onnx": ("tokens.txt", "encoder.onnx", "decoder.onnx", "joiner.onnx"),
    "vosk": ("am/final.mdl",),
    "faster-whisper": ("model.bin", "config.json", "tokenizer.json"),
}
PACKAGES = {"sherpa-onnx": "sherpa_onnx", "vosk": "vosk", "faster-whisper": "faster_whisper"}
ENGINES = sorted(FILES)

MakeModel = Callable[..., str]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_INS), str(ROOT), *sys.path]))


@pytest.fixture
def model(tmp_path: Path) -> MakeModel:
    def make(*files: str, name: str = "model") -> str:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        return str(tmp_path / name)

    return make


@asynccontextmanager
async def started(name: str, **options: Any) -> AsyncIterator[Engine]:
    engine = find_engine(name, EngineOptions(workers=1, **options))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def transcribed(engine: Engine, *parts: Samples) -> list[Event]:
    voice = Voice("linear16", 16000, 8000)
    opened = engine.open(voice)
    for part in parts:
        for start in range(0, len(part), 320):
            opened.push(part[start : start + 320].tobytes())
    opened.finish()
    return [event async for event in opened]


def final(events: list[Event]) -> Transcript:
    (last,) = [event for event in events if isinstance(event, Transcript) and event.final]
    return last


@pytest.mark.parametrize("name", ENGINES)
async def test_an_utterance_becomes_words_with_times(name: str, model: MakeModel) -> None:
    async with started(name, model=model(*FILES[name]), language="en-US") as engine:
        events = await transcribed(engine, silence(0.3, 16000), say("one", "two", rate=16000))
    last = final(events)
    assert last.text == "one two"
    assert [word.word for word in last.words] == ["one", "two"]
    assert [word.start for word in last.words] == pytest.approx([0.3, 0.6], abs=0.03)
    assert [word.end for word in last.words] == pytest.approx([0.5, 0.8], abs=0.21)
    assert (last.start, last.end) == (last.words[0].start, last.words[-1].end)
    assert last.confidence == pytest.approx({"sherpa-onnx": 0.779, "vosk": 0.5, "faster-whisper": 0.5}[name])
    assert last.language == {"faster-whisper": "en"}.get(name, "en-US")


@pytest.mark.parametrize("name", ["sherpa-onnx", "vosk"])
async def test_streaming_engines_tell_words_while_they_are_spoken(name: str, model: MakeModel) -> None:
    async with started(name, model=model(*FILES[name])) as engine:
        assert engine.capabilities.interim
        # As it comes, so that nothing waits: interims are only told of what does not lag behind.
        opened = engine.open(Voice("linear16", 16000, 8000))
        events = aiter(opened)
        opened.push(say("one", "two", "three", rate=16000).tobytes())
        first = await anext(events)
        await opened.close()
    assert isinstance(first, Transcript)
    assert not first.final
    assert first.text.startswith("one")


async def test_whisper_tells_nothing_before_the_end(model: MakeModel) -> None:
    async with started("faster-whisper", model=model(*FILES["faster-whisper"])) as engine:
        assert not engine.capabilities.interim
        events = await transcribed(engine, say("one", "two", "three", "four", "five", rate=16000))
    assert [getattr(event, "text", None) for event in events] == ["one two three four five"]


async def test_noise_has_no_words(model: MakeModel) -> None:
    for name in ENGINES:
        async with started(name, model=model(*FILES[name], name=name)) as engine:
            last = final(await transcribed(engine, silence(0.5, 16000)))
        assert (last.text, last.words, last.confidence) == ("", (), None)


async def test_each_utterance_counts_its_time_from_its_start(model: MakeModel) -> None:
    for name in ENGINES:
        async with started(name, model=model(*FILES[name], name=name)) as engine:
            for _ in range(2):
                last = final(await transcribed(engine, silence(0.3, 16000), say("four", rate=16000)))
                assert last.start == pytest.approx(0.3, abs=0.03)


async def test_a_pause_that_vosk_takes_for_an_end_is_none(model: MakeModel) -> None:
    async with started("vosk", model=model("am/final.mdl")) as engine:
        parts = (say("one", rate=16000), silence(0.7, 16000), say("two", rate=16000))
        last = final(await transcribed(engine, *parts))
    assert last.text == "one two"
    assert [word.start for word in last.words] == pytest.approx([0.0, 1.0], abs=0.03)


async def test_vosk_listens_for_keywords_alone(model: MakeModel) -> None:
    async with started("vosk", model=model("final.mdl"), keywords=("two", "six")) as engine:
        last = final(await transcribed(engine, say("one", "two", "three", rate=16000)))
    assert (last.text, [word.word for word in last.words]) == ("two", ["two"])


async def test_whisper_is_told_what_to_expect(model: MakeModel) -> None:
    options = {"keywords": ("Signal", "Wire"), "language": "de-AT"}
    async with started("faster-whisper", model=model(*FILES["faster-whisper"]), **options) as engine:
        last = final(await transcribed(engine, say("one", rate=16000)))
    assert (last.text, last.language) == ("Signal Wire", "de")


@pytest.mark.parametrize(
    ("files", "name", "kind"),
    [
        (("encoder.int8.onnx", "decoder.onnx", "joiner.int8.onnx", "encoder.onnx"), "zipformer", "transducer"),
        (("encoder.onnx", "decoder.onnx"), "paraformer", "paraformer"),
        (("ctc-epoch-20.int8.onnx", "ctc-epoch-20.onnx"), "zipformer-ctc", "zipformer2_ctc"),
        (("model.onnx",), "NeMo-streaming", "nemo_ctc"),
    ],
)
async def test_what_lies_in_the_folder_says_what_model_it_is(
    files: tuple[str, ...], name: str, kind: str, model: MakeModel
) -> None:
    folder = model("tokens.txt", *files, name=name)
    engine = find_engine("sherpa-onnx", EngineOptions(model=folder))
    settings = engine.settings(EngineOptions(model=folder))  # type: ignore[attr-defined]
    assert settings["kind"] == kind
    # Of two of a kind, the small one.
    small = [file for file in files if "int8" in file]
    assert {Path(file).name for file in settings["files"].values()} >= set(small)
    async with started("sherpa-onnx", model=folder) as running:
        assert final(await transcribed(running, say("seven", rate=16000))).text == "seven"


def test_tokens_become_words() -> None:
    tokens, starts = ["▁HE", "LLO", "▁WORLD", "▁"], [0.0, 0.1, 0.4, 2.0]
    assert words_of(tokens, starts) == [("HELLO", 0.0, 0.4), ("WORLD", 0.4, 0.7)]
    assert words_of(["ni", "hao"], [0.5, 0.75]) == [("nihao", 0.5, 1.05)]
    assert words_of([], []) == []


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_package_names_the_line_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(SpeechError) as caught:
        find_engine(name, EngineOptions(model="x"))
    assert str(caught.value) == f"the engine `{name}` is not installed: pip install 'streamsink[{name}]'"


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_model_says_where_there_are_some(name: str) -> None:
    with pytest.raises(
        SpeechError, match=f"{name} has no model of its own: unpack one from https://.* and give model="
    ):
        find_engine(name, EngineOptions())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "there is no model .*/nowhere: give a path that exists"),
        ("model/a-file", "a-file is no folder: give the one the model's files are in"),
        ("model", "model is no model of"),
    ],
)
def test_a_wrong_path_says_what_is_wrong(name: str, where: str, message: str, model: MakeModel) -> None:
    folder = Path(model("a-file")).parent
    with pytest.raises(SpeechError, match=message):
        find_engine(name, EngineOptions(model=str(folder / where)))


def test_a_model_that_is_not_streaming_is_told(model: MakeModel) -> None:
    with pytest.raises(SpeechError, match="no streaming model of sherpa-onnx: wanted"):
        find_engine("sherpa-onnx", EngineOptions(model=model("tokens.txt", "encoder.onnx")))


def test_whisper_without_its_tokenizer_would_download_one(model: MakeModel) -> None:
    with pytest.raises(SpeechError, match=r"it has no tokenizer\.json"):
        find_engine("faster-whisper", EngineOptions(model=model("model.bin", "config.json")))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sherpa-onnx", {"keywords": ("x",)}, "sherpa-onnx takes neither a grammar nor keywords"),
        ("vosk", {"grammar": Path("g")}, "vosk takes no JSGF grammar: give its phrases as keywords"),
        ("faster-whisper", {"grammar": Path("g")}, "faster-whisper takes no grammar: give keywords"),
        ("vosk", {"url": "ws://x"}, "vosk works in this machine: drop `url`"),
    ],
)
def test_what_it_cannot_do_is_said_at_the_start(
    name: str, options: dict[str, Any], message: str, model: MakeModel
) -> None:
    with pytest.raises(SpeechError, match=message):
        find_engine(name, EngineOptions(model=model(*FILES[name]), **options))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sherpa-onnx", "sherpa-onnx does not start: the process of .*sherpa_onnx_worker ended with status 255"),
        ("vosk", r"vosk cannot load what it was given \(Failed to create a model\)"),
        ("faster-whisper", r"faster-whisper cannot load what it was given \(File model.bin is incomplete\)"),
    ],
)
async def test_a_broken_model_is_one_sentence_at_the_start(name: str, message: str, model: MakeModel) -> None:
    folder = model(*FILES[name], name="broken")
    if name == "sherpa-onnx":
        (Path(folder) / "encoder.onnx").write_text("broken")
    with pytest.raises(SpeechError, match=message):
        async with started(name, model=folder):
            pass


async def test_an_utterance_that_kills_its_worker_is_lost_alone(model: MakeModel) -> None:
    deadly = silence(0.5, 16000)
    deadly[:] = 1
    async with started("vosk", model=model("am/final.mdl")) as engine:
        events = await transcribed(engine, deadly)
        assert events == [EngineError("two workers died of the same utterance, or at the same time", recoverable=False)]
        assert final(await transcribed(engine, say("five", rate=16000))).text == "five"


# --- The workers' own code, in this process ---------------------------------------------------------------------------


@pytest.fixture
def worker_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a worker's module on top of a stand-in, and forgets both afterwards."""
    before = dict(sys.modules)
    # The worker sets it.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def load(name: str) -> Any:
        package = PACKAGES[name]
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            del sys.modules[module]
        return importlib.import_module(f"streamsink.speech.stt.{package}_worker")

    yield load
    for module in set(sys.modules) - set(before):
        if module.partition(".")[0] in PACKAGES.values() or module.endswith("_worker"):
            del sys.modules[module]
    sys.modules.update(before)


@pytest.mark.parametrize("name", ENGINES)
def test_a_worker_answers_every_message_once(
    name: str, worker_module: Callable[[str], Any], model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = worker_module(name)
    options = EngineOptions(model=model(*FILES[name]))
    settings = json.dumps(find_engine(name, options).settings(options))  # type: ignore[attr-defined]
    working: list[Worker] = []
    monkeypatch.setattr(Worker, "work", lambda worker: working.append(worker))
    monkeypatch.setattr(sys, "argv", ["worker", settings])
    module.main()
    (worker,) = working

    def ask(do: str, number: int = 3, **more: Any) -> dict[str, Any]:
        (answer,) = worker.reply({"do": do, "decoder": number, "question": 7, **more})
        assert answer["question"] == 7
        assert answer["busy"] >= 0
        return answer

    assert "error" not in ask("load", 0)
    for _ in range(2):
        assert "error" not in ask("begin")
        spoken = say("one", "two", rate=16000).tobytes()
        interim = ask("audio", audio=spoken, interim=True)["text"]
        assert interim == {"sherpa-onnx": "one", "vosk": "one two", "faster-whisper": None}[name]
        assert ask("audio", audio=silence(0.6, 16000).tobytes(), interim=False)["text"] is None
        told = ask("end")
        assert told["text"] == "one two"
        assert [word for word, _, _ in told["words"]] == ["one", "two"]
        msgspec.msgpack.encode(told)
    # What raises is named and not quoted: it might quote what was said.
    assert ask("end")["error"] == "KeyError"


# --- The stand-ins against what they stand for -----------------------------------------------------------------------


SIGNATURES = """
import importlib, inspect, json, sys
package, paths = sys.argv[1], json.loads(sys.argv[2])
try:
    found = importlib.import_module(package)
except ModuleNotFoundError:
    sys.exit(3)
signatures = []
for path in paths:
    value = found
    for part in path:
        value = getattr(value, part)
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        # Written in C: that it is there has to do.
        signatures.append(None)
        continue
    anything = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    signatures.append(None if anything else [parameter.name for parameter in parameters])
print(json.dumps(signatures))
"""


@pytest.mark.parametrize("name", ENGINES)
def test_the_stand_in_has_the_packages_api(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = PACKAGES[name]
    spec = importlib.util.spec_from_file_location("stand_in", STAND_INS / f"{package}.py")
    assert spec is not None
    assert spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    functions = functions_of(stand_in)
    monkeypatch.delenv("PYTHONPATH")
    asked = json.dumps([path for path, _ in functions])
    answered = subprocess.run(
        [sys.executable, "-c", SIGNATURES, package, asked], capture_output=True, text=True, check=False
    )
    if answered.returncode == 3:
        pytest.skip(f"{package} is not installed: its API is what the stand-in is held against")
    assert answered.returncode == 0, answered.stderr
    for (path, function), known in zip(functions, json.loads(answered.stdout.splitlines()[-1]), strict=True):
        assert known is None or set(inspect.signature(function).parameters) <= set(known), path


def functions_of(module: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Functions and methods that a stand-in defines, by where they are found in it."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == "stand_in":
            found.append(((name,), value))
        elif inspect.isclass(value) and value.__module__ == "stand_in" and not hasattr(value, "_fields"):
            found += [
                ((name, method), getattr(value, method))
                for method, defined in vars(value).items()
                if (not method.startswith("_") or method == "__init__") and callable(getattr(value, method))
                # What the package only returns is made by nobody else.
                if not (method == "__init__" and name in ("OnlineStream", "OnlineRecognizerResult"))
            ]
    return found
