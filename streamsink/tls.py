"""Certificates: a self-signed pair made once and kept, the server's TLS context, and renewed pairs put into it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import re
import socket
import ssl
import struct
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from streamsink.errors import ConfigError
from streamsink.state import only_one_process, read_private, replace_private

log = structlog.get_logger()

# The longest that Apple's platforms take for a certificate trusted by hand.
_VALID = datetime.timedelta(days=825)
# A server may run for weeks after it looked at the date.
_REMAKE_BEFORE = datetime.timedelta(days=30)
# A client's clock may be behind.
_BACKDATED = datetime.timedelta(days=1)

_DNS_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")


CERTIFICATE_FILE = "self-signed.crt"
"""The self-signed certificate in the state folder, for clients to trust."""
PAIR_FILE = "self-signed.pem"
"""The same with its private key: one file, so that one can never be newer than the other."""


class SelfSigned(NamedTuple):
    """Where the self-signed pair lies; both files are 0600.

    Attributes:
        cert: The certificate alone, for clients to trust.
        key: The private key, and the certificate once more.
        made: Whether it was made just now.
    """

    cert: Path
    key: Path
    made: bool


def self_signed(state_dir: Path, names: Iterable[str] = ()) -> SelfSigned:
    """Take the self-signed pair kept in the state folder; make one where there is none that will do.

    It is made anew when it ends within 30 days or lacks one of this machine's names or addresses.

    Args:
        state_dir: The folder it is kept in.
        names: Host names and addresses to be good for, beside those of this machine.

    Raises:
        ConfigError: The folder cannot be read or written.
    """
    cert, key = state_dir / CERTIFICATE_FILE, state_dir / PAIR_FILE
    wanted = _names_of_this_machine() | {name for name in map(_general_name, names) if name}
    now = datetime.datetime.now(datetime.UTC)
    with only_one_process(state_dir):
        pair = read_private(key)
        why = "there is none yet" if pair is None else _why_remake(pair, wanted, now)
        if why or pair is None:
            pair = _make_pair(wanted, now)
            replace_private(key, pair)
            log.info("made a self-signed certificate", because=why, path=str(cert))
        alone = x509.load_pem_x509_certificate(pair).public_bytes(Encoding.PEM)
        if read_private(cert) != alone:
            replace_private(cert, alone)
    return SelfSigned(cert, key, bool(why))


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Make the context of a server: TLS 1.2 or later, HTTP/1.1.

    Args:
        cert: PEM file of the certificate and its chain.
        key: PEM file of its private key, unencrypted; may be the same file.

    Raises:
        ConfigError: The pair cannot be used; the message names the file and what is wrong with it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, cert, key)
    return context


def fingerprint(cert: Path) -> str:
    """SHA-256 of a PEM file's first certificate, as ``openssl x509 -fingerprint -sha256`` shows it.

    Raises:
        ConfigError: The file holds no certificate.
    """
    return _read_certificate(cert).fingerprint(hashes.SHA256()).hex(":").upper()


class CertificateReloader:
    """Puts a renewed certificate into a live context; connections that are open keep the one they have.

    It has no thread or timer of its own: call `check` every second or so, on the event loop's thread, where no
    handshake can run halfway through.

    Args:
        context: The context of `server_context`.
        cert: The file it was made from.
        key: The file it was made from.
    """

    def __init__(self, context: ssl.SSLContext, cert: Path, key: Path) -> None:
        self._context = context
        self._cert = cert
        self._key = key
        self._loaded = self._seen = self._stamp()
        self._public_key = _read_certificate(cert).public_key()

    def check(self) -> bool:
        """Load the pair if its files have changed and then stayed the same for one call.

        A pair that cannot be used is logged and refused, and the one in use stays.

        Returns:
            Whether a new pair was loaded.
        """
        stamp = self._stamp()
        # Two files are never renewed in the same instant: wait until they are left alone.
        if stamp != self._seen or stamp == self._loaded:
            self._seen = stamp
            return False
        self._loaded = stamp
        try:
            server_context(self._cert, self._key)
            public_key = _read_certificate(self._cert).public_key()
            _load_pair(self._context, self._cert, self._key)
        except ConfigError as error:
            log.warning("refused a changed certificate; the one before stays in use", error=str(error))
            return False
        if type(public_key) is not type(self._public_key):
            self._retire(self._public_key)
        self._public_key = public_key
        log.info("loaded a changed certificate", cert=str(self._cert), sha256=fingerprint(self._cert))
        return True

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_file_stamp(path) for path in (self._cert, self._key))

    def _retire(self, old: CertificatePublicKeyTypes) -> None:
        # OpenSSL holds one pair for each type of key, and would go on serving the old ECDSA certificate after an RSA
        # one is loaded. Nothing takes a pair out; but a certificate that does not fit the key beside it throws that
        # key away, and a pair without its key is not served.
        stranger = _certificate_for_another_key(old)
        with tempfile.NamedTemporaryFile() as file, contextlib.suppress(ssl.SSLError):
            file.write(stranger)
            file.flush()
            self._context.load_cert_chain(file.name, self._key)


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    _read_certificate(cert)
    if b"PRIVATE KEY-----" not in _read(key):
        raise ConfigError(f"{key}: no private key in PEM form is in it")

    def refuse_password() -> str:
        # Without this OpenSSL would ask for it on the terminal.
        raise ConfigError(f"{key}: the private key is encrypted; decrypt it with 'openssl pkey -in {key} -out FILE'")

    try:
        context.load_cert_chain(cert, key, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key}: this private key does not belong to the certificate in {cert}") from None
        raise ConfigError(f"{cert}, {key}: OpenSSL cannot use this pair: {error.reason or error}") from None
    except OSError as error:  # pragma: no cover - both files were read a moment ago
        raise ConfigError(f"{cert}, {key}: cannot be read: {error.strerror}") from None


def _read_certificate(path: Path) -> x509.Certificate:
    content = _read(path)
    try:
        return x509.load_pem_x509_certificates(content)[0]
    except ValueError as error:
        raise ConfigError(f"{path}: no certificate in PEM form is in it, or it is damaged: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _why_remake(pair: bytes, wanted: set[x509.GeneralName], now: datetime.datetime) -> str | None:
    try:
        certificate = x509.load_pem_x509_certificate(pair)
        key = load_pem_private_key(pair, password=None)
        names = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return "the kept one is damaged"
    if key.public_key() != certificate.public_key():
        return "the kept one is damaged"
    if certificate.not_valid_after_utc - now < _REMAKE_BEFORE:
        return f"the kept one ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
    missing = sorted(str(name.value) for name in wanted - names)
    return f"the kept one is not good for {', '.join(missing)}" if missing else None


def _make_pair(names: set[x509.GeneralName], now: datetime.datetime) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    # X.520 allows 64 characters.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"streamsink on {socket.gethostname()}"[:64])])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    # An authority, and the server's own certificate at once: so a client can trust just this file. Strict clients
    # (Python 3.13's default) want the key identifiers of RFC 5280 §4.2.1 too.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now - _BACKDATED + _VALID)
        .add_extension(x509.SubjectAlternativeName(sorted(names, key=lambda name: str(name.value))), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)


def _certificate_for_another_key(old: CertificatePublicKeyTypes) -> bytes:
    """Make a certificate for a public key of the given one's type whose private key nobody has."""
    key: CertificatePublicKeyTypes
    if isinstance(old, rsa.RSAPublicKey):
        # Any odd number is a modulus to the parser; finding two primes would stop the event loop for 0.1 s.
        key = rsa.RSAPublicNumbers(e=65537, n=(1 << 3071) | 1).public_key()
    elif isinstance(old, ed25519.Ed25519PublicKey):
        key = ed25519.Ed25519PrivateKey.generate().public_key()
    else:
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "never served")])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + _BACKDATED)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def _names_of_this_machine() -> set[x509.GeneralName]:
    host, qualified = socket.gethostname(), socket.getfqdn()
    # A resolver without a name for the address answers with the address, turned round.
    names = {"localhost", host} if qualified.endswith(".arpa") else {"localhost", host, qualified}
    return {name for name in map(_general_name, names | _local_addresses()) if name}


