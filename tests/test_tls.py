import datetime
import ipaddress
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from streamsink import tls
from streamsink.errors import ConfigError
from streamsink.tls import CertificateReloader, fingerprint, self_signed, server_context

NOW = datetime.datetime.now(datetime.UTC)


def write_pair(folder: Path, key: CertificateIssuerPrivateKeyTypes | None = None) -> tuple[Path, Path]:
    """Write cert.pem and key.pem of a fresh pair, as a renewal would: in place."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    cert_path, key_path = folder / "cert.pem", folder / "key.pem"
    replace(cert_path, certificate.public_bytes(Encoding.PEM))
    replace(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert_path, key_path


def replace(path: Path, content: bytes) -> None:
    aside = path.with_suffix(".new")
    aside.write_bytes(content)
    os.replace(aside, path)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> ssl.SSLObject:
    """Let two contexts greet each other in memory; returns the client's side."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_side = client.wrap_bio(to_client, to_server, server_hostname=name)
    server_side = server.wrap_bio(to_server, to_client, server_side=True)
    unfinished = [client_side, server_side]
    while unfinished:
        for side in list(unfinished):
            try:
                side.do_handshake()
                unfinished.remove(side)
            except ssl.SSLWantReadError:
                continue
    return client_side


def trusting_anyone() -> ssl.SSLContext:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    return client


