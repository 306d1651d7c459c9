"""`agentbus doctor`: looks at everything, changes nothing, and reports what is wrong and how to repair it.

doctor is a list of checks. Each check is a function that yields findings, and a check that fails is itself a finding.
`doctor PEER` uses the same checks for one question: why would a message to PEER not reach its model?

Implements [DOCTOR-1] to [DOCTOR-6].
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.text import Text

from agentbus import registry
from agentbus.cli import output
from agentbus.core import config, eventloop, files
from agentbus.core.adapter import Manifest
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, BrokenSetup
from agentbus.core.findings import Finding, Level, from_error
from agentbus.core.names import shown_address
from agentbus.core.ports import Trigger, Wake
from agentbus.core.presence import Presence
from agentbus.core.process import Life, one_look
from agentbus.core.stdout import reported
from agentbus.core.text import escaped
from agentbus.doctor.checks import safely
from agentbus.doctor.database import check_database
from agentbus.doctor.environment import (
    check_home,
    check_packages,
    check_place,
    check_presence,
    check_python,
    check_settings,
    check_sqlite,
    settings,
)
from agentbus.doctor.link import check_far, check_link
from agentbus.doctor.peers import check_mailboxes, check_one, check_peers
from agentbus.registry import Triggers

__all__ = ["about", "line", "run", "set_aside"]

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.WRONG: "red"}
# The former names of a code. --json also prints these for one more version, for scripts that look for them. [DOCTOR-1]
_FORMER_CODES = {"client": ("claude",)}
_PINGS = 20
_PING_PATIENCE_S = 2.0


def run(peer: str | None, *, as_json: bool) -> int:
    """Print all findings, or those for `peer`. Return 1 if anything is wrong. Raises InvalidRequest for a bad name."""
    if peer is None:
        with one_look():
            here = None
            with suppress(AgentbusError):  # there is no home to look at, and the finding `settings` says why
                here = settings()
            found = list(_examine(here))
    else:
        found = about(peer)
    out = output.console()
    former = dict(_FORMER_CODES)
    for one in found:
        if as_json:
            # Claude Code's is the first: the clients that came later have had no former names.
            for code in (one.code, *former.pop(one.code, ())):
                output.json_line(
                    {"code": code, "level": one.level.value, "seen": one.seen, "remedy": one.remedy or None}
                )
            continue
        out.print(line(one))
        if one.remedy and one.level is not Level.OK:
            out.print(Text(" " * 20 + "-> ", "dim").append(escaped(one.remedy), "bold"))
    wrong = sum(one.level is Level.WRONG for one in found)
    if not as_json and peer is None:
        out.print(f"{wrong or 'nothing'} {'thing is' if wrong == 1 else 'things are' if wrong else 'is'} wrong")
    return 1 if wrong else 0


def line(one: Finding) -> Text:
    """A finding on one line, without its remedy."""
    text = Text()
    text.append(f"{one.level.value:<6}", _STYLES[one.level])
    return text.append(f"{one.code:<13} {escaped(one.seen)}")


def about(peer: str) -> list[Finding]:
    """What keeps a message to `peer` from its model, or that nothing does. Raises InvalidRequest for a bad name."""
    name = shown_address(peer)
    with one_look():
        return list(_examine_peer(settings(), name))


def set_aside() -> int:
    """Move the database away with everything that belongs to it, and print what was moved; 0. [STORE-8]

    Raises BrokenSetup when it cannot be moved, TryAgain when another process is making one.
    """
    home = settings().home
    path = home / config.HOME_FILES[0]
    config.check_private(home, is_folder=True)
    if not path.exists():
        print(f"{path} is not there, nothing was moved")
        return 0
    presence = Presence(home)
    online = [one for one in _names(presence.folder) if presence.life(one) is Life.LIVES]
    try:
        moved = files.set_aside(path)
    except OSError as error:
        raise BrokenSetup(f"{path} cannot be moved ({error.strerror})", hint=config.unwritable(path, error)) from error
    with reported():
        for one in moved:
            print(f"moved to {one}")
        if online:
            sessions = "1 session that is running joins" if len(online) == 1 else f"{len(online)} running sessions join"
            print(f"{sessions} a new, empty bus within 15 s")
        print(f"to look into it: sqlite3 '{moved[0]}'")
    return 0


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []  # nobody ever was online here


def _examine(here: Settings | None) -> Iterator[Finding]:
    yield from safely("python", check_python)
    yield from safely("packages", check_packages)
    yield from safely("sqlite", check_sqlite)
    yield from safely("settings", check_settings)
    if here is None:
        yield from _check_modules()
        return
    yield from safely("home", lambda: check_home(here))
    yield from safely("path", lambda: check_place(here.home))
    yield from safely("presence", lambda: check_presence(here.home))
    yield from safely("database", lambda: check_database(here.home))
    yield from safely("trigger", lambda: _check_triggers(here))
    yield from _check_modules()
    yield from safely("peer", lambda: check_peers(here))
    yield from safely("mailbox", lambda: check_mailboxes(here.home))
    yield from safely("link", lambda: check_link(here.home))


# -- triggers and adapters ---------------------------------------------------------------------------------


def _check_triggers(here: Settings) -> Iterator[Finding]:
    """Arm the trigger that a session would arm, and nudge it."""
    # Arming creates the trigger's folder. If the home has none, arm in a temporary folder instead. [DOCTOR-2]
    with tempfile.TemporaryDirectory(prefix="agentbus-") as elsewhere:
        for trigger in Triggers(here).preferred():
            is_there = (here.home / (trigger.folder or "")).is_dir()
            triggers = Triggers(replace(here, root=here.root if is_there else elsewhere))
            try:
                finding = eventloop.run(_ping, triggers[trigger.name])
            finally:
                triggers.close()
            yield finding
            if finding.level is Level.OK:
                return


async def _ping(trigger: Trigger) -> Finding:
    endpoint = trigger.endpoint(os.urandom(6).hex())
    times_ms: list[float] = []
    try:
        async with trigger.arm(endpoint) as wakes:
            for _ in range(_PINGS):
                began = time.perf_counter()
                if trigger.notify(endpoint) is Wake.PENDING:
                    return Finding(
                        "trigger", Level.OK, f"{trigger.name}: nothing wakes the sessions, they check by themselves"
                    )
                if not await wakes.wait(_PING_PATIENCE_S):
                    seen = f"{trigger.name}: a wake did not arrive within {_PING_PATIENCE_S:g} s"
                    return Finding("trigger", Level.WRONG, seen, f"AGENTBUS_TRIGGER={list(registry.TRIGGERS)[-1]}")
                times_ms.append((time.perf_counter() - began) * 1_000)
    except BrokenSetup as error:
        return Finding("trigger", Level.WRONG, f"{trigger.name} cannot be used: {error.args[0]}", error.hint or "")
    middle = statistics.median(times_ms)
    return Finding("trigger", Level.OK, f"{trigger.name}: a wake takes {middle:.2f} ms (median of {_PINGS}, to itself)")


def _check_modules() -> Iterator[Finding]:
    """What each adapter reports about its client. [DOCTOR-4]"""
    found, broken = registry.manifests()
    for error in broken:
        yield from_error("module", error)
    for manifest in found:
        yield from safely("module", partial(_findings, manifest))


def _findings(manifest: Manifest) -> list[Finding]:
    return registry.registration(manifest).findings()


# -- one peer ----------------------------------------------------------------------------------------------


def _examine_peer(here: Settings, name: str) -> Iterator[Finding]:
    """What keeps a message to `name` from its model. [DOCTOR-6]

    Of the checks around the bus, only what is wrong; about the peer, all findings.
    """
    around = [
        *safely("settings", check_settings),
        *safely("home", lambda: check_home(here)),
        *safely("path", lambda: check_place(here.home)),
        *safely("database", lambda: check_database(here.home)),
    ]
    found = [one for one in around if one.level is Level.WRONG]
    if not found:
        found = list(safely("peer", lambda: check_far(here.home, name) if "@" in name else check_one(here, name)))
    wrong = next((one for one in found if one.level is Level.WRONG), None)
    notes = {one.code for one in found if one.level is Level.NOTE}
    if wrong is None and "delivery" in notes:
        is_pull = any("check_messages" in one.seen for one in found if one.code == "delivery")
        until = "its model calls check_messages" if is_pull else "its user prompts it"
        yield Finding("verdict", Level.NOTE, f'a message to "{name}" may wait until {until}: see delivery')
    elif wrong is None and "@" in name:
        yield Finding("verdict", Level.OK, f'a message to "{name}" goes to its machine, where that peer is online')
    elif wrong is None:
        unsure = ", if its account has channels" if "gate" in notes else ""
        yield Finding("verdict", Level.OK, f'a message to "{name}" is pushed into its session{unsure}')
    else:
        yield Finding(
            "verdict", Level.WRONG, f'a message to "{name}" does not reach its model now: see {wrong.code}', ""
        )
    yield from found
