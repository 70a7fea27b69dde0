"""Every code block of the README is run, or is the file it claims to be."""

import ast
import asyncio
import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from streamsink.config import load
from streamsink.plugins import find
from streamsink.testing import run_processor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:<!-- (\w+): (\S+) -->\n)?```(\w*)\n(.*?)```", README, re.DOTALL)


def block(name: str) -> str:
    (text,) = [text for kind, what, _, text in BLOCKS if (kind, what) == ("test", name)]
    return str(text)


def test_every_block_is_run_or_shown() -> None:
    """A block that is neither a file, nor tested here, nor a command or its output, is one nobody checks."""
    unchecked = [text for kind, _, language, text in BLOCKS if language not in ("sh", "") and not kind]
    assert unchecked == []
    tested = {what for kind, what, _, _ in BLOCKS if kind == "test"}
    assert tested == {"join_conference", "run_processor", "settings", "speech", "verify", "rooms"}


@pytest.mark.parametrize(("path", "text"), [(what, text) for kind, what, _, text in BLOCKS if kind == "file"])
def test_a_file_is_shown_as_it_is(path: str, text: str) -> None:
    assert (ROOT / path).read_text() == text


def test_the_processor_has_fifteen_lines() -> None:
    lines = [line for line in (ROOT / "examples/answer.py").read_text().splitlines() if line.strip()]
    # The docstring is not counted.
    assert len(lines) - 1 <= 15


def test_the_stream_object_is_taken_by_the_sdk() -> None:
    from unittest.mock import AsyncMock

    namespace: dict[str, Any] = {}
    exec(compile(block("join_conference"), "README.md", "exec"), namespace)
    call = AsyncMock()
    asyncio.run(namespace["answered"](call))
    call.join_conference.assert_awaited_once_with(
        "standup",
        stream_obj={
            "url": "wss://streams.example.com/",
            "codec": "L16@24000h@40i",
            "realtime": True,
            "authorization_bearer_token": "the token that the endpoint showed",
            "custom_parameters": {"team": "sales"},
        },
    )


def test_the_processors_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    namespace: dict[str, Any] = {}
    exec(compile(block("run_processor"), "README.md", "exec"), namespace)
    try:
        asyncio.run(namespace["test_it_answers"]())
    finally:
        sys.modules.pop("answer")


def test_the_settings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "streamsink.toml"
    file.write_text(block("settings"))
    settings = load(config=file)
    assert set(settings.pipelines) == {"default", "agent"}
    assert settings.pipelines["default"].talk_back is False
    assert [find(spec).name for spec in settings.pipelines["agent"].processors] == ["record", "Answer"]
    assert settings.public_url == "wss://streams.example.com/"


def test_the_speech_settings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "streamsink.toml"
    file.write_text(block("speech"))
    speech = load(config=file).speech
    assert (speech.synthesizer, speech.voice) == ("command", "slt")
    assert speech.command is not None
    assert speech.command.startswith("flite ")


def test_the_rooms_are_read(tmp_path: Path) -> None:
    file = tmp_path / "streamsink.toml"
    file.write_text(block("rooms"))
    settings = load(config=file)
    (room,) = settings.rooms.values()
    assert [find(spec).name for spec in room.processors] == ["record", "transcribe"]
    assert room.max_members == 20
    assert [find(spec).name for spec in settings.pipelines["default"].processors] == ["mix"]


def test_a_signature_is_verified_as_shown() -> None:
    from streamsink.delivery import sign

    namespace: dict[str, Any] = {}
    exec(compile(block("verify"), "README.md", "exec"), namespace)
    now = int(time.time())
    headers = {"X-Streamsink-Timestamp": str(now), "X-Streamsink-Signature": sign("secret", now, b"body")}
    assert namespace["is_ours"]("secret", headers, b"body")
    assert not namespace["is_ours"]("secret", headers, b"other")
    assert not namespace["is_ours"]("another", headers, b"body")


async def test_the_greeter_can_be_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("espeakng_loader", reason="needs the extra speech")
    (greeter,) = [find(f"{ROOT}/examples/greeter.py:Greeter").build()]
    silence = np.zeros(4000, np.int16)
    speech, rate = soundfile.read(ROOT / "tests/data/speech.wav", dtype="int16")
    speech = speech[:: rate // 8000] if rate > 8000 else speech
    result = await run_processor(greeter, np.concatenate([silence, speech[:16_000]]), 8000, silence_seconds=3)
    assert result.clears == 1
    assert "interrupted after" in capsys.readouterr().out


def test_the_first_screen_has_exactly_two_commands() -> None:
    screen = README[: README.index("The first shows")]
    commands = re.findall(r"```sh\n(.*?)```", screen, re.DOTALL)
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert commands[0].strip().endswith("-m streamsink --port 8443")


def test_what_is_pasted_is_python() -> None:
    (shown,) = [text for kind, _, language, text in BLOCKS if language == "" and "stream_obj = {" in text]
    assignment = ast.parse(shown[shown.index("stream_obj = {") :])
    assert isinstance(assignment.body[0], ast.Assign)


def test_the_version_is_told_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"].count(".") == 2
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
