"""The command line: parse with typer, call the command. No SQL, no socket, no MCP here.

__main__.py parses `send`, `ask` and `serve` when they are used; they are also here for `--help`. Each command imports
what it needs when it runs. Implements [CLI-3], [CLI-4], [CLI-6].
"""

from __future__ import annotations

from typing import Annotated

import typer

from agentbus import __version__
from agentbus.cli import common
from agentbus.core.config import SHARED
from agentbus.core.errors import AgentbusError, InvalidRequest

__all__ = ["app", "run"]

app = typer.Typer(
    name="agentbus",
    help="A local message bus for AI-agent sessions on one machine.",
    epilog="AGENTBUS_HOME sets the folder of the bus (default: ~/.agentbus). "
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
        help="The sender. Default: the session that runs this command, else AGENTBUS_NAME, else your login name.",
    ),
]
_Text = Annotated[
    str | None, typer.Argument(metavar="[TEXT]", help="The message. If it is - or missing, it is read from stdin.")
]


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
    to: Annotated[str, typer.Argument(help="A peer's name, online or not, or @GROUP.", autocompletion=_names)],
    text: _Text = None,
    sender: _From = None,
    wait_read: Annotated[
        str | None,
        typer.Option(
            "--wait-read",
            metavar="SECONDS",
            help="Wait until the message is known to be read. Exit code 75 if that takes longer than SECONDS.",
        ),
    ] = None,
    reply_to: Annotated[
        str | None, typer.Option("--reply-to", metavar="ID", help="The number of the message that this answers.")
    ] = None,
) -> None:
    """Send a message to a peer. If the peer is offline, the message waits in its mailbox.

    Example: agentbus send backend "the build is green"
    """
    if wait_read is None:
        common.send(to, text, sender=sender, reply_to=reply_to)
        return
    from agentbus.cli import wait

    seconds = common.parse_seconds("--wait-read", wait_read)
    wait.send_until_read(to, text, sender=sender, seconds=seconds, reply_to=reply_to)


