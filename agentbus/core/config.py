"""Reads the settings from the environment, and checks whether the home folder can be trusted.

The only reader of os.environ. Knows nothing about SQL, sockets or MCP. Implements [CONF-1], [CONF-2] and
[TRUST-1].
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress

from agentbus.core.errors import BrokenSetup, InvalidRequest
from agentbus.core.names import address, folder_wish, group_name, session_name
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "HOME_FILES",
    "LINK_FILES",
    "MEMBER_DAYS",
    "RETENTION",
    "SHARED",
    "UNKNOWN_FOLDER",
    "VARIABLES",
    "WATCH_FOLDER",
    "Settings",
    "Shared",
    "check_private",
    "choice",
    "expanded",
    "integer",
    "load",
    "other_program",
    "prepare_folder",
    "prepare_home",
    "unknown",
    "unwritable",
    "working_folder",
]

# Shown as the folder of a session whose working folder was removed, or cannot be read. No path begins like this.
UNKNOWN_FOLDER = "?"
DEFAULT_MAX_BYTES = 65_536
# A tool call and its channel event hold the text as JSON, escaped; much more would choke a client's line reader.
HIGHEST_MAX_BYTES = 1_048_576
DEFAULT_POLL_MS = 1_000
SYNC_MODES = ("normal", "full")
# The database, and the files that SQLite puts beside it. The folders of the home belong to triggers, watchers and
# adapters.
HOME_FILES = ("bus.db", "bus.db-wal", "bus.db-shm", "bus.db-owner")
# The settings of the link to other machines, its key, and the certificate of its server's authority. [LINK-7]
LINK_FILES = ("link.toml", "link.key", "link-ca.pem")
# Where watchers bind their sockets. [WATCH-1]
WATCH_FOLDER = "watch"
VARIABLES = (
    "AGENTBUS_GROUPS",
    "AGENTBUS_HOME",
    "AGENTBUS_MAX_BYTES",
    "AGENTBUS_MEMBER_DAYS",
    "AGENTBUS_NAME",
    "AGENTBUS_POLL_MS",
    "AGENTBUS_RETENTION_HOURS",
    "AGENTBUS_SYNC",
    "AGENTBUS_TRIGGER",
)


@dataclass(frozen=True, slots=True)
class Shared:
    """A setting that concerns everybody on a bus, so it is kept in its database: a whole number from `low` to `high`.

    `variable` can raise it for the bus when a session starts, and never lowers it. `meaning` is for people. [CONF-5]
    """

    key: str
    default: int
    low: int
    high: int
    variable: str
    meaning: str

    def check(self, raw: str) -> int:
        """The number in `raw`. Raises InvalidRequest."""
        return _whole(f"the value of {self.key}", raw, self.low, self.high, "use")


# For how long a delivered message is kept, in hours: 30 days, as long as it is known who a session was. [STATE-4]
RETENTION = Shared(
    key="retention-hours",
    default=720,
    low=1,
    high=8_760,
    variable="AGENTBUS_RETENTION_HOURS",
    meaning="how long delivered messages are kept, in hours",
)
# For how long a member of a group can be away, in days. One session with a short value in its environment must not end
# the memberships of all, so the bus has it. [GROUP-5]
MEMBER_DAYS = Shared(
    key="member-days",
    default=30,
    low=1,
    high=3_650,
    variable="AGENTBUS_MEMBER_DAYS",
    meaning="how long a member of a group can be away, in days",
)
SHARED = {one.key: one for one in (RETENTION, MEMBER_DAYS)}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every `AGENTBUS_*` variable, checked. `name` is the name that the session wishes for; a person's can be empty.

    `root` is the home folder, as text: what a send runs does without pathlib, whose import takes 4 ms.
    `name_note` says, in one sentence, why `name` is not what AGENTBUS_NAME asked for; empty when it is.
    `retention_hours` is 0 if AGENTBUS_RETENTION_HOURS is unset: the setting of the bus holds. So is `member_days`.
    `groups` are those that a session joins at its start.
    """

    root: str
    name: str
    name_note: str
    name_was_asked: bool
    trigger: str | None
    poll_ms: int
    sync: str
    max_bytes: int
    retention_hours: int
    cwd: str
    # What the session is named after, if it is given no name. [NAME-9]
    folder: str = ""
    groups: tuple[str, ...] = ()
    member_days: int = 0

    @property
    def home(self) -> Path:
        """The home folder."""
        from pathlib import Path

        return Path(self.root)


