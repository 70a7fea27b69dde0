"""Webhooks: one POST of JSON, signed, to whom the operator named.

The signature is an HMAC-SHA256 (RFC 2104) over timestamp, a dot and the body, so that neither can be changed and an old
request cannot be sent again for long.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from typing import IO
from urllib.parse import urlsplit

from streamsink.errors import ConfigError

TIMEOUT = 10.0
"""Seconds for connecting and for each wait for an answer."""
TOLERANCE = 300.0
"""Seconds a request's timestamp may differ from the receiver's clock."""

_VISIBLE = re.compile(r"[!-~]+")
_HERE = frozenset({"localhost", "127.0.0.1", "::1"})


class Gone(Exception):
    """The receiver answered 410: it wants this no more."""


class Refused(Exception):
    """The receiver answered with something else than 2xx."""


def sign(secret: str, timestamp: int, body: bytes) -> str:
    """Make the value of ``X-Streamsink-Signature``: ``v1=`` and the HMAC-SHA256 in hex.

    Args:
        secret: What endpoint and receiver share.
        timestamp: Seconds since 1970, as ``X-Streamsink-Timestamp`` has it.
        body: The request's body.
    """
    return "v1=" + hmac.new(secret.encode(), b"%d.%b" % (timestamp, body), hashlib.sha256).hexdigest()


def verify(secret: str, timestamp: str, signature: str, body: bytes, *, now: float | None = None) -> bool:
    """Whether a request came from who has the secret, and not more than five minutes ago; never raises.

    Args:
        secret: What endpoint and receiver share.
        timestamp: The header ``X-Streamsink-Timestamp``.
        signature: The header ``X-Streamsink-Signature``.
        body: The request's body as it came.
        now: Seconds since 1970; the machine's clock when not given.
    """
    if re.fullmatch(r"[0-9]{1,12}", timestamp) is None:
        return False
    at = int(timestamp)
    if abs((time.time() if now is None else now) - at) > TOLERANCE:
        return False
    return hmac.compare_digest(sign(secret, at, body).encode(), signature.encode("utf-8", "replace"))


def check_url(url: str) -> str:
    """Check where a webhook is to go; returns it.

    Raises:
        ConfigError: It is no https:// URL, nor an http:// one of this machine; the message does not hold its path.
    """
    wanted = "wanted https://host/path (http:// only to localhost)"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"a webhook's URL cannot be read: {error}; {wanted}") from None
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ConfigError(f"a webhook's URL has the scheme {parts.scheme!r} and no host that can be used; {wanted}")
    if parts.scheme == "http" and parts.hostname not in _HERE:
        raise ConfigError(f"a webhook to {parts.hostname} over http:// could be read on its way; {wanted}")
    if parts.username is not None or parts.fragment or not _VISIBLE.fullmatch(url):
        raise ConfigError(
            f"a webhook's URL to {parts.hostname} has a user name, a fragment or more than visible ASCII; {wanted}"
        )
    return url


def host_of(url: str) -> str:
    """What of a URL may stand in a log: the rest may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def send(url: str, body: bytes, *, secret: str, job: str, now: float) -> None:
    """Send one webhook. Blocks. Redirects are refused: the signature is for whom the operator named.

    urllib of the standard library: one request a job needs no pool of connections and no dependency.

    Args:
        url: Checked by :func:`check_url`.
        body: JSON.
        secret: What signs it.
        job: Identifies the webhook in ``X-Streamsink-Delivery``: one that was sent again has the same.
        now: Seconds since 1970.

    Raises:
        Gone: The answer was 410.
        Refused: The answer was something else than 2xx.
        OSError: There was no answer; TLS that cannot be trusted is one.
    """
    timestamp = int(now)
    request = urllib.request.Request(
        url,
        data=body,
        method="POST",
        headers={
            "Content-Type": "application/json",
            "User-Agent": "streamsink",
            "X-Streamsink-Delivery": job,
            "X-Streamsink-Timestamp": str(timestamp),
            "X-Streamsink-Signature": sign(secret, timestamp, body),
        },
    )
    try:
        # What it says beyond its status is of no use.
        _opener().open(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.GONE:
            raise Gone from None
        raise Refused(f"HTTP status {error.code}") from None
    except http.client.HTTPException as error:
        raise Refused(f"no HTTP answer: {type(error).__name__}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    # Reading the system's certificates takes long enough to do it once.
    return urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=ssl.create_default_context()))
