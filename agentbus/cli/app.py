"""The command line: parse with typer, call the command. No SQL, no socket, no MCP here.

__main__.py parses `send` and `serve` when they are used; they are also here for `--help`. Each command imports what it
needs when it runs. Implements [CLI-3], [CLI-4], [CLI-6].
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from agentbus import __version__
from agentbus.cli import common
from agentbus.core.errors import AgentbusError, InvalidRequest

__all__ = ["app", "run"]

app = typer.Typer(
    name="agentbus",
    help="A local message bus for AI-agent sessions on one machine.",
    epilog="AGENTBUS_HOME chooses the folder of the bus, ~/.agentbus by default. "
    "Exit codes: 0 done, 1 failed, 2 usage error, 75 try again later.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SETUP = "Setup"

# typer raises this for an invalid command line. It exports only the child class, not this one.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="NAME",
        help="As whom. By default: the session that runs this command, else AGENTBUS_NAME, else your login name.",
    ),
]
_Text = Annotated[str | None, typer.Argument(metavar="[TEXT]", help="The text; left out or -, it is read from stdin.")]


_Json = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


def _names(incomplete: str) -> list[str]:
    """Complete a name, from the peers that are online and the mailboxes in which mail waits."""
    try:
        return common.known_names(incomplete)
    except AgentbusError:
        return []  # completion cannot show an error; the command itself will report it


def run(arguments: list[str]) -> int:
    """Parse `arguments` and run the command. Return the exit code.

    Raises AgentbusError: among others InvalidRequest, for an invalid command line.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A message can hold characters that the locale cannot show. They are shown escaped, and the rest as it is.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not standalone: typer would print a usage error as a box of five lines. [ERR-2]
        return app(args=arguments or ["--help"], prog_name="agentbus", standalone_mode=False) or 0
    except _UsageError as error:
        message: str = getattr(error, "format_message", error.__str__)()
        command: str = getattr(getattr(error, "ctx", None), "command_path", "agentbus")
        raise InvalidRequest(message.rstrip("."), hint=f"see {command} --help") from error
    except typer.Abort:
        raise KeyboardInterrupt from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"agentbus {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def send(
    to: Annotated[str, typer.Argument(help="A peer's name, online or not.", autocompletion=_names)],
    text: _Text = None,
    sender: _From = None,
    wait_read: Annotated[
        str | None,
        typer.Option(
            "--wait-read",
            metavar="SECONDS",
            help="Return once the message is known to be read; exit code 75 if it is not within SECONDS.",
        ),
    ] = None,
) -> None:
    """Send a message to a peer; it waits in the mailbox when the peer is offline.

    Example: agentbus send backend "the build is green"
    """
    if wait_read is None:
        common.send(to, text, sender=sender)
        return
    from agentbus.cli import wait

    wait.send_until_read(to, text, sender=sender, seconds=wait.parse_seconds("--wait-read", wait_read))


@app.command()
def broadcast(text: _Text = None, sender: _From = None) -> None:
    """Send a message to every peer that is online.

    Example: agentbus broadcast --from ci "main is frozen until noon"
    """
    common.broadcast(text, sender=sender)


@app.command()
def peers(as_json: _Json = False) -> None:
    """Show who is online, and for whom messages wait.

    Example: agentbus peers --json
    """
    common.peers(as_json=as_json)


@app.command()
def inbox(
    name: Annotated[
        str | None,
        typer.Argument(help="Whose mailbox; by default the one that `send` would send as.", autocompletion=_names),
    ] = None,
    limit: Annotated[str, typer.Option(metavar="N", help="At most so many, the oldest first.")] = "20",
    as_json: _Json = False,
) -> None:
    """Show what a mailbox holds that is not known to be read. Takes nothing out.

    Example: agentbus inbox backend
    """
    from agentbus.cli import messages

    messages.inbox(name, limit=messages.parse_whole("--limit", limit), as_json=as_json)


@app.command()
def history(
    peer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only what NAME sent or got.", autocompletion=_names)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="90s, 10m, 2h, 3d ago, or 2026-01-31T12:00.")
    ] = None,
    grep: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only texts that match, as a regular expression.")
    ] = None,
    limit: Annotated[str, typer.Option(metavar="N", help="At most so many, the newest.")] = "50",
    as_json: _Json = False,
    as_a2a: Annotated[bool, typer.Option("--a2a", help="One A2A Message per line, as JSON.")] = False,
) -> None:
    """Show past messages, whoever they were for. Delivered ones are kept for AGENTBUS_RETENTION_HOURS, 24 by default.

    Example: agentbus history --peer backend --since 2h --grep port
    """
    from agentbus.cli import messages

    count = messages.parse_whole("--limit", limit)
    messages.history(peer=peer, since=since, grep=grep, limit=count, as_json=as_json, as_a2a=as_a2a)


