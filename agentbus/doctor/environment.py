"""What doctor finds around the bus: Python, packages, SQLite, settings, the home folder and its location.

They change nothing and open no database. Each function is one check. Implements [DOCTOR-1], [DOCTOR-2].
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from agentbus import registry
from agentbus.core import config
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, BrokenSetup, InvalidRequest
from agentbus.core.findings import Finding, Level, from_error
from agentbus.core.presence import FOLDER, Presence
from agentbus.doctor.readonly import sqlite_version

__all__ = [
    "check_home",
    "check_packages",
    "check_place",
    "check_presence",
    "check_python",
    "check_settings",
    "check_sqlite",
    "settings",
]

_PACKAGE = "agentbus-local"
_LEAST_PYTHON = (3, 11)
# STRICT tables: https://sqlite.org/stricttables.html
_LEAST_SQLITE = (3, 37, 0)
# A WAL needs shared memory, and these do not share memory between machines: https://sqlite.org/wal.html (Overview).
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "9p", "fuse.sshfs", "vboxsf"}
)
# A few large messages and their WAL would use up less than this.
_LEAST_FREE_BYTES = 64 << 20


def settings() -> Settings:
    """The settings. If one of them is invalid, only AGENTBUS_HOME is used, and the others have their defaults.

    Raises InvalidRequest and BrokenSetup when there is no home to use.
    """
    try:
        return config.load()
    except InvalidRequest:
        return config.load({"AGENTBUS_HOME": config.other_program("AGENTBUS_HOME")})


def check_python() -> Iterator[Finding]:
    """Check the Python interpreter."""
    seen = f"Python {platform.python_version()} at {sys.executable}, {platform.system()} {platform.release()}"
    if sys.version_info[:2] >= _LEAST_PYTHON:
        yield Finding("python", Level.OK, seen)
    else:
        least = ".".join(map(str, _LEAST_PYTHON))
        yield Finding("python", Level.WRONG, f"{seen}; agentbus needs {least}", "install it under a newer Python")


def check_packages() -> Iterator[Finding]:
    """Compare the installed dependencies with those that the metadata of agentbus requires."""
    remedy = f"reinstall agentbus: pipx reinstall {_PACKAGE}, or uv tool install --reinstall {_PACKAGE}"
    try:
        asked = metadata.requires(_PACKAGE) or []
        versions = [f"agentbus {metadata.version(_PACKAGE)}"]
    except metadata.PackageNotFoundError:
        yield Finding("packages", Level.NOTE, "agentbus is not installed, it runs from a folder", "")
        return
    for requirement in asked:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", Level.WRONG, f"{name} is not installed", remedy)
            continue
        versions.append(f"{name} {version}")
        if not _fits(version, requirement):
            yield Finding("packages", Level.WRONG, f"{name} is {version}, but agentbus needs {requirement}", remedy)
    yield Finding("packages", Level.OK, ", ".join(versions))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def _fits(version: str, requirement: str) -> bool:
    # Only the two operators that our own metadata uses; pip checks anything else.
    have = _numbers(version)
    for operator, bound in re.findall(r"(>=|<(?!=))\s*([\d.]+)", requirement):
        if (operator == ">=" and have < _numbers(bound)) or (operator == "<" and have >= _numbers(bound)):
            return False
    return True


def check_sqlite() -> Iterator[Finding]:
    """Check the version of the SQLite library."""
    version = sqlite_version()
    if _numbers(version) >= _LEAST_SQLITE:
        yield Finding("sqlite", Level.OK, f"SQLite {version}")
    else:
        least = ".".join(map(str, _LEAST_SQLITE))
        remedy = "install a newer apsw: pip install --upgrade apsw"
        yield Finding("sqlite", Level.WRONG, f"SQLite {version}; agentbus needs {least}", remedy)


def check_settings() -> Iterator[Finding]:
    """Check the AGENTBUS_* variables."""
    is_right = True
    for manifest in registry.manifests()[0]:
        for name, variable in manifest.variables.items():
            try:
                variable.read(name)
            except InvalidRequest as error:
                is_right = False
                yield from_error("settings", error)
    try:
        loaded = config.load()
        if loaded.name_note:
            yield Finding("settings", Level.NOTE, loaded.name_note, "set AGENTBUS_NAME to another name")
    except AgentbusError as error:
        is_right = False
        yield from_error("settings", error)
    known = registry.variables()
    for name in config.unknown(known):
        yield Finding(
            "settings", Level.NOTE, f"{name} is set, but agentbus does not know it", f"use one of {', '.join(known)}"
        )
    said = {name: config.other_program(name) for name in known if config.other_program(name)}
    if is_right:
        shown = ", ".join(f"{name}={value}" for name, value in said.items())
        yield Finding("settings", Level.OK, shown or "no AGENTBUS_* variable is set")


def check_home(here: Settings) -> Iterator[Finding]:
    """Check who owns the home folder, its files and its folders, and who can write to them. [TRUST-1]"""
    home = here.home
    if not os.path.lexists(home):
        above = next(one for one in home.parents if os.path.isdir(one))
        yield _not_writable(above, home) or Finding(
            "home", Level.NOTE, f"{home} does not exist yet", "the first message or session creates it"
        )
        return
    is_right = True
    folders = [home, *(home / name for name in registry.folders(here))]
    files = [home / name for name in config.HOME_FILES]
    for path in (*folders, *files):
        try:
            config.check_private(path, is_folder=path in folders)
        except BrokenSetup as error:
            is_right = False
            yield from_error("home", error)
    shut = _not_writable(home, home / config.HOME_FILES[0])
    if shut is not None and is_right:
        yield shut
    if not is_right or shut is not None:
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    seen = f"{home} belongs to user {home.stat().st_uid}, mode {mode:04o}"
    if mode & (stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH):
        yield Finding("home", Level.NOTE, f"{seen}: other users have access to it", f"chmod go-rwx '{home}'")
    else:
        yield Finding("home", Level.OK, f"{seen}: only you have access to it")


def _not_writable(folder: Path, path: Path) -> Finding | None:
    """What is wrong if `path` cannot be made in `folder`; None if nothing speaks against it."""
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    seen = f"nothing can be written in {folder}, so nothing can be sent"
    return Finding("home", Level.WRONG, seen, config.unwritable(path))


def check_presence(home: Path) -> Iterator[Finding]:
    """Check whether the file system of the home can lock, as sessions show by a lock that they live. [PRES-1]"""
    # The check makes a file for a moment: if there is no folder for it yet, it does so elsewhere. [DOCTOR-2]
    with tempfile.TemporaryDirectory(prefix="agentbus-") as elsewhere:
        is_there = (home / FOLDER).is_dir()
        can_lock = Presence(home if is_there else Path(elsewhere)).can_lock()
    where = home / FOLDER
    if can_lock:
        yield Finding("presence", Level.OK, f"a session is online for as long as it holds its lock in {where}")
    else:
        seen = f"{where} is on a file system that cannot lock: sessions are known by their sockets and by their beats"
        yield Finding("presence", Level.NOTE, seen, "set AGENTBUS_HOME to a folder on a local disk")


def check_place(home: Path) -> Iterator[Finding]:
    """Check the length of the home's path, its file system, and the free space there."""
    length = len(os.fsencode(home / "sock" / ("x" * 12 + ".sock")))
    limit = 107 if sys.platform == "linux" else 103
    if length <= limit:
        yield Finding("path", Level.OK, f"a socket path there has {length} bytes, the limit is {limit}")
    else:
        yield Finding(
            "path",
            Level.NOTE,
            f"a socket path there would have {length} bytes, the limit is {limit}: sockets use a shorter path",
            "",
        )
    there = next(path for path in (home, *home.parents) if path.exists())
    kind = _file_system(there)
    if kind in _NETWORK:
        remedy = "set AGENTBUS_HOME to a folder on a local disk"
        yield Finding("file-system", Level.WRONG, f"{there} is on {kind}, which cannot share a WAL", remedy)
    else:
        yield Finding("file-system", Level.OK, f"{there} is on {kind or 'an unknown file system'}")
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        yield Finding("disk", Level.NOTE, f"the free space for {there} is unknown ({error.strerror})", "")
        return
    seen = f"{free / (1 << 20):,.0f} MiB are free for {there}"
    level = Level.OK if free >= _LEAST_FREE_BYTES else Level.WRONG
    yield Finding("disk", level, seen, "" if level is Level.OK else "free some space: a full disk refuses every send")


def _file_system(path: Path) -> str:
    """The type of the file system of `path`, as proc_pid_mountinfo(5) names it; empty on systems without that file."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real, best, kind = os.path.realpath(path) + "/", -1, ""
    for line in lines:
        mounted, _, rest = line.partition(" - ")
        point = mounted.split()[4].encode().decode("unicode_escape").rstrip("/") + "/"
        # Later lines are mounted over earlier ones.
        if real.startswith(point) and len(point) >= best:
            best, kind = len(point), rest.split()[0]
    return kind
