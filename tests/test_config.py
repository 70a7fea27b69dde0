import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr

from streamsink.config import Pipeline, Settings, SpeechSettings, Token, default_state_dir, load
from streamsink.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("STREAMSINK_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def token(name: str, value: str) -> Token:
    return Token(name=name, value=SecretStr(value))


def refused(**flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**flags)
    assert caught.value.__cause__ is None
    # A traceback that shows the validation error would show the values.
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


def test_defaults() -> None:
    assert load().model_dump() == {
        "no_tls": False,
        "host": "0.0.0.0",
        "port": 8443,
        "cert": None,
        "key": None,
        "tokens": [],
        "no_auth": False,
        "admin_token": None,
        "processors": ["record"],
        "recordings": Path("recordings"),
        "min_free": 200_000_000,
        "webhook_secret": None,
        "public_url": None,
        "max_streams": None,
        "workers": 1,
        "bus": None,
        "capture": None,
        "state": Path("/home/anna/.local/state/streamsink"),
        "config": None,
        "l16_byteorder": "little",
        "log_format": "text",
        "log_level": "info",
        "drain_seconds": 60.0,
        "start_deadline": 10.0,
        "max_message_bytes": 65536,
        "head_deadline": 10.0,
        "playout_lead_ms": 100,
        "media_silence_seconds": None,
        "vad_streams": 32,
        "pipelines": {"default": {"processors": ["record"], "talk_back": True}},
        "rooms": {},
        "speech": {"synthesizer": "espeak", "voice": None, "command": None},
    }


def test_each_source_wins_over_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("streamsink.toml").write_text("port = 1\nmax_streams = 1\nhost = '::1'\n")
    monkeypatch.setenv("STREAMSINK_PORT", "2")
    monkeypatch.setenv("STREAMSINK_MAX_STREAMS", "2")
    settings = load(port=3, no_tls=None, processors=[])
    assert (settings.port, settings.max_streams, settings.host) == (3, 2, "::1")
    assert settings.config == Path("streamsink.toml")
    assert settings.drain_seconds == 60


def test_every_scalar_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "NO_TLS": "true",
        "CERT": "~/cert.pem",
        "KEY": "/etc/key.pem",
        "TOKENS": "alice:one, two",
        "ADMIN_TOKEN": "three",
        "WEBHOOK_SECRET": "four-is-a-long-one",
        "MIN_FREE": "1.5Gi",
        "PROCESSORS": "record:a=1,b=2; echo",
        "PUBLIC_URL": "wss://streams.example.com/agent",
        "LOG_LEVEL": "DEBUG",
        "MEDIA_SILENCE_SECONDS": "2.5",
        "CAPTURE": "",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"STREAMSINK_{name}", value)
    settings = load()
    assert settings.host == "127.0.0.1"
    assert (settings.cert, settings.key) == (Path("/home/anna/cert.pem"), Path("/etc/key.pem"))
    assert settings.tokens == [token("alice", "one"), token("token-2", "two")]
    assert settings.admin_token == SecretStr("three")
    assert settings.webhook_secret == SecretStr("four-is-a-long-one")
    assert settings.min_free == 3 * 2**29
    assert settings.processors == ["record:a=1,b=2", "echo"]
    assert settings.pipelines == {"default": Pipeline(processors=["record:a=1,b=2", "echo"])}
    assert settings.public_url == "wss://streams.example.com/agent"
    assert settings.log_level == "debug"
    assert settings.media_silence_seconds == 2.5
    assert settings.capture is None


def test_settings_made_directly_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMSINK_PORT", "1")
    assert Settings().port == 8443


def test_the_variable_of_the_tests_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMSINK_TESTDATA", "/data")
    assert load().port == 8443


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["one"], [token("token-1", "one")]),
        (["alice:one", "bob:x:y"], [token("alice", "one"), token("bob", "x:y")]),
        ([token("ready", "made")], [token("ready", "made")]),
        ("a:b,c", [token("a", "b"), token("token-2", "c")]),
    ],
)
def test_tokens(given: object, parsed: list[Token]) -> None:
    assert load(tokens=given).tokens == parsed


