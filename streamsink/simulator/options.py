"""What to simulate, checked before anything is connected."""

from __future__ import annotations

import dataclasses
import math
import ssl
from collections.abc import Sequence
from pathlib import Path

from websockets.exceptions import InvalidURI
from websockets.uri import WebSocketURI, parse_uri

from streamsink.errors import SimulationError
from streamsink.log import escape
from streamsink.wire import DIGITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What to simulate; each field is the command-line flag of its name.

    The methods raise `SimulationError` where a value cannot be used: it says which, and what is allowed.

    Attributes:
        file: Any sound file soundfile reads, or else
        replay: a capture to play back.
        url: ``wss://host:port/path``, or ``ws://`` where a proxy terminates TLS.
        token: The bearer token; none is sent without.
        cafile: A PEM file of certificates to trust besides the system's.
        insecure: Accept any certificate.
        codec: Such as ``L16@24000h@40i``.
        param: Custom parameters, each ``key=value``.
        name: The stream's friendly name.
        streams: Calls at once, their frames spread over the ptime.
        loop: Play the file again and again, until interrupted or until ``seconds`` are over.
        seconds: Length of the call; a shorter file is played again.
        dtmf: Digits a participant presses, the first after 0.5 s, then one each 0.25 s.
        lose: Share of frames that are skipped, from 0 up to 1: chunk numbers and timestamps jump.
        seed: Picks which frames those are.
        save: Where to write what the first call's participant heard, as WAV. Behind the file that call goes on in
            silence until nothing has been heard for 2 s (60 s at most), unless ``seconds`` or ``expect_echo`` says when
            it ends.
        expect_echo: Each sent frame must come back; what has not within a second is lost.
        no_pong: Leave pings unanswered, as SignalWire's own library does.
        json: Print one JSON object instead of a table.
    """

    file: Path | None = None
    replay: Path | None = None
    url: str = "wss://localhost:8443/"
    token: str | None = None
    cafile: Path | None = None
    insecure: bool = False
    codec: str = "PCMU"
    param: Sequence[str] = ()
    name: str | None = None
    streams: int = 1
    loop: bool = False
    seconds: float | None = None
    dtmf: str = ""
    lose: float = 0.0
    seed: int = 0
    save: Path | None = None
    expect_echo: bool = False
    no_pong: bool = False
    json: bool = False

    def check(self) -> None:
        """Look through what needs no further reading."""
        if (self.file is None) == (self.replay is None):
            raise SimulationError("give either a sound FILE to play or a capture by --replay")
        for field in ("codec", "param", "name", "streams", "loop", "seconds", "dtmf", "lose"):
            if self.replay is not None and getattr(self, field) != getattr(SimulateOptions, field):
                raise SimulationError(f"--{field} does not go with --replay: the capture holds what is sent")
        if self.streams < 1:
            raise SimulationError(f"--streams is {self.streams}; it has to be 1 or more")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise SimulationError(f"--seconds is {self.seconds:g}; it has to be above 0")
        if not 0 <= self.lose < 1:
            raise SimulationError(f"--lose is {self.lose:g}; it is a share from 0 up to 1, so 0.05 for 5 %")
        if wrong := set(self.dtmf.upper()) - DIGITS:
            raise SimulationError(f"--dtmf holds {escape(min(wrong))!r}; digits are 0-9, *, # and A-D")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise SimulationError("--token holds a character that cannot stand in an HTTP header")
        if self.save is not None and not self.save.parent.is_dir():
            raise SimulationError(f"--save: there is no folder {self.save.parent}")

    def endpoint(self) -> WebSocketURI:
        """Where to call."""
        if not self.url.lower().startswith(("ws://", "wss://")):
            raise SimulationError(f"--url has to begin with wss:// (or ws:// without TLS), got {escape(self.url)!r}")
        try:
            uri = parse_uri(self.url)
        except (InvalidURI, ValueError) as error:
            raise SimulationError(f"--url cannot be used: {escape(str(error))}") from None
        if uri.user_info is not None:
            raise SimulationError("--url holds a user and a password; SignalWire sends a bearer token: use --token")
        return uri

    def custom_parameters(self) -> dict[str, str]:
        """``param`` as a mapping."""
        for parameter in self.param:
            if parameter.find("=") < 1:
                raise SimulationError(f"--param wants key=value, got {escape(parameter)!r}")
        return dict(parameter.split("=", 1) for parameter in self.param)

    def trust(self) -> ssl.SSLContext:
        """Which certificates are accepted."""
        context = ssl.create_default_context()
        if self.cafile is not None:
            try:
                context.load_verify_locations(self.cafile)
            except OSError as error:
                # A file that is no PEM is an ssl.SSLError, which is an OSError too.
                raise SimulationError(f"--cafile {self.cafile} holds no certificate: {error}") from None
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
