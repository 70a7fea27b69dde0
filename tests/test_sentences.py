from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsink.speech.sentences import LONGEST, can_be_spoken, sentences


def cut(text: str) -> list[str]:
    return [sentence for _, sentence in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world. How are you?  Fine!", ["Hello world.", "How are you?", "Fine!"]),
        ("one line\nis no end", ["one line is no end"]),
        ("A heading\n \nand more", ["A heading", "and more"]),
        ("Mr. Smith met Dr. Jones, e.g. at St. Mary's.", ["Mr. Smith met Dr. Jones, e.g. at St. Mary's."]),
        ("The U.S. Army. At 5 p.m. Tomorrow.", ["The U.S. Army.", "At 5 p.m.", "Tomorrow."]),
        ("J. R. Tolkien wrote it. So did I. Really.", ["J. R. Tolkien wrote it.", "So did I.", "Really."]),
        ("No. 5 is alive. Is it? No. It is 6.", ["No. 5 is alive.", "Is it?", "No.", "It is 6."]),
        ("Pi is 3.14. Or 3.1415...", ["Pi is 3.14.", "Or 3.1415..."]),
        ("Well... maybe… not. But… Yes.", ["Well... maybe… not.", "But…", "Yes."]),
        ('"Why?" he asked. "Because!" She left.', ['"Why?" he asked.', '"Because!"', "She left."]),
        ("Really?! yes.", ["Really?!", "yes."]),
        ("see example.com now", ["see example.com now"]),
        ("你好。你好吗？我很好！「好。」", ["你好。", "你好吗？", "我很好！", "「好。」"]),
        ("यह है। वह है।", ["यह है।", "वह है।"]),
        ("Hello. :-) ... Bye.", ["Hello.", "Bye."]),
        ("a\x00b\ud800c\x01d", ["a b c d"]),
        ("", []),
        (" \n?!… — ", []),
        (". A", ["A"]),
    ],
)
def test_a_text_is_cut_where_a_reader_would_pause(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


def test_what_is_too_long_is_cut_at_a_comma_or_between_words_or_anywhere() -> None:
    words = "word " * 30
    assert cut(f"{words}here, {words}there") == [f"{words}here,", f"{words}there"]
    assert cut("word " * 100) == [("word " * 40).strip(), ("word " * 40).strip(), ("word " * 20).strip()]
    assert cut("x" * 500) == ["x" * 200, "x" * 200, "x" * 100]
    # A comma before which there is nothing to be said is none to cut at.
    assert cut(", " + "x" * 300)[0] == ", " + "x" * 198


@given(st.text(alphabet=st.sampled_from("aB1 .,!?…。\n\"'\u3000\x00"), max_size=500))
def test_nothing_that_can_be_spoken_is_left_out(text: str) -> None:
    end = 0
    for start, sentence in sentences(text):
        assert not can_be_spoken(text[end:start])
        assert can_be_spoken(sentence)
        assert 0 < len(sentence) <= LONGEST
        end = start + len(sentence)
        assert sentence == text[start:end].replace("\n", " ").replace("\x00", " ")
    assert not can_be_spoken(text[end:])


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["." * 100_000 + "x", "\n" + " " * 100_000 + "x", 'a"' * 50_000, "a. " * 33_000, "\n" * 100_000]
)
def test_nobody_makes_it_slow(text: str) -> None:
    end = 0
    for start, sentence in sentences(text):
        assert start >= end
        end = start + len(sentence)
    assert not can_be_spoken(text[end:])