def test_secrets_never_show() -> None:
    settings = load(tokens=["alice:hunter2"], admin_token="hunter3")
    assert "hunter" not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "https"}, "--port: got 'https'; allowed is a whole number from 0 to 65535"),
        ({"port": 65536}, "--port: got 65536; allowed is a whole number from 0 to 65535"),
        ({"host": ""}, "--host: got ''; allowed is a host name or an address"),
        ({"drain_seconds": float("nan")}, "--drain-seconds: got nan; allowed is a number of seconds, 0 or more"),
        ({"start_deadline": 0}, "--start-deadline: got 0; allowed is a number of seconds above 0"),
        ({"max_streams": 0}, "--max-streams: got 0; allowed is a whole number from 1"),
        (
            {"log_level": "wanring"},
            "--log-level: got 'wanring'; allowed is debug or info or warning or error; did you mean warning?",
        ),
        ({"l16_byteorder": "x"}, "--l16-byteorder: got 'x'; allowed is little or big or auto"),
        ({"log_format": 5}, "--log-format: got 5; allowed is text or json"),
        (
            {"cert": "c"},
            "--key: cert is given without key; give both, or neither to have a pair made; allowed is a path",
        ),
        (
            {"key": "k"},
            "--key: key is given without cert; give both, or neither to have a pair made; allowed is a path",
        ),
        ({"prot": 1}, "unknown setting 'prot'; did you mean port?"),
        ({"recordings": 5}, "--recordings: got 5; allowed is a path"),
        (
            {"processors": ["record", " "]},
            "--processor: a SPEC is empty; allowed is at least one SPEC (NAME or NAME:key=value,…); "
            "in the environment separated by semicolons",
        ),
    ],
)
def test_a_bad_flag_is_named_with_what_came_and_what_is_allowed(flags: Mapping[str, object], message: str) -> None:
    assert refused(**flags) == message


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://x", "the scheme is 'https'"),
        ("wss:///x", "the host is missing"),
        ("wss://a b", "the URL is empty or has spaces or characters other than visible ASCII"),
        ("", "the URL is empty or has spaces or characters other than visible ASCII"),
        ("wss://u:p@x", "a user name, a query or a fragment cannot be part of it"),
        ("wss://x/?q=1", "a user name, a query or a fragment cannot be part of it"),
        ("wss://x:99999", "not a URL: Port out of range 0-65535"),
    ],
)
def test_a_bad_public_url(url: str, reason: str) -> None:
    assert refused(public_url=url) == f"--public-url: {reason}; allowed is a URL such as wss://streams.example.com/"


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["hunter2", "a b"], "token 2 (not shown) is empty or has characters other than visible ASCII"),
        (["alice:"], "token 1 (not shown) is empty or has characters other than visible ASCII"),
        (["hunter/2:x"], "the name before the colon of token 1 is not made of letters, digits, '_', '.', '-'"),
        (["a:hunter2", "a:x"], "two tokens are named 'a'; give each a name of its own"),
        (["a:hunter2", "b:hunter2"], "'a' and 'b' are the same token; drop one"),
        ([5], "token 1 is not a string"),
        ({"a": "hunter2"}, "the tokens are not a list of strings"),
    ],
)
def test_a_bad_token_is_not_shown(tokens: object, reason: str) -> None:
    message = refused(tokens=tokens)
    assert message == f"--token: {reason}; allowed is [NAME:]TOKEN, separated by commas, in visible ASCII"


@pytest.mark.parametrize("value", ["hunter 2", "hünter2", 5])
def test_a_bad_admin_token_is_not_shown(value: object) -> None:
    message = refused(admin_token=value)
    assert message.startswith("--admin-token: ")
    assert "unter" not in message
    assert message.endswith("; allowed is a token in visible ASCII")


