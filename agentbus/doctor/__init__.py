"""`agentbus doctor`: looks at everything, changes nothing, and says what is wrong and what mends it.

A list of checks, each a function that yields findings; one that fails is a finding itself. `doctor PEER` asks one
question of the same checks: why would a message to PEER not reach its model? Implements [DOCTOR-1] to [DOCTOR-6].
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
from rich.text import Text

from agentbus import registry
from agentbus.cli import output
from agentbus.core import database, process
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, BrokenSetup
from agentbus.core.findings import Finding, Level, from_error
from agentbus.core.model import normalise_name
from agentbus.core.ports import Trigger, Wake
from agentbus.doctor.environment import (
    check_home,
    check_packages,
    check_place,
    check_python,
    check_settings,
    check_sqlite,
    settings,
)
from agentbus.doctor.peers import ask, check_mailboxes, check_peers
from agentbus.doctor.readonly import Inspection
from agentbus.registry import Triggers

__all__ = ["run"]

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.WRONG: "red"}
_PINGS = 20
_PING_PATIENCE_S = 2.0
# A WAL that is merged has 4 MiB; one of this size is not merged any more.
_LARGE_WAL_BYTES = 64 << 20


def run(peer: str | None, *, as_json: bool) -> int:
    """Print all findings, or those for `peer`; 1 if anything is wrong. Raises InvalidRequest for a bad name."""
    name = None if peer is None else normalise_name(peer)
    here = settings()
    found = list(_examine(here) if name is None else _examine_peer(here, name))
    out = output.console()
    for one in found:
        if as_json:
            row = {"code": one.code, "level": one.level.value, "seen": one.seen, "remedy": one.remedy or None}
            output.json_line(row)
            continue
        text = Text()
        text.append(f"{one.level.value:<6}", _STYLES[one.level])
        out.print(text.append(f"{one.code:<13} {output.printable(one.seen, lines=False)}"))
        if one.remedy and one.level is not Level.OK:
            out.print(Text(" " * 20 + "-> ", "dim").append(output.printable(one.remedy, lines=False), "bold"))
    wrong = sum(one.level is Level.WRONG for one in found)
    if not as_json and name is None:
        out.print(f"{wrong or 'nothing'} {'thing is' if wrong == 1 else 'things are' if wrong else 'is'} wrong")
    return 1 if wrong else 0


def _safely(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; its failure is one more. [DOCTOR-3]"""
    try:
        yield from check()
    except AgentbusError as error:
        yield from_error(what, error)
    except Exception as error:  # noqa: BLE001 - a doctor that falls over its patient helps nobody: it is said instead
        seen = f"this could not be looked at ({type(error).__name__}: {error})"
        yield Finding(what, Level.WRONG, seen, "agentbus doctor --json, and report it")


def _examine(here: Settings) -> Iterator[Finding]:
    yield from _safely("python", check_python)
    yield from _safely("packages", check_packages)
    yield from _safely("sqlite", check_sqlite)
    yield from _safely("settings", check_settings)
    yield from _safely("home", lambda: check_home(here))
    yield from _safely("path", lambda: check_place(here.home))
    yield from _safely("database", lambda: _check_database(here.home))
    yield from _safely("trigger", lambda: _check_triggers(here))
    yield from _check_modules()
    yield from _safely("peer", lambda: check_peers(here))
    yield from _safely("mailbox", lambda: check_mailboxes(here.home))


# -- the database ------------------------------------------------------------------------------------------


def _check_database(home: Path) -> Iterator[Finding]:
    path = home / "bus.db"
    if not path.exists():
        yield Finding("database", Level.NOTE, f"{path} is not there yet", "the first message or session makes it")
        return
    with Inspection(path) as inspection:
        yield from _safely("database", lambda: _check_integrity(inspection))
        yield from _safely("schema", lambda: _check_schema(inspection))
        yield from _safely("wal", lambda: _check_wal(inspection))
        yield from _safely("lock", lambda: _check_lock(inspection))


def _check_integrity(inspection: Inspection) -> Iterator[Finding]:
    size = inspection.path.stat().st_size / (1 << 20)
    try:
        complaints = inspection.integrity()
    except TimeoutError:
        seen = f"{inspection.path}, {size:,.1f} MiB, is too large to be checked in passing"
        yield Finding("database", Level.NOTE, seen, f"sqlite3 '{inspection.path}' 'PRAGMA quick_check'")
        return
    if complaints:
        remedy = f"keep it for a rescue and start anew: mv '{inspection.path}' '{inspection.path}.broken'"
        yield Finding("database", Level.WRONG, f"{inspection.path} is damaged: {complaints[0]}", remedy)
    else:
        yield Finding("database", Level.OK, f"{inspection.path}, {size:,.1f} MiB, passes quick_check")


def _check_schema(inspection: Inspection) -> Iterator[Finding]:
    version, latest = inspection.schema(), database.latest_version()
    if inspection.is_foreign():
        remedy = "set AGENTBUS_HOME to a folder of its own"
        yield Finding("schema", Level.WRONG, f"{inspection.path} is a database of another program", remedy)
    elif version > latest:
        remedy = "upgrade agentbus, or set AGENTBUS_HOME to another folder"
        yield Finding("schema", Level.WRONG, f"schema {version}, this agentbus knows up to {latest}", remedy)
    elif version < latest:
        seen = f"schema {version}, the next message or session brings it to {latest}"
        yield Finding("schema", Level.NOTE, seen, "agentbus peers does so too")
    else:
        yield Finding("schema", Level.OK, f"schema {version}, as this agentbus has it")


