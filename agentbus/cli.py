"""The command line: parse with typer, call commands.py. No SQL, no socket, no MCP here.

`send` and `serve` are parsed by __main__.py when they are used, and are here for `--help`. Implements [CLI-1],
[CLI-3], [CLI-4].
"""

from __future__ import annotations

from typing import Annotated

import typer

from agentbus import __version__, commands
from agentbus.errors import InvalidRequest

__all__ = ["app", "run"]

app = typer.Typer(
    name="agentbus",
    help="A local message bus for AI-agent sessions on one machine.",
    epilog="AGENTBUS_HOME chooses the folder of the bus, ~/.agentbus by default. "
    "Exit codes: 0 done, 1 failed, 2 asked wrongly, 75 try again later.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What typer raises for a command line that makes no sense; it exports the child, not this.
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


def run(arguments: list[str]) -> int:
    """Parse `arguments` and run the command; the exit code.

    Raises AgentbusError, InvalidRequest for a command line that makes no sense among them.
    """
    try:
        # Not standalone: typer would print a usage error as a box of five lines. [ERR-2]
        return app(args=arguments, prog_name="agentbus", standalone_mode=False) or 0
    except _UsageError as error:
        message: str = getattr(error, "format_message", error.__str__)()
        raise InvalidRequest(message.rstrip("."), hint="see agentbus --help") from error
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
    to: Annotated[str, typer.Argument(help="A peer's name, online or not.")],
    text: _Text = None,
    sender: _From = None,
) -> None:
    """Send a message to a peer; it waits in the mailbox when the peer is offline.

    Example: agentbus send backend "the build is green"
    """
    commands.send(to, text, sender=sender)


@app.command()
def broadcast(text: _Text = None, sender: _From = None) -> None:
    """Send a message to every peer that is online.

    Example: agentbus broadcast --from ci "main is frozen until noon"
    """
    commands.broadcast(text, sender=sender)


@app.command()
def peers(as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False) -> None:
    """Show who is online, and for whom messages wait.

    Example: agentbus peers --json
    """
    commands.peers(as_json=as_json)


@app.command()
def serve(adapter: Annotated[str, typer.Argument(help="The adapter: claude-mcp.")]) -> None:
    """Connect an agent to the bus; started by the agent's client, not by hand.

    Example: claude mcp add --scope user agentbus -- agentbus serve claude-mcp
    """
    commands.serve(adapter)


@app.command()
def demo() -> None:
    """Watch two real sessions talk, on a bus of their own; takes a few seconds and leaves nothing behind.

    Example: agentbus demo
    """
    from agentbus.adapters.claude_mcp import demo as show

    raise typer.Exit(show.run())
