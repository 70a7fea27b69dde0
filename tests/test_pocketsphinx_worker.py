"""What a worker of PocketSphinx answers, asked in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soundfile

pytest.importorskip("pocketsphinx", reason="needs the speech extra")

from streamsink.speech.stt import pocketsphinx_worker
from streamsink.speech.stt.pocketsphinx_worker import Decoders, Options, keyword_line

TESTDATA = Path(os.environ.get("STREAMSINK_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata")) / "speech"
CONFIG = {"fwdflat": False, "maxhmmpf": 3000}


def ask(decoders: Decoders, do: str, number: int = 0, **more: object) -> dict[str, object]:
    (answer,) = decoders.reply({"do": do, "decoder": number, "question": 7, **more})
    assert answer.pop("question") == 7
    busy = answer.pop("busy")
    assert isinstance(busy, float)
    return answer


@pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"needs recorded speech; there is no {TESTDATA}")
def test_an_utterance_from_its_beginning_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocketsphinx_worker, "BEFOREHAND", 1)
    decoders = Decoders(Options(CONFIG))
    audio = soundfile.read(TESTDATA / "flite-rms_s2_16k.wav", dtype="int16")[0].tobytes()
    assert ask(decoders, "load") == {}
    assert ask(decoders, "begin", mean=None) == {}
    assert ask(decoders, "audio", audio=audio[:32_000], interim=False) == {"text": None}
    # Whoever was to end it is gone.
    assert ask(decoders, "begin", mean="50,1,1") == {}
    said = ask(decoders, "audio", audio=audio[:64_000], interim=True)["text"]
    assert str(said).startswith("please leave a message")
    ask(decoders, "audio", audio=audio[64_000:], interim=True)
    answer = ask(decoders, "end")
    assert answer["text"] == "please leave a message after the tone"
    words = answer["words"]
    assert isinstance(words, list)
    assert [word for word, _, _ in words] == ["please", "leave", "a", "message", "after", "the", "tone"]
    assert all(start < end for _, start, end in words)
    assert isinstance(answer["confidence"], float)
    mean = answer["mean"]
    assert isinstance(mean, str)
    assert not mean.startswith("50,")


def test_keywords_and_a_grammar_need_no_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocketsphinx_worker, "BEFOREHAND", 0)
    grammar = tmp_path / "yes.jsgf"
    grammar.write_text("#JSGF V1.0;\ngrammar x;\npublic <x> = yes | no;\n")
    for options in (Options(CONFIG, keywords=["call back/1e-10"]), Options(CONFIG, grammar=str(grammar))):
        decoders = Decoders(options)
        assert ask(decoders, "load") == {}
        # The first to be made after the start.
        assert ask(decoders, "begin", mean=None) == {}
        assert ask(decoders, "audio", audio=bytes(16_000), interim=True)["text"] == ""
        answer = ask(decoders, "end")
        assert (answer["text"], answer["words"], answer["confidence"]) == ("", [], None)


def test_what_cannot_be_loaded_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert "error" in ask(Decoders(Options({**CONFIG, "hmm": "/nowhere"})), "load")
    assert "/nowhere" in capfd.readouterr().err
    answer = ask(Decoders(Options(CONFIG, keywords=["call qwertzuiop"])), "load")
    assert answer == {"error": "the dictionary has no 'qwertzuiop'"}


def test_keywords_are_written_as_the_lists_have_them() -> None:
    assert keyword_line(" Call Back/1e-10") == "call back /1e-10/"
    assert keyword_line("yes") == "yes /1e-20/"
