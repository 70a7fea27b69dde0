"""Cutting a text into sentences, so that the first is heard while the rest has not been synthesized yet."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 200
"""Characters; a longer sentence is cut at a comma, else between words, else anywhere."""

# Cutting too seldom does no harm; cutting before a name is heard.
_BEFORE_A_NAME = re.compile(
    "mr|mrs|ms|mx|dr|prof|st|mt|gen|col|sgt|capt|lt|cmdr|rev|hon|pres|gov|sen|rep|messrs|mme|mlle|vs|cf|approx|ca"
    "|hr|fr|dott|sig|sra"
)
_BEFORE_A_NUMBER = re.compile("no|nr|fig|vol|p|pp|ch|sec|art")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_TIMES = frozenset(("a.m", "p.m"))
# A full stop is one only where no small letter follows; `_is_end` sees to that.
_STOP = re.compile(
    r"""
      (?<! [.!?…] ) (?P<stop> [.!?…]++ ["'”’»)\]]*+ ) (?= \s | \Z )    # a decimal point has no space behind it
    | [。！？｡।॥۔؟]++ [」』”’）】]*+                                       # these end one wherever they stand
    | \n \s* \n                                                         # an empty line
    """,
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘«]*\Z")
_CLAUSE = re.compile(r".*(?:[,;:–—](?=\s)|[，、；：])", re.DOTALL)
_SPACE = re.compile(r".*\s", re.DOTALL)
# Commands to one engine or another, or nothing at all; a lone surrogate cannot be encoded. One for one: positions stay.
_UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def can_be_spoken(text: str) -> bool:
    """Whether there is a letter or a digit in a text."""
    return any(map(str.isalnum, text))


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Cut a text into sentences.

    Yields:
        Where each begins, in characters, and the sentence: at most `LONGEST` characters, with a letter or a digit in
        it, without space around it, control characters made spaces. What stands between has nothing to be spoken.
    """
    start = 0
    for end in _ends(text):
        yield from _cut(text, start, end)
        start = end


def _ends(text: str) -> Iterator[int]:
    for match in _STOP.finditer(text):
        if match["stop"] is None or _is_end(text, match):
            yield match.end()
    yield len(text)


def _is_end(text: str, match: re.Match[str]) -> bool:
    """Whether a full stop, with space behind it, ends the sentence."""
    after = text[match.end() : match.end() + LONGEST].lstrip()
    mark = match["stop"]
    if "!" in mark or "?" in mark:
        # `"Why?" he asked` goes on.
        return len(mark.rstrip("\"'”’»)]")) == len(mark) or not after[:1].islower()
    if after[:1].islower():
        return False
    if mark[0] != "." or mark[:2] == "..":
        return True
    found = _LAST_WORD.search(text, max(0, match.start() - LONGEST), match.start())
    word = found[0].lower() if found is not None else ""
    if _BEFORE_A_NUMBER.fullmatch(word):
        return not after[:1].isdigit()
    # An initial, as in `J. Smith`; but not the word `I`.
    if len(word) == 1 and word.isalpha():
        return word == "i"
    return word in _TIMES or not (_BEFORE_A_NAME.fullmatch(word) or _DOTTED.fullmatch(word))


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, str]]:
    while start < end:
        piece = text[start : start + LONGEST] if end - start > LONGEST else text[start:end]
        if end - start > LONGEST:
            for border in (_CLAUSE, _SPACE):
                found = border.match(piece)
                if found is not None and can_be_spoken(found[0]):
                    piece = found[0]
                    break
        stripped = piece.lstrip()
        if can_be_spoken(piece):
            yield start + len(piece) - len(stripped), _UNSPEAKABLE.sub(" ", stripped.rstrip())
        start += len(piece)