@app.command()
def status(
    row_id: Annotated[str, typer.Argument(metavar="ID", help="The number that `send` printed.")],
    as_json: _Json = False,
) -> None:
    """Show one message: whether it is pending, delivered or read, and when it became that.

    Example: agentbus status 42
    """
    from agentbus.cli import messages

    messages.status(messages.parse_whole("the id", row_id.removeprefix("#")), as_json=as_json)


@app.command()
def watch(as_json: _Json = False) -> None:
    """Watch who comes and goes, and each message as it becomes pending, delivered and read. Ctrl-C ends it.

    Example: agentbus watch
    """
    from agentbus.cli import watch

    watch.watch(as_json=as_json)


@app.command()
def wait(
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Be online as NAME; by default as `send` would send.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="Give up after so long, with exit code 75.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Join as a peer, print the next message, leave: for scripts, hooks and CI. Its text alone goes to stdout.

    Example: answer=$(agentbus wait --name ci --timeout 60)
    """
    from agentbus.cli import wait

    seconds = None if timeout is None else wait.parse_seconds("--timeout", timeout)
    raise typer.Exit(wait.wait(name, timeout_s=seconds, as_json=as_json))


_Module = Annotated[str, typer.Argument(metavar="MODULE", help="What `agentbus list` calls it: claude-mcp.")]


@app.command(rich_help_panel=_SETUP)
def install() -> None:
    """Register agentbus with the agents on this machine, for all your projects, and say what to run next.

    Example: agentbus install
    """
    from agentbus.cli import setup

    setup.install()


@app.command("list", rich_help_panel=_SETUP)
def list_modules(as_json: _Json = False) -> None:
    """Show the modules, and how each stands: enabled, not enabled, stale, shadowed.

    Example: agentbus list
    """
    from agentbus.cli import setup

    raise typer.Exit(setup.show(as_json=as_json))


@app.command(rich_help_panel=_SETUP)
def enable(module: _Module) -> None:
    """Register a module with its client, or mend its registration.

    Example: agentbus enable claude-mcp
    """
    from agentbus.cli import setup

    setup.enable(module)


@app.command(rich_help_panel=_SETUP)
def disable(module: _Module) -> None:
    """End the registration of a module. Mailboxes and history stay.

    Example: agentbus disable claude-mcp
    """
    from agentbus.cli import setup

    setup.disable(module)


@app.command(rich_help_panel=_SETUP)
def launch(
    module: _Module,
    name: Annotated[str | None, typer.Argument(help="What the session is to be called; else after its folder.")] = None,
) -> None:
    """Print the command that starts the client of a module with all that it needs.

    Example: eval "$(agentbus launch claude-mcp backend)"
    """
    from agentbus.cli import setup

    setup.launch(module, name)


@app.command(rich_help_panel=_SETUP)
def doctor(
    peer: Annotated[
        str | None,
        typer.Argument(help="Only: why would a message to PEER not reach its model?", autocompletion=_names),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Look at everything and change nothing; say what is wrong and what mends it. Exit code 1 if anything is wrong.

    Example: agentbus doctor backend
    """
    from agentbus import doctor as looks

    raise typer.Exit(looks.run(peer, as_json=as_json))


@app.command(rich_help_panel=_SETUP)
def uninstall(
    keep_mail: Annotated[bool, typer.Option("--keep-mail", help="Leave the mailboxes and the history.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while sessions are online.")] = False,
) -> None:
    """Remove the registration, then the mailboxes and all else in AGENTBUS_HOME that is agentbus's.

    Example: agentbus uninstall --keep-mail
    """
    from agentbus.cli import setup

    setup.uninstall(keep_mail=keep_mail, force=force)


@app.command(rich_help_panel=_SETUP)
def serve(module: _Module) -> None:
    """Connect an agent to the bus; started by the agent's client, not by hand.

    Example: agentbus serve claude-mcp
    """
    common.serve(module)


@app.command(rich_help_panel=_SETUP)
def demo() -> None:
    """Watch two real sessions talk, on a bus of their own; takes a few seconds and leaves nothing behind.

    Example: agentbus demo
    """
    from agentbus.cli import demo as show

    raise typer.Exit(show.run())
