import hashlib
import hmac
import secrets
import stat
import threading
from pathlib import Path

import pytest
from pydantic import SecretStr

from streamsink import auth
from streamsink.auth import Refusal, TokenBook, make_or_load_token, webhook_secret
from streamsink.config import Settings, Token
from streamsink.errors import ConfigError
from streamsink.server import access

TOKENS = [
    Token(name=name, value=SecretStr(value)) for name, value in [("a", "hunter1"), ("b", "hunter22"), ("c", "h3")]
]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (b"Bearer hunter1", "a"),
        ("Bearer hunter22", "b"),
        ("bEaReR h3", "c"),
        (b" \tBearer \t h3\t ", "c"),
    ],
)
def test_a_known_token_gives_its_name(header: bytes | str, name: str) -> None:
    assert TokenBook(TOKENS).match([header]) == name


@pytest.mark.parametrize(
    ("headers", "refusal"),
    [
        (
            [],
            Refusal(
                "missing",
                "there is no Authorization header; expected 'Bearer' and a token: "
                "set authorization_bearer_token in the stream_obj",
            ),
        ),
        (
            ["Bearer hunter1", "Bearer hunter1"],
            Refusal(
                "duplicate",
                "there are 2 Authorization headers; expected exactly one: a proxy in front may add one of its own",
            ),
        ),
        ([""], Refusal("empty", "the Authorization header is empty; expected 'Bearer' and a token")),
        ([b" \t"], Refusal("empty", "the Authorization header is empty; expected 'Bearer' and a token")),
        (
            ["Basic aHVudGVyMTpodW50ZXIx"],
            Refusal(
                "scheme",
                "the Authorization header has the scheme 'Basic' (26 bytes in all); expected 'Bearer' and a token: "
                "set authorization_bearer_token in the stream_obj to the bare token",
            ),
        ),
        (
            ["hunter1"],
            Refusal(
                "scheme",
                "the Authorization header has no scheme that is known (7 bytes in all); expected 'Bearer' and a token: "
                "set authorization_bearer_token in the stream_obj to the bare token",
            ),
        ),
        (
            ["Bearer"],
            Refusal("empty", "'Bearer' came without a token; set authorization_bearer_token in the stream_obj"),
        ),
        (
            ["bearer  "],
            Refusal("empty", "'Bearer' came without a token; set authorization_bearer_token in the stream_obj"),
        ),
        (
            ["Bearer hunter2"],
            Refusal(
                "wrong",
                "a bearer token of 7 bytes came that is none of the 3 known; "
                "set authorization_bearer_token in the stream_obj to one that this endpoint was started with",
            ),
        ),
    ],
)
def test_everything_else_is_refused_with_what_came(headers: list[bytes | str], refusal: Refusal) -> None:
    assert TokenBook(TOKENS).match(headers) == refusal


@pytest.mark.parametrize(
    "header",
    [
        "Bearer hunter1 hunter1",
        "Bearer hunter1\x00",
        "Bearer hunter",
        "Bearer hunter11",
        "Bearer HUNTER1",
        "Bearer Bearer hunter1",
        "Bearer hünter1",
        "Bearer hunter1\ud800",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
    ],
)
def test_near_misses_are_wrong(header: bytes | str) -> None:
    outcome = TokenBook(TOKENS).match([header])
    assert isinstance(outcome, Refusal)
    assert outcome.reason == "wrong"


@pytest.mark.parametrize(
    "header",
    ["hunter1 hunter22", "Bearer:hunter1", "Bearer\thunter1", b"\xff hunter1", "\x1b[31m hunter1", "basic hunter1"],
)
def test_no_explanation_quotes_the_peer(header: bytes | str) -> None:
    outcome = TokenBook(TOKENS).match([header])
    assert isinstance(outcome, Refusal)
    assert outcome.reason == "scheme"
    assert "hunter" not in outcome.explanation
    assert outcome.explanation.isascii()
    assert outcome.explanation.isprintable()


def test_every_token_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    book = TokenBook(TOKENS)
    known = [hashlib.sha256(token.value.get_secret_value().encode()).digest() for token in TOKENS]
    for presented in ("hunter1", "h3", "none"):
        compared.clear()
        book.match([f"Bearer {presented}"])
        assert compared == [(hashlib.sha256(presented.encode()).digest(), digest) for digest in known]


def test_a_book_holds_no_token_in_the_clear() -> None:
    assert "hunter" not in repr(vars(TokenBook(TOKENS)))


def test_a_book_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="--no-auth"):
        TokenBook([])


def test_a_token_is_made_once_and_kept(tmp_path: Path) -> None:
    token, path, made = make_or_load_token(tmp_path / "state", auth.STREAM_TOKEN_FILE)
    assert (path, made) == (tmp_path / "state" / "token", True)
    assert path.read_text() == token + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 43
    assert make_or_load_token(tmp_path / "state", auth.STREAM_TOKEN_FILE) == (token, path, False)
    assert make_or_load_token(tmp_path / "state", auth.ADMIN_TOKEN_FILE)[0] != token
    assert TokenBook([Token(name="made", value=SecretStr(token))]).match([f"Bearer {token}"]) == "made"


def test_starting_twice_at_once_gives_one_token(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    outcomes: list[tuple[str, Path, bool]] = []

    def start() -> None:
        barrier.wait()
        outcomes.append(make_or_load_token(tmp_path, "token"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({token for token, _, _ in outcomes}) == 1
    assert [made for _, _, made in outcomes].count(True) == 1


def test_another_that_made_the_token_in_between_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    made = secrets.token_urlsafe

    def made_while_another_starts(size: int) -> str:
        path.write_text("another-ones-token-of-32-letters\n")
        path.chmod(0o600)
        return made(size)

    monkeypatch.setattr(secrets, "token_urlsafe", made_while_another_starts)
    assert make_or_load_token(tmp_path, "token") == ("another-ones-token-of-32-letters", path, False)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "nothing"),
        (b"\n \n", "nothing"),
        (b"short", "5 bytes of something else"),
        (b"two\nlines" * 5, "45 bytes of something else"),
        (b"\xff\x00" * 20, "40 bytes of something else"),
        (b"a" * 129, "129 bytes of something else"),
    ],
)
def test_a_garbled_token_file_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        make_or_load_token(tmp_path, "token")
    assert str(caught.value) == (
        f"{path}: expected one token of 22 to 128 letters, digits, '_' and '-', found {found}; "
        "delete the file to have a new one made"
    )
    assert path.read_bytes() == content


def test_the_secret_of_webhooks_is_made_when_it_is_first_asked_for_and_kept(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path / "state")
    access(settings)
    path = tmp_path / "state" / "webhook-secret"
    assert not path.exists()
    secret = webhook_secret(settings)
    assert webhook_secret(settings) == secret == path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    given = Settings(state=tmp_path / "other", webhook_secret=SecretStr("what-the-operator-chose"))
    assert webhook_secret(given) == "what-the-operator-chose"
    assert not (tmp_path / "other").exists()