@pytest.mark.parametrize("value", ["hunter2hunter2", "hünter2hünter2hünter2", 5])
def test_a_bad_webhook_secret_is_not_shown(value: object) -> None:
    message = refused(webhook_secret=value)
    assert message.startswith("--webhook-secret: ")
    assert "unter" not in message
    assert message.endswith("; allowed is at least 16 characters of visible ASCII")


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("200M", 200_000_000), ("1.5 GB", 1_500_000_000), ("512Mi", 2**29), ("7kib", 7168)]
)
def test_sizes_have_suffixes(text: str, size: int) -> None:
    assert load(min_free=text).min_free == size


@pytest.mark.parametrize("text", ["", "much", "200MM", "-1", "1i", "1e6"])
def test_what_is_no_size_is_refused(text: str) -> None:
    wanted = "allowed is a size such as 200M, 1.5G or 512Mi, or 0 for no such check"
    assert refused(min_free=text) == f"--min-free: got {text!r}; {wanted}"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "STREAMSINK_PORT",
            "x",
            "environment variable STREAMSINK_PORT: got 'x'; allowed is a whole number from 0 to 65535",
        ),
        ("STREAMSINK_PROT", "1", "unknown environment variable STREAMSINK_PROT; did you mean PORT?"),
        (
            "STREAMSINK_XYZZY",
            "1",
            "unknown environment variable STREAMSINK_XYZZY; allowed are ADMIN_TOKEN, BUS, CAPTURE, CERT, ",
        ),
        (
            "STREAMSINK_PORT_8443_TCP",
            "tcp://10.0.0.1:8443",
            "unknown environment variable STREAMSINK_PORT_8443_TCP; Kubernetes sets it for a service named streamsink: "
            "set enableServiceLinks: false in the pod",
        ),
        (
            "STREAMSINK_PIPELINES",
            "{}",
            "environment variable STREAMSINK_PIPELINES: pipelines can only be set in streamsink.toml",
        ),
    ],
)
def test_a_bad_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    assert refused().startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "port = 1\nhost = \n",
            "streamsink.toml: not valid TOML: Invalid value (at line 2, column 8)",
        ),
        ("prot = 1", "streamsink.toml: unknown key 'prot'; did you mean port?"),
        ("config = 'x'", "streamsink.toml: unknown key 'config'"),
        ("port = -1", "streamsink.toml: port: got -1; allowed is a whole number from 0 to 65535"),
        (
            "speech.synthesiser = 'piper'",
            "streamsink.toml: speech.synthesiser: unknown key; did you mean synthesizer?",
        ),
        (
            "speech.synthesizer = 'pipr'",
            "streamsink.toml: speech.synthesizer: got 'pipr'; allowed is espeak or piper or command; "
            "did you mean piper?",
        ),
        (
            "speech.synthesizer = 'command'",
            "streamsink.toml: speech.command: the synthesizer is command, and there is none; allowed is a program that",
        ),
        (
            "speech.command = 'say \"hello'",
            "streamsink.toml: speech.command: it cannot be split into arguments: No closing quotation; allowed is",
        ),
        ("speech.command = ' '", "streamsink.toml: speech.command: it is empty; allowed is a program that writes WAV"),
        ("speech.voice = ''", "streamsink.toml: speech.voice: got ''; allowed is a voice's name, or a path for piper"),
        (
            "rooms.a.graze_seconds = 5",
            "streamsink.toml: rooms.a.graze_seconds: unknown key; did you mean grace_seconds?",
        ),
        (
            "rooms.a.sample_rate = 7",
            "streamsink.toml: rooms.a.sample_rate: got 7; allowed is 8000, 16000, 24000, 32000, 44100 or 48000",
        ),
        ("rooms.a.processors = ['']", "streamsink.toml: rooms.a.processors: a SPEC is empty; allowed is a list of"),
        ("speech = 5", "streamsink.toml: speech: got 5; allowed is a table [speech]"),
        (
            "pipelines.agent.procesors = ['x']\npipelines.agent.processors = ['x']",
            "streamsink.toml: pipelines.agent.procesors: unknown key; did you mean processors?",
        ),
        (
            "pipelines.agent.talk_back = true",
            "streamsink.toml: pipelines.agent.processors: missing; allowed is a list of at least one processor SPEC",
        ),
        (
            "pipelines.agent.processors = []",
            "streamsink.toml: pipelines.agent.processors: got []; allowed is a list of at least one processor SPEC",
        ),
        (
            "pipelines.agent.processors = [1]",
            "streamsink.toml: pipelines.agent.processors.0: got 1; allowed is a list of at least one processor SPEC",
        ),
        (
            "pipelines.agent = 5",
            "streamsink.toml: pipelines.agent: got 5; allowed is tables [pipelines.<name>]",
        ),
        (
            "pipelines = 5",
            "streamsink.toml: pipelines: got 5; allowed is tables [pipelines.<name>]",
        ),
        (
            "pipelines.'a/b'.processors = ['x']",
            "streamsink.toml: pipelines: the name 'a/b' has characters other than letters, digits and '._~-'; "
            "allowed is tables [pipelines.<name>] with processors and talk_back",
        ),
        (
            "processors = ['x']\npipelines.default.processors = ['y']",
            "streamsink.toml: both processors and [pipelines.default] say what the default pipeline is; "
            "keep one of them",
        ),
    ],
)
def test_a_bad_file(text: str, message: str) -> None:
    Path("streamsink.toml").write_text(text)
    assert refused().startswith(message)


