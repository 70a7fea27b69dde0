"""Settings: command line over ``STREAMSINK_*`` over streamsink.toml over defaults.

`load` is the way in for programs; ``Settings(...)`` takes values as they are and reads neither environment nor file.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from streamsink.errors import ConfigError

ENV_PREFIX = "STREAMSINK_"
DEFAULT_FILE = Path("streamsink.toml")

# Read by the tests, not by the endpoint: a developer has it in the shell while the endpoint starts.
_FOREIGN_VARIABLES = frozenset({"STREAMSINK_TESTDATA"})
_FILE_ONLY = frozenset({"pipelines", "rooms", "speech"})
_SECRET = frozenset({"tokens", "admin_token", "webhook_secret"})
_FLAGS = {"tokens": "--token", "processors": "--processor"}
_SHOWN = 80

# What an Authorization header can carry after "Bearer " without quoting: visible ASCII.
_TOKEN = re.compile(r"[!-~]+")
_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# One segment of a URL's path that needs no escape.
_PIPELINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.~-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Token(BaseModel):
    """A bearer token and the name it goes by in the log.

    Attributes:
        name: Shown in the log; never secret.
        value: What the peer must send; never shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    value: SecretStr


class Pipeline(BaseModel):
    """The processors a stream goes to, in order.

    Attributes:
        processors: SPECs as ``--processor`` takes them; at least one.
        talk_back: Whether these processors may send audio to the call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processors: list[str] = Field(min_length=1, description="a list of at least one processor SPEC")
    talk_back: bool = Field(default=True, description="true or false")

    @field_validator("processors")
    @classmethod
    def _specs(cls, specs: list[str]) -> list[str]:
        return _not_blank(specs)


class SpeechSettings(BaseModel):
    """What speaks: the table ``[speech]``.

    Attributes:
        synthesizer: The engine behind ``Stream.say``.
        voice: Its voice, where a text asks for none: a name such as ``en-gb`` for ``espeak``, the path of an ``.onnx``
            model for ``piper``, whatever takes the place of ``{voice}`` for ``command``. None is the engine's default.
        command: The program of ``command``, and its arguments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    synthesizer: Literal["espeak", "piper", "command"] = "espeak"
    voice: str | None = Field(default=None, min_length=1, description="a voice's name, or a path for piper")
    command: str | None = Field(
        default=None,
        validate_default=True,
        description="a program that writes WAV to standard output, with its arguments, such as "
        '"flite -voice slt -t {text} -o /dev/stdout"; without {text} it gets the text on standard input',
    )

    @field_validator("command")
    @classmethod
    def _a_program(cls, command: str | None, info: ValidationInfo) -> str | None:
        if command is None:
            if info.data.get("synthesizer") == "command":
                raise ValueError("the synthesizer is command, and there is none")
            return None
        try:
            arguments = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"it cannot be split into arguments: {error}") from None
        if not arguments:
            raise ValueError("it is empty")
        return command