def _general_name(name: str) -> x509.GeneralName | None:
    """Turn a host name or an address into a subject alternative name; None for what cannot be one, such as 0.0.0.0."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return x509.DNSName(name.lower()) if _DNS_NAME.fullmatch(name) else None
    return None if address.is_unspecified or address.is_link_local else x509.IPAddress(address)


def _local_addresses() -> set[str]:
    addresses = {"127.0.0.1", "::1"}
    with contextlib.suppress(OSError):
        addresses |= {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    if sys.platform == "linux":
        addresses |= _ipv4_of_interfaces() | _ipv6_of_interfaces()
    return addresses


def _ipv4_of_interfaces() -> set[str]:
    addresses = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # SIOCGIFADDR of netdevice(7): struct ifreq, the name in 16 bytes, then a sockaddr_in. An interface without
            # an IPv4 address is an error.
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("16s24x", name.encode()))
                addresses.add(socket.inet_ntoa(reply[20:24]))
    return addresses


def _ipv6_of_interfaces() -> set[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return set()
    addresses = set()
    for line in lines:
        digits, _, _, _, flags, _ = line.split()
        # IFA_F_TEMPORARY: a privacy address that will be another tomorrow.
        if not int(flags, 16) & 0x01:
            addresses.add(str(ipaddress.IPv6Address(int(digits, 16))))
    return addresses