@app.command()
def ask(
    to: Annotated[str, typer.Argument(help="A peer's name.", autocompletion=_names)],
    text: _Text = None,
    sender: _From = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="Wait for SECONDS, 60 by default. Exit code 75 without an answer. If given, also a peer that is "
            "offline is waited for.",
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Ask a peer and wait for its answer. Only the text of the answer goes to stdout.

    Example: port=$(agentbus ask backend "which port does the API listen on?")
    """
    from agentbus.cli import ask

    raise typer.Exit(ask.ask(to, text, sender=sender, timeout=timeout, as_json=as_json))


@app.command()
def broadcast(
    text: _Text = None,
    sender: _From = None,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="Also to those on other machines.")] = False,
) -> None:
    """Send a message to every peer that is online on this machine.

    Example: agentbus broadcast --from ci "main is frozen until noon"
    """
    common.broadcast(text, sender=sender, everywhere=everywhere)


@app.command()
def peers(as_json: _Json = False) -> None:
    """Show the peers that are online, and the names that have waiting messages.

    Example: agentbus peers --json
    """
    common.peers(as_json=as_json)


@app.command()
def inbox(
    name: Annotated[
        str | None,
        typer.Argument(help="The mailbox. Default: the name that `send` would use.", autocompletion=_names),
    ] = None,
    limit: Annotated[str, typer.Option(metavar="N", help="Show at most N messages, oldest first.")] = "20",
    as_json: _Json = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Remove these messages for good, and print what was removed.")
    ] = False,
    before: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="With --discard: only messages sent before WHEN, an age (3d) or a time."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --discard: do not ask.")] = False,
) -> None:
    """Show the messages in a mailbox that are not known to be read. Takes nothing out, unless --discard is given.

    Example: agentbus inbox backend
    """
    from agentbus.cli import messages

    if discard:
        messages.discard(name, before=before, is_sure=yes, as_json=as_json)
        return
    if before is not None or yes:
        raise InvalidRequest("--before and --yes belong to --discard", hint="agentbus inbox NAME --discard --before 3d")
    messages.inbox(name, limit=common.parse_whole("--limit", limit), as_json=as_json)


@app.command()
def history(
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only messages that NAME sent or received, or sent to @GROUP.", autocompletion=_names
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="Only messages since WHEN: an age (90s, 10m, 2h, 3d) or a time (2026-01-31T12:00)."
        ),
    ] = None,
    grep: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only messages whose text matches this regular expression.")
    ] = None,
    thread: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only the thread of the message ID: what it answers, and what answers it."),
    ] = None,
    limit: Annotated[str, typer.Option(metavar="N", help="Show at most N messages, the newest.")] = "50",
    as_json: _Json = False,
    as_a2a: Annotated[bool, typer.Option("--a2a", help="One A2A Message per line, as JSON.")] = False,
) -> None:
    """Show past messages of all mailboxes. Delivered ones are kept for 30 days: see agentbus config.

    Example: agentbus history --peer backend --since 2h --grep port
    """
    from agentbus.cli import messages

    messages.history(
        peer=peer,
        since=since,
        grep=grep,
        thread=None if thread is None else common.parse_whole("--thread", thread.removeprefix("#")),
        limit=common.parse_whole("--limit", limit),
        as_json=as_json,
        as_a2a=as_a2a,
    )


@app.command()
def search(
    words: Annotated[
        list[str],
        typer.Argument(metavar="WORDS", help='All of these words; also OR, NOT, ( ), word* and "a phrase".'),
    ],
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only messages that NAME sent or received, or sent to @GROUP.", autocompletion=_names
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Only messages since WHEN: an age (2h, 3d) or a time.")
    ] = None,
    thread: Annotated[
        str | None, typer.Option(metavar="ID", help="Only messages of the conversation that message ID belongs to.")
    ] = None,
    limit: Annotated[str, typer.Option(metavar="N", help="Show at most N messages, the best first.")] = "20",
    as_json: _Json = False,
) -> None:
    """Find messages by their words, the best match first. The first search of a long history takes some seconds.

    Example: agentbus search port 'migrat*' --since 3d
    """
    from agentbus.cli import search as finder

    row_id = None if thread is None else common.parse_whole("--thread", thread.removeprefix("#"))
    count = common.parse_whole("--limit", limit)
    finder.search(words, peer=peer, since=since, thread=row_id, limit=count, as_json=as_json)


@app.command()
def prune(
    before: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Only messages delivered before WHEN, an age (3d) or a time."),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only messages that NAME sent or received, or sent to @GROUP.", autocompletion=_names
        ),
    ] = None,
    pending: Annotated[
        bool, typer.Option("--pending", help="Also messages that are still pending, and were sent before WHEN.")
    ] = False,
) -> None:
    """Remove delivered messages for good, at once. With neither option: those older than the bus keeps them.

    Example: agentbus prune --before 7d
    """
    from agentbus.cli import messages

    messages.prune(before=before, peer=peer, with_pending=pending)


@app.command()
def status(
    row_id: Annotated[str, typer.Argument(metavar="ID", help="The number that `send` printed.")],
    as_json: _Json = False,
) -> None:
    """Show one message, its state (pending, delivered or read), and the time of each change.

    Example: agentbus status 42
    """
    from agentbus.cli import messages

    messages.status(common.parse_whole("the id", row_id.removeprefix("#")), as_json=as_json)


@app.command()
def cancel(row_id: Annotated[str, typer.Argument(metavar="ID", help="The number that `send` printed.")]) -> None:
    """Take back a message that is still pending. What a session has taken cannot be taken back.

    Example: agentbus cancel 42
    """
    from agentbus.cli import messages

    messages.cancel(common.parse_whole("the id", row_id.removeprefix("#")))


@app.command()
def watch(as_json: _Json = False) -> None:
    """Watch peers join and leave, and each message as it becomes pending, delivered and read. Ctrl-C ends it.

    Example: agentbus watch
    """
    from agentbus.cli import watch

    watch.watch(as_json=as_json)


@app.command()
def console(
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Who you are. Default: AGENTBUS_NAME, else your login name."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bell when a message for you comes.")] = False,
    notify: Annotated[bool, typer.Option("--notify", help="Show messages for you on the desktop too.")] = False,
) -> None:
    """Open one window on the bus: who is there, what was said, what waits for you. Answer it, or stop it.

    Example: agentbus console
    """
    from agentbus import console

    console.run(name, is_quiet=quiet, is_shown=notify)


@app.command()
def wait(
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Join as NAME. Default: the name that `send` would use.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="Give up after SECONDS, with exit code 75.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Join as a peer, print the next message, and leave. For scripts, hooks and CI: only its text goes to stdout.

    Example: answer=$(agentbus wait --name ci --timeout 60)
    """
    from agentbus.cli import wait

    seconds = None if timeout is None else common.parse_seconds("--timeout", timeout)
    raise typer.Exit(wait.wait(name, timeout_s=seconds, as_json=as_json))


_Group = Annotated[
    str, typer.Argument(metavar="@GROUP", help="The group, as @review; the @ can be left out.", autocompletion=_names)
]
_As = Annotated[
    str | None,
    typer.Option("--as", metavar="NAME", help="The member. Default: the name that `send` would use."),
]
_Whom = Annotated[str | None, typer.Argument(metavar="[NAME]", help="The session.", autocompletion=_names)]


@app.command()
def groups(as_json: _Json = False) -> None:
    """Show the groups and their members. A message to a group goes to each other member, online or not.

    Example: agentbus groups
    """
    from agentbus.cli import groups

    groups.groups(as_json=as_json)


@app.command()
def join(group: _Group, name: _As = None) -> None:
    """Make a name a member of a group. It stays one while no session has that name, until it leaves.

    Example: agentbus join @review --as backend
    """
    from agentbus.cli import groups

    groups.join(group, name)


@app.command()
def leave(group: _Group, name: _As = None) -> None:
    """End the membership of a name in a group.

    Example: agentbus leave @review --as backend
    """
    from agentbus.cli import groups

    groups.leave(group, name)


@app.command()
def pause(
    name: _Whom = None,
    everybody: Annotated[bool, typer.Option("--all", help="All sessions that are online.")] = False,
    span: Annotated[
        str | None,
        typer.Option("--for", metavar="SPAN", help="End it by itself after SPAN (90s, 10m, 2h, 3d)."),
    ] = None,
) -> None:
    """Stop a session from sending, and hold its mail back, until it is resumed. For you alone: no session can do it.

    Example: agentbus pause backend --for 2h
    """
    from agentbus.cli import brakes

    brakes.pause(name, is_all=everybody, span=span)


@app.command()
def resume(
    name: _Whom = None,
    everybody: Annotated[bool, typer.Option("--all", help="All sessions that are paused.")] = False,
) -> None:
    """Let a paused session go on; what has waited for it comes at once. Its hourly count begins anew.

    Example: agentbus resume backend
    """
    from agentbus.cli import brakes

    brakes.resume(name, is_all=everybody)


_Module = Annotated[
    str, typer.Argument(metavar="MODULE", help="The module, as `agentbus list` shows it, for example claude-mcp.")
]


@app.command(rich_help_panel=_SETUP)
def install() -> None:
    """Register agentbus with the agents on this machine, for all your projects, and print what to run next.

    Example: agentbus install
    """
    from agentbus.cli import setup

    setup.install()


@app.command("list", rich_help_panel=_SETUP)
def list_modules(as_json: _Json = False) -> None:
    """Show the modules and the state of each: enabled, not enabled, stale or shadowed.

    Example: agentbus list
    """
    from agentbus.cli import setup

    raise typer.Exit(setup.show(as_json=as_json))


@app.command(rich_help_panel=_SETUP)
def enable(module: _Module) -> None:
    """Register a module with its client, or repair its registration.

    Example: agentbus enable claude-mcp
    """
    from agentbus.cli import setup

    setup.enable(module)


@app.command(rich_help_panel=_SETUP)
def disable(module: _Module) -> None:
    """Remove the registration of a module. Mailboxes and history stay.

    Example: agentbus disable claude-mcp
    """
    from agentbus.cli import setup

    setup.disable(module)


@app.command(rich_help_panel=_SETUP)
def launch(
    module: _Module,
    name: Annotated[
        str | None, typer.Argument(help="The name of the session. Default: the name of its folder.")
    ] = None,
) -> None:
    """Print the command that starts the client of a module, with all options that it needs.

    Example: eval "$(agentbus launch claude-mcp backend)"
    """
    from agentbus.cli import setup

    setup.launch(module, name)


@app.command(rich_help_panel=_SETUP)
def doctor(
    peer: Annotated[
        str | None,
        typer.Argument(help="Check only whether a message to PEER would reach its model.", autocompletion=_names),
    ] = None,
    as_json: _Json = False,
    set_aside: Annotated[
        bool,
        typer.Option(
            "--set-aside", help="Move a damaged database away, with all that belongs to it. The rest is a new bus."
        ),
    ] = False,
) -> None:
    """Check everything and change nothing. Report what is wrong and how to fix it. Exit code 1 if anything is wrong.

    Example: agentbus doctor backend
    """
    from agentbus import doctor as looks

    if set_aside:
        if peer is not None:
            raise InvalidRequest("--set-aside takes no PEER", hint="agentbus doctor --set-aside")
        raise typer.Exit(looks.set_aside())
    raise typer.Exit(looks.run(peer, as_json=as_json))


@app.command(rich_help_panel=_SETUP)
def config(
    key: Annotated[
        str | None, typer.Argument(help="The setting. Default: show all.", autocompletion=lambda: list(SHARED))
    ] = None,
    value: Annotated[str | None, typer.Argument(help="The new value. Default: show the present one.")] = None,
    as_json: _Json = False,
) -> None:
    """Show or set what holds for everybody on the bus. It is kept in the database.

    Example: agentbus config retention-hours 2160
    """
    from agentbus.cli import config

    config.config(key, value, as_json=as_json)


_link = typer.Typer(
    help="Carry mail to sessions on other machines, NAME@MACHINE, by a NATS server.\n\nExample: agentbus link status",
    no_args_is_help=True,
)
app.add_typer(_link, name="link", rich_help_panel=_SETUP)
_Machines = Annotated[list[str], typer.Argument(metavar="MACHINE...", help="The names of machines.")]
_In = Annotated[str, typer.Option("--in", metavar="FOLDER", help="The folder that `link init` wrote.")]


@_link.command("init")
def link_init(
    machines: _Machines,
    at: Annotated[str, typer.Option(metavar="HOST[:PORT]", help="Where the machines reach the server.")],
    mesh: Annotated[str, typer.Option(metavar="NAME", help="What the machines are called together.")] = "team",
    folder: Annotated[str | None, typer.Option("--in", metavar="FOLDER", help="Default: the name of the mesh.")] = None,
) -> None:
    """Write the configuration of a NATS server, and an invite for each machine. Starts nothing.

    Example: agentbus link init --at nats.example.net laptop buildbox
    """
    from agentbus.cli import link

    link.init(machines, mesh=mesh, at=at, folder=folder)


@_link.command("add")
def link_add(machines: _Machines, folder: _In = "team") -> None:
    """Let more machines in: write an invite for each.

    Example: agentbus link add tablet --in team
    """
    from agentbus.cli import link

    link.add(machines, folder=folder)


@_link.command("remove")
def link_remove(machines: _Machines, folder: _In = "team") -> None:
    """Let machines in no more.

    Example: agentbus link remove ci --in team
    """
    from agentbus.cli import link

    link.remove(machines, folder=folder)


@_link.command("join")
def link_join(
    invite: Annotated[str, typer.Argument(metavar="INVITE", help="The file that `link init` or `link add` wrote.")],
) -> None:
    """Make this home the machine that an invite is for.

    Example: agentbus link join laptop.invite
    """
    from agentbus.cli import link

    link.join(invite)


@_link.command("run")
def link_run() -> None:
    """Carry mail between this home and the other machines, until Ctrl-C.

    Example: agentbus link run
    """
    from agentbus.cli import link

    link.run()


@_link.command("service")
def link_service() -> None:
    """Print what makes the system start the link by itself.

    Example: agentbus link service > ~/.config/systemd/user/agentbus-link.service
    """
    from agentbus.cli import link

    link.service()


@_link.command("status")
def link_status(as_json: _Json = False) -> None:
    """Show how the link is, and the machines that it knows.

    Example: agentbus link status
    """
    from agentbus.cli import link

    link.status(as_json=as_json)


@_link.command("leave")
def link_leave() -> None:
    """Be no machine of the mesh any more. The mail stays.

    Example: agentbus link leave
    """
    from agentbus.cli import link

    link.leave()


@app.command(rich_help_panel=_SETUP)
def uninstall(
    keep_mail: Annotated[bool, typer.Option("--keep-mail", help="Keep the mailboxes and the history.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Uninstall even while sessions are online.")] = False,
) -> None:
    """Remove the registration, then the mailboxes and all other files of agentbus in AGENTBUS_HOME.

    Example: agentbus uninstall --keep-mail
    """
    from agentbus.cli import setup

    setup.uninstall(keep_mail=keep_mail, force=force)


@app.command(rich_help_panel=_SETUP)
def serve(module: _Module) -> None:
    """Connect an agent to the bus. The agent's client runs this command, not you.

    Example: agentbus serve claude-mcp
    """
    common.serve(module)


@app.command(rich_help_panel=_SETUP)
def demo() -> None:
    """Watch two real sessions talk on a separate bus. Takes a few seconds and leaves nothing behind.

    Example: agentbus demo
    """
    from agentbus.cli import demo as show

    raise typer.Exit(show.run())