class RoomSettings(BaseModel):
    """What rooms whose names fit a pattern are like.

    Attributes:
        processors: SPECs of what listens to the whole room.
        sample_rate: Hz the room is mixed and recorded at; None: the first member's, and for mixing more when a member
            has more.
        grace_seconds: How long a room waits for somebody to come back when the last member has left; s.
        max_members: Streams at once; further ones go on by themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    processors: list[str] = Field(default=[], description="a list of processor SPECs")
    sample_rate: Literal[8000, 16000, 24000, 32000, 44100, 48000] | None = Field(
        default=None, description="8000, 16000, 24000, 32000, 44100 or 48000"
    )
    grace_seconds: float = Field(default=5.0, ge=0, allow_inf_nan=False, description="a number of seconds, 0 or more")
    max_members: int = Field(default=100, ge=1, le=1000, description="a whole number from 1 to 1000")

    @field_validator("processors")
    @classmethod
    def _specs(cls, specs: list[str]) -> list[str]:
        return _not_blank(specs)


def default_state_dir() -> Path:
    """Where the made token and certificate lie unless told otherwise (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The specification: a relative path here is invalid and to be ignored.
    root = base if os.path.isabs(base) else os.path.expanduser("~/.local/state")
    if not os.path.isabs(root):
        raise ConfigError(
            "there is no home folder to keep the made token and certificate in; name a folder with --state"
        )
    return Path(root) / "streamsink"


def _default_host(values: dict[str, Any]) -> str:
    # Without TLS the only safe peer is a proxy on the same machine.
    return "127.0.0.1" if values.get("no_tls") else "0.0.0.0"


_PATH = "a path"
_SECONDS = "a number of seconds above 0"


class Settings(BaseSettings):
    """What `serve` can be told. Each field's description says what is allowed.

    Attributes:
        no_tls: Serve plain ``ws://``, for a proxy that terminates TLS.
        host: The address to listen on; 0.0.0.0, or 127.0.0.1 with `no_tls`.
        port: 0 lets the system pick one.
        cert: PEM certificate chain; None: a self-signed pair is made and kept in `state`.
        key: PEM private key of `cert`.
        tokens: Bearer tokens of streams; empty: one is made and kept in `state`.
        no_auth: Take streams without a token. Wins over `tokens`.
        admin_token: Token of metrics and API; None: one is made and kept in `state`.
        processors: SPECs of the ``default`` pipeline.
        recordings: Folder of the recordings.
        min_free: Bytes that must be free there for a new recording; 0: none.
        webhook_secret: Signs our webhooks; None: one is made and kept in `state`.
        public_url: The URL peers use, where it is not this machine's own.
        workers: Processes that serve streams.
        bus: URL of what carries rooms between processes and machines; None: rooms are this process's own.
        max_streams: Streams at once; None: no limit.
        capture: Folder for raw captures; None: none are made.
        state: Folder of the made token and certificate.
        config: The file these settings were read from, if any.
        l16_byteorder: Byte order of L16 payloads.
        log_format: Text for people or one JSON object a line.
        log_level: The least severe level that is logged.
        drain_seconds: How long live streams may go on after SIGTERM; s.
        start_deadline: Longest wait for ``start`` after the upgrade; s.
        max_message_bytes: Largest message of a peer; bytes.
        head_deadline: Longest time for a request's head or body; s.
        playout_lead_ms: Audio kept queued at the far end, against a late tick; two packet times at least; ms.
        media_silence_seconds: End a stream that sends no media for so long; s; None: never.
        vad_streams: Tracks that Silero listens to at once; further ones get the energy detector.
        pipelines: By name; there is always a ``default``.
        rooms: By pattern of their names; the first that fits counts.
        speech: The engines for speech.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    no_tls: bool = Field(default=False, description="true or false")
    host: str = Field(default_factory=_default_host, min_length=1, description="a host name or an address")
    port: int = Field(default=8443, ge=0, le=65535, description="a whole number from 0 to 65535")
    cert: Path | None = Field(default=None, description=_PATH)
    key: Path | None = Field(default=None, validate_default=True, description=_PATH)
    tokens: Annotated[list[Token], NoDecode] = Field(
        default=[], description="[NAME:]TOKEN, separated by commas, in visible ASCII"
    )
    no_auth: bool = Field(default=False, description="true or false")
    admin_token: SecretStr | None = Field(default=None, description="a token in visible ASCII")
    processors: Annotated[list[str], NoDecode] = Field(
        default=["record"],
        min_length=1,
        description="at least one SPEC (NAME or NAME:key=value,…); in the environment separated by semicolons",
    )
    recordings: Path = Field(default=Path("recordings"), description=_PATH)
    min_free: int = Field(
        default=200_000_000, ge=0, description="a size such as 200M, 1.5G or 512Mi, or 0 for no such check"
    )
    webhook_secret: SecretStr | None = Field(default=None, description="at least 16 characters of visible ASCII")
    public_url: str | None = Field(default=None, description="a URL such as wss://streams.example.com/")
    workers: int = Field(default=1, ge=1, le=256, description="a whole number from 1 to 256")
    bus: str | None = Field(default=None, description="nats://HOST:PORT")
    max_streams: int | None = Field(default=None, ge=1, description="a whole number from 1")
    capture: Path | None = Field(default=None, description=_PATH)
    state: Path = Field(default_factory=default_state_dir, description=_PATH)
    config: Path | None = Field(default=None, description=_PATH)
    l16_byteorder: Literal["little", "big", "auto"] = "little"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False, description="a number of seconds, 0 or more")
    start_deadline: float = Field(default=10.0, gt=0, allow_inf_nan=False, description=_SECONDS)
    max_message_bytes: int = Field(default=65536, ge=1024, description="a whole number from 1024")
    head_deadline: float = Field(default=10.0, gt=0, allow_inf_nan=False, description=_SECONDS)
    playout_lead_ms: int = Field(default=100, ge=20, le=2000, description="a whole number from 20 to 2000")
    media_silence_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False, description=_SECONDS)
    vad_streams: int = Field(default=32, ge=0, description="a whole number from 0")
    pipelines: dict[str, Pipeline] = Field(
        default={}, validate_default=True, description="tables [pipelines.<name>] with processors and talk_back"
    )
    rooms: dict[str, RoomSettings] = Field(
        default={},
        description="tables [rooms.<pattern>] with processors, sample_rate, grace_seconds and max_members",
    )
    speech: SpeechSettings = Field(default=SpeechSettings(), description="a table [speech]")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only what is passed in: `load` lays the sources over each other, since it must tell which one erred."""
        return (init_settings,)

    @field_validator("cert", "key", "recordings", "capture", "state", "config")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        return path and Path(os.path.expanduser(path))

    @field_validator("key")
    @classmethod
    def _cert_and_key(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        cert = info.data.get("cert")
        if (key is None) != (cert is None) and "cert" in info.data:
            given, missing = ("cert", "key") if key is None else ("key", "cert")
            raise ValueError(f"{given} is given without {missing}; give both, or neither to have a pair made")
        return key

    @field_validator("tokens", mode="before")
    @classmethod
    def _parse_tokens(cls, value: object) -> list[Token]:
        return _tokens(value)

    @field_validator("admin_token")
    @classmethod
    def _visible_token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _TOKEN.fullmatch(value.get_secret_value()):
            raise ValueError("the token (not shown) is empty or has characters other than visible ASCII")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _long_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[!-~]{16,}", value.get_secret_value()):
            raise ValueError("the secret (not shown) is too short or has characters other than visible ASCII")
        return value

    @field_validator("min_free", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return _parse_size(value) if isinstance(value, str) else value

    @field_validator("processors", mode="before")
    @classmethod
    def _split_processors(cls, value: object) -> object:
        # A comma is part of a SPEC's options, so it cannot separate SPECs.
        return value.split(";") if isinstance(value, str) else value

    @field_validator("processors")
    @classmethod
    def _specs(cls, specs: list[str]) -> list[str]:
        return _not_blank(specs)

    @field_validator("log_level", "l16_byteorder", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("public_url")
    @classmethod
    def _websocket_url(cls, url: str | None) -> str | None:
        if url is not None:
            _check_public_url(url)
        return url

    @field_validator("pipelines")
    @classmethod
    def _with_default(cls, pipelines: dict[str, Pipeline], info: ValidationInfo) -> dict[str, Pipeline]:
        for name in pipelines:
            if not _PIPELINE_NAME.fullmatch(name):
                raise ValueError(f"the name {_show(name)} has characters other than letters, digits and '._~-'")
        if "default" in pipelines or "processors" not in info.data:
            return pipelines
        return {"default": Pipeline(processors=info.data["processors"]), **pipelines}


def load(**flags: object) -> Settings:
    """Read the settings from every source and check them.

    Args:
        flags: What the command line gave, by field name; None and empty lists count as not given.

    Raises:
        ConfigError: A key is unknown, a value cannot be used or the file cannot be read. The message names the key,
            where it was given, what came and what is allowed; it never holds a token.
    """
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    environment = _read_environment()
    path = _file_path(given.get("config") or environment.get("config"))
    file = _read_file(path) if path else {}
    if "default" in _table(file, "pipelines"):
        if "processors" in file:
            raise ConfigError(
                f"{path}: both processors and [pipelines.default] say what the default pipeline is; keep one of them"
            )
        processors = given.get("processors") or environment.get("processors")
        if processors:
            # The more specific source replaces the file's processors, and leaves its other options.
            default = {**_table(file["pipelines"], "default"), "processors": _as_list(processors)}
            file = {**file, "pipelines": {**file["pipelines"], "default": default}}
    try:
        return Settings(**{**file, **environment, **given, "config": path})
    except ValidationError as error:
        sources = _Sources(given, environment, file, path)
        problems = [_explain(detail, sources) for detail in error.errors(include_url=False)]
    # Raised outside the except block: the original holds the values, secret ones too.
    raise ConfigError("\n".join(problems))


def _read_environment() -> dict[str, Any]:
    known = {field.upper() for field in Settings.model_fields if field not in _FILE_ONLY}
    for variable in sorted(os.environ):
        if not variable.upper().startswith(ENV_PREFIX) or variable in _FOREIGN_VARIABLES:
            continue
        name = variable.upper().removeprefix(ENV_PREFIX)
        if name.lower() in _FILE_ONLY:
            raise ConfigError(f"environment variable {variable}: {name.lower()} can only be set in {DEFAULT_FILE}")
        if name not in known:
            raise ConfigError(f"unknown environment variable {variable}{_kubernetes(variable) or _hint(name, known)}")
    return EnvSettingsSource(Settings)()


def _kubernetes(variable: str) -> str:
    if re.fullmatch(r"STREAMSINK_(SERVICE_(HOST|PORT).*|PORT_\d.*)", variable):
        return "; Kubernetes sets it for a service named streamsink: set enableServiceLinks: false in the pod"
    return ""


def _file_path(named: Any) -> Path | None:
    if named is None:
        return DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    return Path(os.path.expanduser(named))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    allowed = Settings.model_fields.keys() - {"config"}
    for key in content:
        if key not in allowed:
            raise ConfigError(f"{path}: unknown key {_show(key)}{_hint(key, allowed)}")
    return content


def _table(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[str]:
    return value.split(";") if isinstance(value, str) else list(value)


def _not_blank(specs: list[str]) -> list[str]:
    stripped = [spec.strip() for spec in specs]
    if not all(stripped):
        raise ValueError("a SPEC is empty")
    return stripped


def _tokens(value: object) -> list[Token]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        raise ValueError("the tokens are not a list of strings")
    tokens: list[Token] = []
    for position, item in enumerate(value, start=1):
        token = item if isinstance(item, Token) else _token(item, position)
        for other in tokens:
            if other.name == token.name:
                raise ValueError(f"two tokens are named {_show(token.name)}; give each a name of its own")
            if other.value == token.value:
                raise ValueError(f"{_show(other.name)} and {_show(token.name)} are the same token; drop one")
        tokens.append(token)
    return tokens


def _token(item: object, position: int) -> Token:
    if not isinstance(item, str):
        raise ValueError(f"token {position} is not a string")
    name, colon, secret = item.strip().partition(":")
    if not colon:
        name, secret = f"token-{position}", name
    # Only the position is told: what stands in place of a name may be half of a token that has a colon in it.
    if not _TOKEN_NAME.fullmatch(name):
        raise ValueError(f"the name before the colon of token {position} is not made of letters, digits, '_', '.', '-'")
    if not _TOKEN.fullmatch(secret):
        raise ValueError(f"token {position} (not shown) is empty or has characters other than visible ASCII")
    return Token(name=name, value=SecretStr(secret))


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"got {_show(text)}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()])


def _check_public_url(url: str) -> None:
    if not _TOKEN.fullmatch(url):
        raise ValueError("the URL is empty or has spaces or characters other than visible ASCII")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in ("wss", "ws"):
        raise ValueError(f"the scheme is {_show(parts.scheme)}")
    if not parts.hostname:
        raise ValueError("the host is missing")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("a user name, a query or a fragment cannot be part of it")


class _Sources(NamedTuple):
    flags: Mapping[str, object]
    environment: Mapping[str, object]
    file: Mapping[str, object]
    path: Path | None

    def name(self, field: str, inner: Iterable[str]) -> str:
        """Tell where a setting's value came from; one that came from nowhere is named as its flag."""
        if field in self.file and field not in self.flags and field not in self.environment:
            return f"{self.path}: {'.'.join([field, *inner])}"
        if field in self.environment and field not in self.flags:
            return f"environment variable {ENV_PREFIX}{field.upper()}"
        return _FLAGS.get(field, f"--{field.replace('_', '-')}")


def _explain(detail: ErrorDetails, sources: _Sources) -> str:
    """Say in one line which setting is wrong, where it came from, what came and what is allowed."""
    field, *inner = map(str, detail["loc"])
    source = sources.name(field, inner)
    if field not in Settings.model_fields:
        return f"unknown setting {_show(field)}{_did_you_mean(field, Settings.model_fields)}"
    if detail["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"speech": SpeechSettings, "rooms": RoomSettings}
        table = tables.get(field, Pipeline)
        return f"{source}: unknown key{_did_you_mean(inner[-1], table.model_fields)}"
    if detail["type"] == "value_error":
        got = str(detail["ctx"]["error"])
    elif detail["type"] == "missing":
        got = "missing"
    else:
        got = "got a value that is not shown" if field in _SECRET else f"got {_show(detail['input'])}"
    model: type[BaseModel] = Settings
    if field == "pipelines" and len(inner) > 1:
        model, field = Pipeline, inner[1]
    elif field == "rooms" and len(inner) > 1:
        model, field = RoomSettings, inner[1]
    elif field == "speech" and inner:
        model, field = SpeechSettings, inner[0]
    return f"{source}: {got}; allowed is {_allowed(model, field, detail['input'])}"


def _allowed(model: type[BaseModel], field: str, value: object) -> str:
    info = model.model_fields[field]
    choices = get_args(info.annotation) if info.description is None else ()
    if not choices:
        return str(info.description)
    return f"{' or '.join(choices)}{_did_you_mean(str(value), choices)}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _hint(word: str, known: Iterable[str]) -> str:
    return _did_you_mean(word, known) or f"; allowed are {', '.join(sorted(known))}"


def _show(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
