from __future__ import annotations

import hashlib
import hmac
import socket
import threading
from pathlib import Path

import pytest

from streamsink import tls
from streamsink.delivery import check_url, sign, verify
from streamsink.delivery.webhook import Gone, Refused, _opener, host_of, send
from streamsink.errors import ConfigError
from tests.receiver import receiving

SECRET = "what-signs-our-webhooks"
NOW = 1_795_552_938.7


def test_the_signature_is_what_any_language_makes_of_it() -> None:
    body = b'{"id":"1"}'
    wanted = hmac.new(SECRET.encode(), b'1795552938.{"id":"1"}', hashlib.sha256).hexdigest()
    assert sign(SECRET, 1795552938, body) == f"v1={wanted}"


def test_only_what_was_signed_lately_with_the_secret_is_verified() -> None:
    body = b"{}"
    good = sign(SECRET, 1000, body)
    assert verify(SECRET, "1000", good, body, now=1300)
    assert verify(SECRET, "1000", good, body, now=700)
    assert not verify(SECRET, "1000", good, body, now=1301)
    assert not verify(SECRET, "1000", good, body, now=699)
    assert not verify(SECRET, "1000", good, body)
    assert not verify("another-secret-altogether", "1000", good, body, now=1000)
    assert not verify(SECRET, "1001", good, body, now=1000)
    assert not verify(SECRET, "1000", good, b"{} ", now=1000)
    for timestamp in ("", "x", "-1000", "1e3", "1" * 13, "١٠٠٠"):
        assert not verify(SECRET, timestamp, good, body, now=1000)
    for signature in ("", "v1=", good[3:], "v1=é", "v1=\ud800"):
        assert not verify(SECRET, "1000", signature, body, now=1000)


def test_what_is_sent_can_be_verified() -> None:
    with receiving() as receiver:
        send(receiver.url, b'{"a":1}', secret=SECRET, job="7", now=NOW)
    (request,) = receiver.requests
    assert request.body == b'{"a":1}'
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["X-Streamsink-Delivery"] == "7"
    assert request.headers["X-Streamsink-Timestamp"] == "1795552938"
    assert verify(SECRET, "1795552938", request.headers["X-Streamsink-Signature"], request.body, now=NOW)


@pytest.mark.parametrize("status", [200, 201, 204])
def test_any_success_will_do(status: int) -> None:
    with receiving(status) as receiver:
        send(receiver.url, b"{}", secret=SECRET, job="7", now=NOW)


@pytest.mark.parametrize("status", [300, 304, 400, 401, 404, 429, 500, 503])
def test_anything_else_is_none(status: int) -> None:
    with receiving(status) as receiver, pytest.raises(Refused, match=f"HTTP status {status}"):
        send(receiver.url, b"{}", secret=SECRET, job="7", now=NOW)


def test_gone_is_told_apart() -> None:
    with receiving(410) as receiver, pytest.raises(Gone):
        send(receiver.url, b"{}", secret=SECRET, job="7", now=NOW)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with receiving() as elsewhere, receiving(status, {"Location": elsewhere.url}) as receiver:
        with pytest.raises(Refused, match=f"HTTP status {status}"):
            send(receiver.url, b"{}", secret=SECRET, job="7", now=NOW)
        assert elsewhere.requests == []


def test_who_speaks_no_http_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example.com\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Refused, match="no HTTP answer: BadStatusLine"):
            send(f"http://127.0.0.1:{listener.getsockname()[1]}/", b"{}", secret=SECRET, job="7", now=NOW)
        thread.join()


def test_nobody_there_is_an_error_to_try_again() -> None:
    with pytest.raises(OSError, match="refused"):
        send("http://127.0.0.1:1/", b"{}", secret=SECRET, job="7", now=NOW)


def test_a_certificate_must_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tls.self_signed(tmp_path, ["localhost"])
    with receiving(certificate=made) as receiver:
        _opener.cache_clear()
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            send(receiver.url, b"{}", secret=SECRET, job="7", now=NOW)
        # As an operator with an authority of their own says it.
        monkeypatch.setenv("SSL_CERT_FILE", str(made.cert))
        _opener.cache_clear()
        send(receiver.url, b"{}", secret=SECRET, job="7", now=NOW)
    _opener.cache_clear()
    assert [request.body for request in receiver.requests] == [b"{}"]


@pytest.mark.parametrize(
    "url", ["https://example.com/x?y=z", "http://localhost:8080/x", "http://127.0.0.1/", "http://[::1]:80/x"]
)
def test_good_urls_are_taken(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://example.com/s3cr3t", "a webhook to example.com over http:// could be read on its way"),
        ("ftp://example.com/s3cr3t", "a webhook's URL has the scheme 'ftp'"),
        ("https:///s3cr3t", "a webhook's URL has the scheme 'https' and no host"),
        ("https://u:s3cr3t@example.com/", "a webhook's URL to example.com has a user name"),
        ("https://example.com/s3cr3t#x", "a webhook's URL to example.com has a user name, a fragment"),
        ("https://example.com/s3cr3t é", "a webhook's URL to example.com has a user name, a fragment or more than"),
        ("https://example.com:99999/s3cr3t", "a webhook's URL cannot be read: Port out of range"),
    ],
)
def test_a_url_that_cannot_be_is_told_without_its_secrets(url: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_url(url)
    assert str(caught.value).startswith(problem)
    assert str(caught.value).endswith("; wanted https://host/path (http:// only to localhost)")
    assert "s3cr3t" not in str(caught.value)


def test_a_log_names_only_the_host() -> None:
    assert host_of("https://hooks.example.com:8443/T0/s3cr3t?x=y") == "https://hooks.example.com:8443"