def test_a_long_value_is_cut() -> None:
    assert refused(port="x" * 5000) == f"--port: got '{'x' * 79}…; allowed is a whole number from 0 to 65535"


def test_all_mistakes_are_told_at_once() -> None:
    assert len(refused(port=-1, max_streams=-1, host="").splitlines()) == 3


def test_bad_processors_leave_one_message() -> None:
    assert len(refused(processors=5).splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(config="~/none.toml") == "/home/anna/none.toml: cannot be read: No such file or directory"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"a = '\xff'")
    assert refused(config=binary) == f"{binary}: not UTF-8 at byte 5; save it as UTF-8"


def test_pipelines_from_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text("[pipelines.agent]\nprocessors = ['echo']\ntalk_back = false\n")
    monkeypatch.setenv("STREAMSINK_CONFIG", str(file))
    agent = Pipeline(processors=["echo"], talk_back=False)
    assert load(processors=["mine.py:Tap"]).pipelines == {
        "default": Pipeline(processors=["mine.py:Tap"]),
        "agent": agent,
    }


def test_speech_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("streamsink.toml").write_text("[speech]\nsynthesizer = 'command'\nvoice = 'slt'\ncommand = 'flite -t {text}'")
    assert load().speech == SpeechSettings(synthesizer="command", command="flite -t {text}", voice="slt")
    monkeypatch.setenv("STREAMSINK_SPEECH", "espeak")
    assert refused() == "environment variable STREAMSINK_SPEECH: speech can only be set in streamsink.toml"


def test_processors_of_a_stronger_source_replace_those_of_the_default_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("streamsink.toml").write_text("[pipelines.default]\nprocessors = ['echo']\ntalk_back = false\n")
    assert load().pipelines == {"default": Pipeline(processors=["echo"], talk_back=False)}
    monkeypatch.setenv("STREAMSINK_PROCESSORS", "record;echo")
    assert load().pipelines == {"default": Pipeline(processors=["record", "echo"], talk_back=False)}
    assert load(processors=["parrot"]).pipelines == {"default": Pipeline(processors=["parrot"], talk_back=False)}


def test_the_state_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/lib/state")
    assert default_state_dir() == Path("/var/lib/state/streamsink")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_state_dir() == Path("/home/anna/.local/state/streamsink")


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "relative")
    assert refused() == "there is no home folder to keep the made token and certificate in; name a folder with --state"
    assert load(state="/var/lib/streamsink").state == Path("/var/lib/streamsink")
