"""The command line: what was typed → Settings → serve, repair, simulate, stream-obj, processors."""

from __future__ import annotations

import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

import click
import typer
from rich.console import Console
from rich.table import Table

from streamsink.errors import ConfigError, StreamsinkError

app = typer.Typer(
    name="streamsink",
    help="The endpoint for SignalWire conference streams. Without a command: serve.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

_COMMANDS = frozenset({"serve", "repair", "simulate", "stream-obj", "processors"})
_GLOBAL = frozenset({"--help", "-h", "--version"})


def main() -> NoReturn:
    """Run the command line; the exit status is 0, 1 for an error that was explained, 2 for a wrong use."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] not in _COMMANDS and arguments[0] not in _GLOBAL):
        arguments = ["serve", *arguments]
    try:
        app(arguments, prog_name="streamsink")
    except StreamsinkError as error:
        sys.exit(f"streamsink: {error}")
    sys.exit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamsink {version('streamsink')}")
        raise typer.Exit


@app.callback()
def _streamsink(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# --- serve -----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [0.0.0.0, with --no-tls 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks one. [8443]")] = None,
    cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM. [self-signed, made once]")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    no_tls: Annotated[bool | None, typer.Option("--no-tls", help="Plain ws://, behind a proxy that has TLS.")] = None,
    token: Annotated[
        list[str] | None, typer.Option(metavar="[NAME:]T", help="Bearer token of streams; repeatable. [made once]")
    ] = None,
    no_auth: Annotated[bool | None, typer.Option("--no-auth", help="Take streams from anyone.")] = None,
    admin_token: Annotated[str | None, typer.Option(help="Token of metrics and API. [made once]")] = None,
    processor: Annotated[
        list[str] | None, typer.Option("--processor", "-p", metavar="SPEC", help="Repeatable. [record]")
    ] = None,
    recordings: Annotated[Path | None, typer.Option(help="Folder of the recordings. [./recordings]")] = None,
    min_free: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Room on its disk below which nothing new is recorded. [200M]")
    ] = None,
    public_url: Annotated[str | None, typer.Option(help="The URL that peers use, behind a tunnel or proxy.")] = None,
    max_streams: Annotated[int | None, typer.Option(help="Streams at once. [no limit]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve streams. [1]")] = None,
    bus: Annotated[str | None, typer.Option(help="What carries rooms between processes: nats://HOST:PORT.")] = None,
    capture: Annotated[Path | None, typer.Option(help="Folder to keep raw messages in.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of the made token and certificate.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file. [./streamsink.toml if there]")] = None,
    l16_byteorder: Annotated[str | None, typer.Option(help="little, big or auto. [little]")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. [text]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [info]")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="How long live streams may go on. [60]")] = None,
) -> None:
    """Be the endpoint (the default command)."""
    from streamsink import log
    from streamsink.config import load

    settings = load(
        host=host,
        port=port,
        cert=cert,
        key=key,
        no_tls=no_tls,
        tokens=token,
        no_auth=no_auth,
        admin_token=admin_token,
        processors=processor,
        recordings=recordings,
        min_free=min_free,
        public_url=public_url,
        max_streams=max_streams,
        workers=workers,
        bus=bus,
        capture=capture,
        state=state,
        config=config,
        l16_byteorder=l16_byteorder,
        log_format=log_format,
        log_level=log_level,
        drain_seconds=drain_seconds,
    )
    log.configure(settings.log_format, settings.log_level)
    from streamsink.server import Server

    class Announced(Server):
        def started(self) -> None:
            _announce(self)

    server = Announced(settings)
    if settings.workers == 1:
        server.run()
    else:
        from streamsink.workers import Supervisor

        Supervisor(server).run()


def _announce(server: object) -> None:
    """Say where the endpoint listens, and print what to paste."""
    from streamsink import tls
    from streamsink.server import Server
    from streamsink.stream_object import StreamObject

    assert isinstance(server, Server)
    say = typer.echo
    say(f"listening on {server.url}")
    if server.certificate is not None:
        made = " (self-signed)" if server.settings.cert is None else ""
        say(f"certificate{made}: {server.certificate}")
        say(f"  SHA-256 {tls.fingerprint(server.certificate)}")
    if server.access.tokens is None:
        typer.echo("WARNING: --no-auth is on: anyone who reaches this port can stream to it", err=True)
    elif server.access.token_file is not None:
        say(f"token: {server.access.token_file}")
    if server.access.admin_file is not None:
        say(f"admin token: {server.access.admin_file}")
    public = urlsplit(server.public_url)
    say(f"status_url: {public.scheme.replace('ws', 'http')}://{public.netloc}/status/{server.access.status_secret}")
    if server.settings.no_tls and server.settings.public_url is None:
        say("no stream_obj to paste: a platform needs wss://; say with --public-url what your proxy is called")
    else:
        token = server.access.made_token
        if token is None and server.access.tokens is not None:
            token = "<one of your tokens>"
        paste = StreamObject(url=server.public_url, realtime=True, authorization_bearer_token=token)
        say("stream_obj to paste:")
        say(paste.render("python"))
    sys.stdout.flush()


# --- repair ----------------------------------------------------------------------------------------------------------


@app.command()
def repair(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the recordings.")]) -> None:
    """Make playable what a crash left (also done at each start)."""
    from streamsink.processors import repair as repairing

    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: name the one recordings lie in")
    failed = False
    for done in repairing.repair(folder):
        if done.problem is not None:
            failed = failed or not done.in_use
            typer.echo(f"{done.stem}: left as it is: {done.problem}", err=not done.in_use)
        elif done.files:
            typer.echo(f"{done.stem}: {', '.join(done.files)}")
        else:
            typer.echo(f"{done.stem}: nothing was recorded, the name is free again")
    raise typer.Exit(failed)


# --- simulate --------------------------------------------------------------------------------------------------------


@app.command()
def simulate(
    file: Annotated[Path | None, typer.Argument(help="Any sound file that libsndfile reads.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Play a capture back instead of a file.")] = None,
    url: Annotated[str, typer.Option(help="Where the endpoint is.")] = "wss://localhost:8443/",
    token: Annotated[str | None, typer.Option(help="Bearer token. [the one serve made on this machine]")] = None,
    cafile: Annotated[Path | None, typer.Option(help="Certificate to trust. [the one serve made]")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Accept any certificate.")] = False,
    codec: Annotated[str, typer.Option(help='Such as "L16@24000h@40i".')] = "PCMU",
    param: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Custom parameter; repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="The stream's friendly name.")] = None,
    streams: Annotated[int, typer.Option(help="Streams at once.")] = 1,
    loop: Annotated[bool, typer.Option("--loop", help="Play the file again and again.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Length of the call; a shorter file is played again. [the file's]")
    ] = None,
    dtmf: Annotated[str, typer.Option(help="Digits to press, such as 12#.")] = "",
    lose: Annotated[float, typer.Option(metavar="P", help="Share of frames to skip.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Picks which frames are skipped.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write what came back, as WAV.")] = None,
    expect_echo: Annotated[bool, typer.Option("--expect-echo", help="A missing reply is a loss.")] = False,
    no_pong: Annotated[bool, typer.Option("--no-pong", help="Leave pings unanswered, as the platform does.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    state: Annotated[Path | None, typer.Option(help="Where serve keeps its token and certificate.")] = None,
) -> None:
    """Play a sound file to an endpoint as a conference would."""
    from streamsink.config import default_state_dir
    from streamsink.loop import new_event_loop
    from streamsink.simulator import SimulateOptions, run

    if (file is None) == (replay is None):
        raise click.UsageError("give a sound FILE, or --replay with a capture")
    kept = state or default_state_dir()
    options = SimulateOptions(
        file=file,
        replay=replay,
        url=url,
        token=_kept_token(kept) if token is None and _is_here(url) else token,
        cafile=cafile if cafile is not None else _kept_certificate(kept),
        insecure=insecure,
        codec=codec,
        param=param or (),
        name=name,
        streams=streams,
        loop=loop,
        seconds=seconds,
        dtmf=dtmf,
        lose=lose,
        seed=seed,
        save=save,
        expect_echo=expect_echo,
        no_pong=no_pong,
        json=json,
    )
    raise typer.Exit(run(options, new_event_loop))


def _is_here(url: str) -> bool:
    """Whether a URL means this machine: a kept token goes nowhere else unasked."""
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname(), socket.getfqdn()}


def _kept_token(state: Path) -> str | None:
    from streamsink.auth import STREAM_TOKEN_FILE

    try:
        return (state / STREAM_TOKEN_FILE).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _kept_certificate(state: Path) -> Path | None:
    from streamsink.tls import CERTIFICATE_FILE

    path = state / CERTIFICATE_FILE
    return path if path.exists() else None


# --- stream-obj and processors ---------------------------------------------------------------------------------------


@app.command("stream-obj")
def stream_obj(
    url: Annotated[str | None, typer.Option(help="wss:// URL of the endpoint. [this machine, port 8443]")] = None,
    format: Annotated[str, typer.Option(help="python, relay, swml or cxml.")] = "python",
    codec: Annotated[str | None, typer.Option(help='Such as "L16@24000h@40i". [PCMU]')] = None,
    name: Annotated[str | None, typer.Option(help="The stream's friendly name.")] = None,
    realtime: Annotated[bool, typer.Option(help="Whether the endpoint may send audio back.")] = True,
    token: Annotated[str | None, typer.Option(help="Bearer token. [the one serve made on this machine]")] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Custom parameter; repeatable.")] = None,
    status_url: Annotated[str | None, typer.Option(help="Where status webhooks go.")] = None,
    status_url_method: Annotated[str | None, typer.Option(help="GET or POST. [POST]")] = None,
    state: Annotated[Path | None, typer.Option(help="Where serve keeps its token.")] = None,
) -> None:
    """Print the stream_obj to paste."""
    from streamsink.config import default_state_dir
    from streamsink.stream_object import StreamObject

    parameters = {}
    for item in param or ():
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--param takes K=V, got {item!r}")
        parameters[key] = value
    made = StreamObject(
        url=url or f"wss://{socket.gethostname()}:8443/",
        codec=codec,
        name=name,
        realtime=realtime,
        authorization_bearer_token=token if token is not None else _kept_token(state or default_state_dir()),
        custom_parameters=parameters or None,
        status_url=status_url,
        status_url_method=status_url_method,
    )
    typer.echo(made.render(format))


@app.command()
def processors() -> None:
    """List what --processor can name, with the options of each."""
    from streamsink.plugins import catalogue

    table = Table("name", "what it does", "options", "from", box=None, pad_edge=False)
    for listing in catalogue():
        options = [f"{o.name}: {o.type}" + ("" if o.default is None else f" = {o.default}") for o in listing.options]
        table.add_row(listing.name, listing.problem or listing.summary, "\n".join(options) or "–", listing.origin)
    Console().print(table)