def _check_wal(inspection: Inspection) -> Iterator[Finding]:
    size = inspection.wal_bytes()
    if size > _LARGE_WAL_BYTES:
        seen = f"the WAL has {size / (1 << 20):,.0f} MiB, and is not merged: some program keeps an old state open"
        yield Finding("wal", Level.WRONG, seen, f"find it with lsof '{inspection.path}', and end it")
    elif inspection.unmerged():
        seen = "nobody has the database open, and there is a WAL that is not merged: it is left out of what follows"
        yield Finding("wal", Level.NOTE, seen, "agentbus peers merges it")
    else:
        yield Finding("wal", Level.OK, f"the WAL has {size / 1024:,.0f} KiB")


def _check_lock(inspection: Inspection) -> Iterator[Finding]:
    if not inspection.is_locked():
        yield Finding("lock", Level.OK, "nobody keeps the database locked")
        return
    holder = inspection.lock_holder()
    seen = f"{inspection.path} is locked: nothing can be sent, messages wait with their senders"
    if holder is None:
        yield Finding("lock", Level.WRONG, seen, f"find who holds it with lsof '{inspection.path}', and end that")
        return
    started = process.look_up(holder)
    words = " ".join(process.arguments(started))[:80] if started is not None else ""
    yield Finding(
        "lock", Level.WRONG, f"{seen}; process {holder} holds it ({words})", f"let it finish, or kill {holder}"
    )


# -- triggers and modules ----------------------------------------------------------------------------------


def _check_triggers(here: Settings) -> Iterator[Finding]:
    """Arm what a session would arm, and nudge it."""
    # Arming makes the folder of its trigger: where there is none, another place has to do. [DOCTOR-2]
    with tempfile.TemporaryDirectory(prefix="agentbus-") as elsewhere:
        for trigger in Triggers(here).preferred():
            is_there = (here.home / (trigger.folder or "")).is_dir()
            triggers = Triggers(replace(here, home=here.home if is_there else Path(elsewhere)))
            try:
                finding = anyio.run(_ping, triggers[trigger.name])
            finally:
                triggers.close()
            yield finding
            if finding.level is Level.OK:
                return


async def _ping(trigger: Trigger) -> Finding:
    endpoint = trigger.endpoint("doctor" + os.urandom(3).hex())
    times_ms: list[float] = []
    try:
        async with trigger.arm(endpoint) as wakes:
            for _ in range(_PINGS):
                began = time.perf_counter()
                if trigger.notify(endpoint) is Wake.PENDING:
                    return Finding(
                        "trigger", Level.OK, f"{trigger.name}: sessions look by themselves, nothing wakes them"
                    )
                if not await wakes.wait(_PING_PATIENCE_S):
                    seen = f"{trigger.name}: a wake did not arrive within {_PING_PATIENCE_S:g} s"
                    return Finding("trigger", Level.WRONG, seen, "AGENTBUS_TRIGGER=poll")
                times_ms.append((time.perf_counter() - began) * 1_000)
    except BrokenSetup as error:
        return Finding("trigger", Level.WRONG, f"{trigger.name} cannot be used: {error.args[0]}", error.hint or "")
    middle = statistics.median(times_ms)
    return Finding("trigger", Level.OK, f"{trigger.name}: a wake takes {middle:.2f} ms (median of {_PINGS}, to itself)")


def _check_modules() -> Iterator[Finding]:
    """What each module says of its client. [DOCTOR-4]"""
    found, broken = registry.manifests()
    for error in broken:
        yield from_error("module", error)
    for manifest in found:
        yield from _safely("module", lambda manifest=manifest: registry.registration(manifest).findings())  # type: ignore[misc]


# -- one peer ----------------------------------------------------------------------------------------------


def _examine_peer(here: Settings, name: str) -> Iterator[Finding]:
    """What keeps a message to `name` from its model: of everything what is wrong, of the peer all. [DOCTOR-6]"""
    around = [
        *_safely("settings", check_settings),
        *_safely("home", lambda: check_home(here)),
        *_safely("path", lambda: check_place(here.home)),
        *_safely("database", lambda: _check_database(here.home)),
    ]
    found = [one for one in around if one.level is Level.WRONG]
    if not found:
        found = list(_safely("peer", lambda: ask(here, name)))
    wrong = next((one for one in found if one.level is Level.WRONG), None)
    notes = {one.code for one in found if one.level is Level.NOTE}
    if wrong is None and "delivery" in notes:
        seen = f'a message to "{name}" may wait until its model calls check_messages: see delivery'
        yield Finding("verdict", Level.NOTE, seen)
    elif wrong is None:
        unsure = ", if its account has channels" if "gate" in notes else ""
        yield Finding("verdict", Level.OK, f'a message to "{name}" is pushed into its session{unsure}')
    else:
        yield Finding(
            "verdict", Level.WRONG, f'a message to "{name}" does not reach its model now: see {wrong.code}', ""
        )
    yield from found
