"""The commands of the link, apart from parsing. What needs the server's library is loaded when it is used.

Implements [LINK-7] to [LINK-10], [OUT-1].
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agentbus import member, registry
from agentbus.cli import common
from agentbus.core import config
from agentbus.core.errors import AgentbusError, Refused
from agentbus.core.linkstore import LinkStore
from agentbus.core.machines import Machine
from agentbus.core.model import timestamp
from agentbus.core.stderr import say
from agentbus.core.stdout import reported
from agentbus.core.text import MAX_REASON_CHARS, one_line

__all__ = ["add", "init", "join", "leave", "remove", "run", "service", "status"]


def init(machines: Sequence[str], *, mesh: str, at: str, folder: str | None) -> None:
    """Write what a server needs, and an invite for each machine. Starts nothing."""
    _print(registry.link("admin:init")(mesh, at, machines, Path(folder or mesh)))


def add(machines: Sequence[str], *, folder: str) -> None:
    """Let more machines in."""
    _print(registry.link("admin:add")(Path(folder), machines))


def remove(machines: Sequence[str], *, folder: str) -> None:
    """Let machines in no more."""
    _print(registry.link("admin:remove")(Path(folder), machines))


def join(invite: str) -> None:
    """Make this home the machine that the invite is for."""
    settings = config.load(is_person=True)
    config.prepare_home(settings.home)
    lines = registry.link("admin:join")(settings.home, Path(invite))
    machine = registry.link("settings:load")(settings.home).machine
    with common.bus_and_settings(make_store=LinkStore) as (bus, _settings):
        assert isinstance(bus.store, LinkStore)
        bus.store.begin(machine)  # from now on mail for other machines waits, also before the link runs
    _print(lines)


def _print(lines: Sequence[str]) -> None:
    with reported():
        for line in lines:
            print(line)


class _OneLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.name}: {one_line(record.getMessage(), MAX_REASON_CHARS)}")


def run() -> None:
    """Be the link of this home until a signal. Raises what ends it."""
    import anyio

    settings = config.load(is_person=True)
    # What the library has to say, on one line, and never a traceback.
    logging.basicConfig(level=logging.ERROR, handlers=[_OneLine()])
    link = registry.link("settings:load")(settings.home)
    relay = registry.link("nats:NatsRelay")(link)
    carry = registry.link("run:run")
    anyio.run(partial(_run, settings, link, relay, carry))


async def _run(settings: config.Settings, link: Any, relay: Any, carry: Any) -> None:
    import anyio

    stopped = anyio.Event()
    try:
        async with anyio.create_task_group() as tasks:
            await tasks.start(common.when_signalled, lambda _number: stopped.set())
            say(f'"{link.machine}" in the mesh "{link.mesh}", by {relay.place}; Ctrl-C ends it')
            await carry(settings, link, relay, join=member.peer_session, say=say, stopped=stopped)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """The error that a person has to read: ours, if there is one."""
    mine, others = group.split(AgentbusError)
    one: BaseException = mine or others or group
    while isinstance(one, BaseExceptionGroup):
        one = one.exceptions[0]
    return one


_UNIT = """\
[Unit]
Description=agentbus link: mail for agent sessions on other machines
After=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={command} link run
Environment=AGENTBUS_HOME={home}
Restart=always
RestartSec=5

[Install]
WantedBy=default.target
"""
_AGENT = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
  <key>Label</key><string>agentbus.link</string>
  <key>ProgramArguments</key><array>{words}</array>
  <key>EnvironmentVariables</key><dict><key>AGENTBUS_HOME</key><string>{home}</string></dict>
  <key>KeepAlive</key><true/>
</dict></plist>
"""


def service() -> None:
    """Print what makes the system start the link, and say where it goes. Changes nothing. [LINK-10]"""
    settings = config.load(is_person=True)
    registry.link("settings:load")(settings.home)
    command = [sys.executable, "-E", "-P", "-m", "agentbus"]
    if sys.platform == "darwin":
        words = "".join(f"<string>{_for_xml(word)}</string>" for word in [*command, "link", "run"])
        text, where = (
            _AGENT.format(words=words, home=_for_xml(str(settings.home))),
            "~/Library/LaunchAgents/agentbus.link.plist",
        )
        then = f"launchctl load -w {where}"
    else:
        text = _UNIT.format(command=" ".join(map(_for_unit, command)), home=_for_unit(str(settings.home)))
        where = "~/.config/systemd/user/agentbus-link.service"
        then = "systemctl --user enable --now agentbus-link, and loginctl enable-linger to have it without a login"
    with reported():
        print(text, end="")
    say(f"put this into {where}, then: {then}")


def _for_unit(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _for_xml(word: str) -> str:
    return word.replace("&", "&amp;").replace("<", "&lt;")


def leave() -> None:
    """Be no machine of the mesh any more. What waits for other machines stays here. [LINK-10]"""
    settings = config.load(is_person=True)
    files = [settings.home / name for name in config.LINK_FILES]
    with common.bus_and_settings(make_store=LinkStore) as (bus, _settings):
        peer = bus.store.link()
        if peer is not None:
            raise Refused("the link runs", hint=f"end it first: kill {peer.process.pid}")
        waiting = sum(bus.store.machines.waiting().values())
        assert isinstance(bus.store, LinkStore)
        bus.store.leave_mesh()
    removed = [str(path) for path in files if path.exists()]
    for path in files:
        path.unlink(missing_ok=True)
    with reported():
        print(f"removed: {', '.join(removed)}" if removed else "this home had no link")
        if waiting:
            what = "1 message for another machine stays" if waiting == 1 else f"{waiting:,} messages for others stay"
            print(f"{what} here, and will not leave any more")


def status(*, as_json: bool) -> None:
    """Show how the link is, and every machine that was heard of."""
    settings = config.load(is_person=True)
    link = registry.link("settings:load")(settings.home)
    with common.bus_and_settings() as (bus, _settings):
        peer = bus.store.link()
        facts, machines, waiting = bus.store.machines.facts(), bus.machines(), bus.store.machines.waiting()
        now = bus.clock()
    if as_json:
        from agentbus.cli import output

        output.json_line(
            {
                "machine": link.machine,
                "mesh": link.mesh,
                "servers": list(link.servers),
                "pid": peer.process.pid if peer is not None else None,
                "connected_since": timestamp(int(facts["since"])) if peer is not None and "since" in facts else None,
                "trouble": facts.get("trouble") or None,
            }
        )
        for one in machines:
            output.json_line(_machine_row(one, waiting.get(one.name, 0)))
        return
    print(f'this home is "{link.machine}" in the mesh "{link.mesh}"')
    print(common.link_line(facts, machines, waiting, now, is_running=peer is not None))


def _machine_row(machine: Machine, waiting: int) -> dict[str, Any]:
    """A machine as JSON."""
    return {
        "machine": machine.name,
        "online": machine.is_there,
        "last_heard": timestamp(machine.seen_at),
        "clock_ahead_ms": machine.skew_ms,
        "waiting": waiting,
        "peers": [peer.name for peer in machine.peers] if machine.is_there else [],
    }