def load(
    environ: Mapping[str, str] | None = None,
    *,
    home: str | Path | None = None,
    folder: str = "",
    is_person: bool = False,
) -> Settings:
    """The settings in `environ` (os.environ by default). `home` takes precedence over AGENTBUS_HOME.

    A session that is given no name is named after `folder`, by default the working folder. [NAME-3] With `is_person`
    they are those of a shell, which can have the names that are kept from sessions. [NAME-11]

    Raises InvalidRequest, naming the variable, its value and its range, and BrokenSetup as `expanded` does.
    """
    env = os.environ if environ is None else environ
    cwd = working_folder() or UNKNOWN_FOLDER
    asked = env.get("AGENTBUS_NAME", "")
    name, note = _wished_name(asked, folder or cwd, is_person=is_person)
    root = env.get("AGENTBUS_HOME") or "~/.agentbus"
    return Settings(
        root=_root("AGENTBUS_HOME", root) if home is None else _root("home", str(home)),
        name=name,
        name_note=note,
        name_was_asked=bool(asked) and not note,
        trigger=env.get("AGENTBUS_TRIGGER") or None,
        poll_ms=_integer(env, "AGENTBUS_POLL_MS", DEFAULT_POLL_MS, 10, 60_000),
        sync=_choice(env, "AGENTBUS_SYNC", SYNC_MODES),
        max_bytes=_integer(env, "AGENTBUS_MAX_BYTES", DEFAULT_MAX_BYTES, 1, HIGHEST_MAX_BYTES),
        retention_hours=_integer(env, RETENTION.variable, 0, RETENTION.low, RETENTION.high),
        cwd=cwd,
        folder=folder or cwd,
        groups=_groups(env.get("AGENTBUS_GROUPS", "")),
        member_days=_integer(env, MEMBER_DAYS.variable, 0, MEMBER_DAYS.low, MEMBER_DAYS.high),
    )


def working_folder() -> str:
    """The working folder; "" if it cannot be told: it was removed, or a folder above it is closed to us."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def expanded(path: str, variable: str) -> str:
    """`path`, which `variable` can name, with a leading `~` expanded.

    Raises BrokenSetup where nothing says what `~` is: then each program would take another folder for it.
    """
    if path != "~" and not path.startswith("~/"):
        return os.path.expanduser(path)
    said = home = os.environ.get("HOME", "")
    if not said:
        with suppress(KeyError):  # a user id without an entry, as in some containers
            home = pwd.getpwuid(os.getuid()).pw_dir
    if not os.path.isabs(home):
        problem = f"HOME is {said[:80]!r}" if said else f"HOME is not set, and user {os.getuid()} has no home folder"
        raise BrokenSetup(
            f"{problem}, so nothing says where {path} is", hint=f"set HOME, or {variable}, to a path that begins with /"
        )
    return os.path.join(home, path[2:])


def _root(what: str, said: str) -> str:
    """The home that `what`, a variable or an argument, names. Another folder for each program would be another bus."""
    home = expanded(said, what)
    if not os.path.isabs(home):
        raise InvalidRequest(
            f"{what} is {said[:80]!r}, which would be another bus in each working folder",
            hint="set it to a path that begins with / or ~/, with nothing in it left to expand",
        )
    try:
        home.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{what} is {said[:80]!r}, and SQLite opens no path that is not UTF-8") from None
    return os.path.normpath(home)


def unknown(known: Collection[str]) -> list[str]:
    """The AGENTBUS_* variables that are set and not among `known`: probably misspelt."""
    return sorted(name for name in os.environ if name.startswith("AGENTBUS_") and name not in known)


def other_program(variable: str) -> str:
    """The value of another program's variable (its folder of settings, say); empty when it is unset."""
    return os.environ.get(variable, "")


def integer(variable: str, default: int, low: int, high: int) -> int:
    """The whole number that a variable holds. Raises InvalidRequest for one that is not from `low` to `high`."""
    return _integer(os.environ, variable, default, low, high)


def choice(variable: str, choices: tuple[str, ...]) -> str:
    """The word that a variable holds, by default the first of `choices`. Raises InvalidRequest for any other."""
    return _choice(os.environ, variable, choices)


def _wished_name(asked: str, folder: str, *, is_person: bool) -> tuple[str, str]:
    note = ""
    if asked:
        try:
            return (address if is_person else session_name)(asked), ""
        except InvalidRequest as error:
            # A session with another name is better than none, as long as the note says so.
            note = f"AGENTBUS_NAME is not usable ({error})"
    if is_person:
        return "", note  # the login name: it is looked up when it is needed
    fallback = folder_wish(folder)
    return fallback, f'{note}; the name is "{fallback}"' if note else ""


def _groups(said: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(group_name(one) for one in said.split(",") if one.strip()))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"AGENTBUS_GROUPS is {said[:80]!r} ({error})", hint="set it to names with a comma between them, or unset it"
        ) from None


