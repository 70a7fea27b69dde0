"""Bearer tokens: who may stream, checked in constant time, and the tokens made when none is given."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamsink.config import Settings, Token
from streamsink.errors import ConfigError
from streamsink.state import create_private, read_private

STREAM_TOKEN_FILE = "token"
ADMIN_TOKEN_FILE = "admin-token"
STATUS_SECRET_FILE = "status-secret"
WEBHOOK_SECRET_FILE = "webhook-secret"

REFUSAL_BODY = b"Unauthorized\n"
"""The body of every 401: it tells a stranger nothing about what was wrong."""
REFUSAL_HEADERS = (("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain; charset=utf-8"))

RefusalReason = Literal["missing", "scheme", "empty", "duplicate", "wrong"]

# Only a scheme known beforehand may be quoted: where it is missing, the first word may be the token itself.
_QUOTABLE_SCHEMES = frozenset({"apikey", "basic", "digest", "dpop", "hmac", "negotiate", "ntlm", "oauth", "token"})
_MADE_TOKEN = re.compile(rb"[A-Za-z0-9_-]{22,128}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not let in.

    Attributes:
        reason: A fixed word for the metric's label.
        explanation: For the log: what came, what was expected and how to mend it; never the token.
    """

    reason: RefusalReason
    explanation: str


class TokenBook:
    """The tokens that open the door, by digest.

    Args:
        tokens: At least one, with distinct names.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._names: list[str] = []
        self._digests: list[bytes] = []
        for token in tokens:
            self._names.append(token.name)
            self._digests.append(_digest(token.value.get_secret_value().encode("ascii")))
        if not self._names:
            raise ConfigError("no token to check against; give --token, or --no-auth to take streams from anyone")

    def match(self, authorization: Sequence[bytes | str]) -> str | Refusal:
        """Compare the values of a request's Authorization headers with every token.

        How long it takes does not depend on which token matches, nor on how much of one does.

        Args:
            authorization: Every Authorization header's value, in order.

        Returns:
            The matching token's name, or why there is none.
        """
        if not authorization:
            return Refusal(
                "missing",
                "there is no Authorization header; expected 'Bearer' and a token: "
                "set authorization_bearer_token in the stream_obj",
            )
        if len(authorization) > 1:
            return Refusal(
                "duplicate",
                f"there are {len(authorization)} Authorization headers; expected exactly one: "
                "a proxy in front may add one of its own",
            )
        value = _to_bytes(authorization[0]).strip(b" \t")
        scheme, _, presented = value.partition(b" ")
        presented = presented.strip(b" \t")
        if not value:
            return Refusal("empty", "the Authorization header is empty; expected 'Bearer' and a token")
        if scheme.lower() != b"bearer":
            return Refusal(
                "scheme",
                f"the Authorization header has {_describe_scheme(scheme)} ({len(value)} bytes in all); "
                "expected 'Bearer' and a token: set authorization_bearer_token in the stream_obj to the bare token",
            )
        if not presented:
            return Refusal("empty", "'Bearer' came without a token; set authorization_bearer_token in the stream_obj")
        digest = _digest(presented)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            return Refusal(
                "wrong",
                f"a bearer token of {len(presented)} bytes came that is none of the {len(matches)} known; "
                "set authorization_bearer_token in the stream_obj to one that this endpoint was started with",
            )
        return self._names[matches.index(True)]


def make_or_load_token(state_dir: Path, filename: str) -> tuple[str, Path, bool]:
    """Take the token that is kept in the state folder, making one the first time.

    Safe against other processes that do the same at once: all get the same token.

    Returns:
        The token, its file (0600), and whether it was made just now.

    Raises:
        ConfigError: The file cannot be read or written, or holds something else than one token.
    """
    path = state_dir / filename
    content = read_private(path)
    if content is None:
        token = secrets.token_urlsafe(32)
        if create_private(path, f"{token}\n".encode("ascii")):
            return token, path, True
        content = read_private(path)
    content = (content or b"").strip()
    if not _MADE_TOKEN.fullmatch(content):
        raise ConfigError(
            f"{path}: expected one token of 22 to 128 letters, digits, '_' and '-', "
            f"found {f'{len(content)} bytes of something else' if content else 'nothing'}; "
            "delete the file to have a new one made"
        )
    return content.decode("ascii"), path, False


def webhook_secret(settings: Settings) -> str:
    """Tell what signs our webhooks, making it for the first one where none is given.

    Who is to check them may read it then: a webhook that is refused meanwhile is sent again.

    Raises:
        ConfigError: The kept one cannot be read or written.
    """
    if settings.webhook_secret is not None:
        return settings.webhook_secret.get_secret_value()
    return make_or_load_token(settings.state, WEBHOOK_SECRET_FILE)[0]


def _describe_scheme(scheme: bytes) -> str:
    word = scheme.decode("ascii", "replace")
    return f"the scheme '{word.capitalize()}'" if word.lower() in _QUOTABLE_SCHEMES else "no scheme that is known"


def _digest(token: bytes) -> bytes:
    # Digests are of one length: comparing them tells nothing about the token's.
    return hashlib.sha256(token).digest()


def _to_bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "backslashreplace")