def served(server: ssl.SSLContext) -> bytes:
    """The certificate a client gets to see, DER."""
    certificate = handshake(server, trusting_anyone()).getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def der(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestSelfSigned:
    def test_it_is_made_once_and_kept_private(self, tmp_path: Path) -> None:
        made = self_signed(tmp_path)
        assert made == (tmp_path / "self-signed.crt", tmp_path / "self-signed.pem", True)
        assert (mode(made.cert), mode(made.key)) == (0o600, 0o600)
        assert b"PRIVATE" not in made.cert.read_bytes()
        content = made.key.read_bytes()
        assert self_signed(tmp_path) == (made.cert, made.key, False)
        assert made.key.read_bytes() == content

    def test_starting_several_at_once_leaves_one_pair(self, tmp_path: Path) -> None:
        barrier = threading.Barrier(8)
        outcomes: list[tls.SelfSigned] = []

        def start() -> None:
            barrier.wait()
            outcomes.append(self_signed(tmp_path))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [outcome.made for outcome in outcomes].count(True) == 1
        assert served(server_context(*outcomes[0][:2])) == der(outcomes[0].cert)

    def test_a_strict_client_that_trusts_just_this_file_accepts_every_name(self, tmp_path: Path) -> None:
        certificate, pair, _ = self_signed(
            tmp_path, ["streams.example.com", "192.0.2.7", "0.0.0.0", "::", "fe80::1", "a b"]
        )
        server = server_context(certificate, pair)
        client = ssl.create_default_context(cafile=certificate)
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        for name in ("localhost", "127.0.0.1", "::1", socket.gethostname(), "streams.example.com", "192.0.2.7"):
            assert handshake(server, client, name).version() == "TLSv1.3"
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(server, client, "other.example.com")
        names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        unwanted = {ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::"), ipaddress.ip_address("fe80::1")}
        assert unwanted.isdisjoint(names.value.get_values_for_type(x509.IPAddress))

    def test_it_names_every_address_of_the_machine(self, tmp_path: Path) -> None:
        certificate = x509.load_pem_x509_certificate(self_signed(tmp_path).cert.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = names.get_values_for_type(x509.IPAddress)
        assert {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")} <= set(addresses)
        resolved = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        assert {ipaddress.ip_address(address) for address in resolved} <= set(addresses)
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == datetime.timedelta(days=825)

    def test_it_is_made_anew_for_a_name_it_lacks(self, tmp_path: Path) -> None:
        before = self_signed(tmp_path).key.read_bytes()
        with capture_logs() as logs:
            after = self_signed(tmp_path, ["streams.example.com"])
        assert after.made
        assert after.key.read_bytes() != before
        assert logs == [
            {
                "event": "made a self-signed certificate",
                "because": "the kept one is not good for streams.example.com",
                "path": str(after.cert),
                "log_level": "info",
            }
        ]
        # A name more than needed does no harm.
        assert not self_signed(tmp_path).made

    def test_it_is_made_anew_before_it_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tls, "_VALID", datetime.timedelta(days=30))
        assert self_signed(tmp_path).made
        monkeypatch.undo()
        assert self_signed(tmp_path).made
        assert not self_signed(tmp_path).made

    @pytest.mark.parametrize("damage", ["empty", "no key", "another key", "no names"])
    def test_it_is_made_anew_when_damaged(self, tmp_path: Path, damage: str) -> None:
        certificate, pair, _ = self_signed(tmp_path)
        cert_path, key_path = write_pair(tmp_path)
        contents = {
            "empty": b"",
            "no key": certificate.read_bytes(),
            "another key": key_path.read_bytes() + certificate.read_bytes(),
            "no names": key_path.read_bytes() + cert_path.read_bytes(),
        }
        pair.write_bytes(contents[damage])
        with capture_logs() as logs:
            assert self_signed(tmp_path).made
        assert [line["because"] for line in logs] == ["the kept one is damaged"]
        server_context(certificate, pair)

    def test_the_certificate_for_clients_follows_the_pair(self, tmp_path: Path) -> None:
        certificate, pair, _ = self_signed(tmp_path)
        certificate.write_bytes(b"stale")
        assert not self_signed(tmp_path).made
        assert der(certificate) == der(pair)

    def test_a_machine_without_names_or_ipv6(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> object:
            raise socket.gaierror

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        monkeypatch.setattr(socket, "getfqdn", lambda: "1.0.0.ip6.arpa")
        monkeypatch.setattr(socket, "gethostname", lambda: "my phone")
        monkeypatch.setattr(Path, "read_text", unknown)
        certificate = x509.load_pem_x509_certificate(self_signed(tmp_path).cert.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["localhost"]


class TestContext:
    def test_it_speaks_tls_1_2_and_later_and_http_1_1(self, tmp_path: Path) -> None:
        cert, key = write_pair(tmp_path)
        server = server_context(cert, key)
        client = trusting_anyone()
        client.set_alpn_protocols(["h2", "http/1.1"])
        assert handshake(server, client).selected_alpn_protocol() == "http/1.1"
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        assert handshake(server, client).version() == "TLSv1.2"
        assert server.minimum_version is ssl.TLSVersion.TLSv1_2

    def test_the_fingerprint_is_of_what_is_served(self, tmp_path: Path) -> None:
        cert, key = write_pair(tmp_path)
        assert fingerprint(cert).replace(":", "") == hashes_of(served(server_context(cert, key)))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        cert, key = write_pair(tmp_path)
        none = tmp_path / "none.pem"
        for pair in ((none, key), (cert, none)):
            with pytest.raises(ConfigError, match=f"^{none}: cannot be read: No such file or directory$"):
                server_context(*pair)

    def test_an_encrypted_key_is_refused_and_no_password_asked_for(self, tmp_path: Path) -> None:
        private = ec.generate_private_key(ec.SECP256R1())
        cert, key = write_pair(tmp_path, private)
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
        with pytest.raises(ConfigError, match=f"^{key}: the private key is encrypted; decrypt it with 'openssl pkey"):
            server_context(cert, key)

    def test_a_pair_that_does_not_match_is_refused(self, tmp_path: Path) -> None:
        cert, _ = write_pair(tmp_path)
        (tmp_path / "other").mkdir()
        _, other_key = write_pair(tmp_path / "other")
        with pytest.raises(ConfigError, match=f"^{other_key}: this private key does not belong to the .* in {cert}$"):
            server_context(cert, other_key)

    @pytest.mark.parametrize(
        "content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    )
    def test_garbage_is_refused(self, tmp_path: Path, content: bytes) -> None:
        cert, key = write_pair(tmp_path)
        garbage = tmp_path / "garbage.pem"
        garbage.write_bytes(content)
        with pytest.raises(ConfigError, match=f"^{garbage}: no certificate in PEM form is in it"):
            server_context(garbage, key)
        with pytest.raises(ConfigError, match=f"^{garbage}: no private key in PEM form is in it$"):
            server_context(cert, garbage)

    def test_what_openssl_refuses_is_told(self, tmp_path: Path) -> None:
        cert, key = write_pair(tmp_path)
        key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
        with pytest.raises(ConfigError, match=f"^{cert}, {key}: OpenSSL cannot use this pair: "):
            server_context(cert, key)


def hashes_of(data: bytes) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize().hex().upper()


class TestReloader:
    def test_a_renewed_pair_is_served_once_its_files_are_left_alone(self, tmp_path: Path) -> None:
        cert, key = write_pair(tmp_path)
        context = server_context(cert, key)
        reloader = CertificateReloader(context, cert, key)
        before = served(context)
        assert not reloader.check()
        write_pair(tmp_path)
        assert not reloader.check()
        assert served(context) == before
        with capture_logs() as logs:
            assert reloader.check()
        assert served(context) == der(cert) != before
        assert logs == [
            {
                "event": "loaded a changed certificate",
                "cert": str(cert),
                "sha256": fingerprint(cert),
                "log_level": "info",
            }
        ]
        assert not reloader.check()

    @pytest.mark.parametrize(
        "damage",
        [
            b"garbage",
            None,
            ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        ],
        ids=["garbage", "missing", "mismatch"],
    )
    def test_a_bad_pair_is_refused_once_and_the_old_one_served(self, tmp_path: Path, damage: bytes | None) -> None:
        cert, key = write_pair(tmp_path)
        context = server_context(cert, key)
        reloader = CertificateReloader(context, cert, key)
        before = served(context)
        if damage is None:
            key.unlink()
        else:
            replace(key, damage)
        with capture_logs() as logs:
            assert [reloader.check() for _ in range(4)] == [False] * 4
        assert [line["event"] for line in logs] == ["refused a changed certificate; the one before stays in use"]
        assert str(key) in logs[0]["error"]
        assert served(context) == before
        write_pair(tmp_path)
        assert [reloader.check() for _ in range(3)] == [False, True, False]
        assert served(context) == der(cert)

    def test_the_type_of_key_may_change_there_and_back(self, tmp_path: Path) -> None:
        keys: list[CertificateIssuerPrivateKeyTypes] = [
            ec.generate_private_key(ec.SECP256R1()),
            rsa.generate_private_key(65537, 2048),
            ed25519.Ed25519PrivateKey.generate(),
        ]
        cert, key = write_pair(tmp_path, keys[0])
        context = server_context(cert, key)
        reloader = CertificateReloader(context, cert, key)
        for turn in (1, 2, 1, 0, 2, 0, 1, 0):
            write_pair(tmp_path, keys[turn])
            assert [reloader.check() for _ in range(2)] == [False, True]
            assert served(context) == der(cert)