def _integer(env: Mapping[str, str], variable: str, default: int, low: int, high: int) -> int:
    raw = env.get(variable, "").strip()
    return _whole(variable, raw, low, high, "set it to", ", or unset it") if raw else default


def _whole(what: str, raw: str, low: int, high: int, do: str, otherwise: str = "") -> int:
    try:
        value = int(raw)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise InvalidRequest(f"{what} is {raw[:40]!r}", hint=f"{do} a whole number from {low:,} to {high:,}{otherwise}")
    return value


def _choice(env: Mapping[str, str], variable: str, choices: tuple[str, ...]) -> str:
    raw = env.get(variable, "").strip().lower()
    if raw and raw not in choices:
        raise InvalidRequest(f"{variable} is {raw[:40]!r}", hint=f"set it to {' or '.join(choices)}, or unset it")
    return raw or choices[0]


def check_private(path: str | Path, *, is_folder: bool) -> None:
    """Refuse `path` unless it is ours, not a symlink, and nobody else can write to it. [TRUST-1]

    A path that does not exist is fine. Raises BrokenSetup with the command that fixes it.
    """
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise BrokenSetup(
            f"{path} cannot be accessed ({error.strerror})", hint="set AGENTBUS_HOME to a folder that you can write"
        ) from error
    kind = "folder" if is_folder else "file"
    if stat.S_ISLNK(facts.st_mode):
        raise BrokenSetup(f"{path} is a symlink", hint=f"put a real {kind} there, or set AGENTBUS_HOME to its target")
    if is_folder and not stat.S_ISDIR(facts.st_mode):
        raise BrokenSetup(f"{path} is not a folder", hint=f"move it away: mv '{path}' '{path}.old'")
    if facts.st_uid != os.geteuid():
        raise BrokenSetup(
            f"{path} belongs to user {facts.st_uid}, not to you ({os.geteuid()})",
            hint=f"{_give_back(path, facts.st_uid)}set AGENTBUS_HOME to a folder of your own",
        )
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BrokenSetup(
            f"{path} can be written by other users (mode {stat.S_IMODE(facts.st_mode):04o})",
            hint=f"chmod go-rwx '{path}'",
        )


def _give_back(path: str | Path, owner: int) -> str:
    """What makes a path ours again. Only root's, made by a sudo, say: nobody is told to take what another user has."""
    if os.geteuid() == 0:
        return f"run agentbus as that user, with sudo -u '#{owner}', or "
    return f"sudo chown -R {os.geteuid()} '{path}', or " if owner == 0 else ""


def unwritable(path: str | Path, error: OSError | None = None) -> str:
    """The hint for an error at writing `path`: what has to be allowed, as far as that can be told."""
    instead = "set AGENTBUS_HOME to a folder that can be written"
    if error is not None and error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        return instead
    from pathlib import Path

    folder = next((one for one in Path(path).parents if os.path.isdir(one)), Path("/"))
    try:
        is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return instead
    if is_read_only:
        return f"this looks like a sandbox, or a read-only disk: let it write to {folder}, or {instead}"
    closed = next((one for one in (folder, path) if _is_closed(one)), None)
    if closed is not None:
        return f"chmod u+{'rwx' if closed is folder else 'rw'} '{closed}'"
    # By all that can be seen it could be written: a chmod mends nothing.
    return f"if this is a sandbox, let it write to {folder}; if not, {instead}"


def _is_closed(path: str | Path) -> bool:
    """Whether the mode of what is ours at `path` keeps us from writing there."""
    try:
        facts = os.stat(path)
    except OSError:
        return False
    return facts.st_uid == os.geteuid() != 0 and not facts.st_mode & stat.S_IWUSR


def prepare_folder(path: str | Path) -> None:
    """Create `path` with access for us alone (0700), or check the folder that is there. [TRUST-1]

    Raises BrokenSetup.
    """
    try:
        # Only the last folder is made private; the folders above it are created as `mkdir -p` does.
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, mode=0o700)
    except FileExistsError:
        pass  # something is there: if it is not right, the check below reports it, with the remedy
    except OSError as error:
        raise BrokenSetup(f"{path} cannot be created ({error.strerror})", hint=unwritable(path, error)) from error
    check_private(path, is_folder=True)


def prepare_home(home: str | Path) -> str:
    """Create or check the home folder and what is in it; return the path of the database. [TRUST-1]

    Raises BrokenSetup.
    """
    prepare_folder(home)
    for name in HOME_FILES:
        check_private(f"{home}/{name}", is_folder=False)
    return f"{home}/{HOME_FILES[0]}"
