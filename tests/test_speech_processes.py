"""What the child processes of espeak and Piper answer, asked here without the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BEEP = str(Path(__file__).parent / "data/voice/beep.onnx")


def test_espeak_answers_word_by_word() -> None:
    pytest.importorskip("espeakng_loader", reason="espeakng-loader (extra speech) is not installed")
    from streamsink.speech.espeak_process import reply

    *pieces, end = list[Any](reply(["One two, 3.14.", "en-us"]))
    assert end is None
    assert [(rate, text_end) for _, rate, text_end in pieces] == [(22050, 4), (22050, 9), (22050, 14)]
    assert all(len(pcm) > 2 * 2000 and len(pcm) % 2 == 0 for pcm, _, _ in pieces)
    # Only its voice is looked at.
    assert list(reply(["", "en-gb+f2"])) == [None]
    for voice in ("nope", "en+nope", "en+../f2"):
        (reason,) = reply(["", voice])
        assert str(reason).startswith(f"espeak has no voice {voice!r}")


def test_piper_answers_with_the_whole_sentence(tmp_path: Path) -> None:
    pytest.importorskip("piper", reason="piper-tts (extra piper) is not installed")
    from streamsink.speech.piper_process import reply

    (pcm, rate, text_end), last, end = list[Any](reply(["Hello.", BEEP]))
    assert (len(pcm) > 16000, rate, text_end) == (True, 16000, 0)
    assert (last, end) == ([b"", 16000, 6], None)
    assert list(reply(["", BEEP])) == [None]
    (reason,) = reply(["", str(tmp_path / "none.onnx")])
    assert str(reason).startswith("piper cannot load the voice")
    # A voice in a language that Piper does not know.
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(Path(BEEP).read_bytes())
    settings = Path(f"{BEEP}.json").read_text(encoding="utf-8").replace('"en-us"', '"nonesuch"')
    broken.with_name("broken.onnx.json").write_text(settings, encoding="utf-8")
    (reason,) = reply(["the secret", str(broken)])
    assert str(reason).startswith(f"piper failed to speak a text with the voice '{broken}': ")
    assert "secret" not in str(reason)
