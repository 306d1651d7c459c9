"""Which room may import which, read from the source. A breach is a change of the design, not of this file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "agentbus"

# 1. Core modules stand in one list. Each may import those before it, and no other room.
CORE = (
    *(
        "errors",
        "shadows",
        "values",
        "process",
        "resting",
        "eventloop",
        "text",
        "stderr",
        "stdout",
        "names",
        "model",
        "a2a",
    ),
    *("findings", "ports", "config", "presence", "drain", "adapter", "wakes", "watchers", "files", "upgrade"),
    *("database", "checkpoints", "groups", "brakes", "queries", "search", "machines", "peers", "memberships", "store"),
    *("linkstore", "bus", "asking", "proof", "pump", "upkeep", "lookout", "session", "changes"),
)
# 2. What the files at the top and the faces may import besides core and their own room. registry opens the edges by
# name, when they are used: no file imports one.
MAY_IMPORT = {
    "registry": set(),
    "member": {"registry"},
    "doctor": {"registry", "cli.output"},
    "cli": {"registry", "member", "doctor", "console"},
    "console": {"registry", "member", "doctor", "cli.common", "cli.output"},
    "link": set(),
    "__main__": {"cli"},
    "__init__": {"member"},
}
# 3. An edge imports core and its own folder; an adapter also what MCP clients share. A trigger needs no more of core
# than the ports and the settings.
TRIGGERS_MAY_USE = CORE[: CORE.index("config") + 1]
# 5. Third parties, each in its place.
ONLY_IN = {
    "apsw": {"core/database.py", "doctor/readonly.py"},
    "mcp": {"adapters/mcp/sdk.py", "cli/demo.py"},
    "pydantic": {"adapters/mcp/sdk.py", "cli/demo.py"},
    "nats": {"link/nats.py"},
    "nkeys": {"link/admin.py"},
    "rich": {"cli/*", "console/*", "doctor/*"},
    "textual": {"console/*"},
    "trio": {"core/eventloop.py"},
    "typer": {"cli/app.py"},
    "watchfiles": {"triggers/file_watch.py"},
}
# The demo hands its environment to its children.
READS_THE_ENVIRONMENT = {"core/config.py", "cli/demo.py"}
MAX_LINES = 700
# The shared MCP server must not know the clients, except the two names that the protocol has from one of them.
CLIENTS = re.compile(r"claude|codex|opencode|qwen|gemini", re.IGNORECASE)
PROTOCOL_NAMES = ('"claude/channel"', '"notifications/claude/channel"')

FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module, without the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere; for our own modules, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full.removeprefix("agentbus.") in MODULES else module)
    return {one.removeprefix("agentbus.") if one.startswith("agentbus.") else one for one in found}


def may_import(name: str, other: str) -> bool:
    room, _, rest = name.partition(".")
    other_room, _, other_rest = other.partition(".")
    if room == "core":
        return other_room == "core" and CORE.index(other_rest) < CORE.index(rest)
    if room == "triggers":
        return other == name or (other_room == "core" and other_rest in TRIGGERS_MAY_USE)
    if other_room == "core":
        return True
    if room == "adapters":
        own = rest.split(".")[0]
        return other_room == "adapters" and other_rest.split(".")[0] in {own, "mcp"}
    return other_room == room or not {other, other_room}.isdisjoint(MAY_IMPORT[room])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    name, relative = name_of(path), str(path.relative_to(ROOT))
    for other in imports(path):
        if other in MODULES:
            assert may_import(name, other), f"{name} imports {other}"
        places = ONLY_IN.get(other.split(".")[0])
        assert places is None or {relative, f"{name.split('.')[0]}/*"} & places, f"{relative} imports {other}"


def test_the_core_is_all_in_the_list() -> None:
    assert {f"core.{one}" for one in CORE} == {name for name in MODULES if name.startswith("core.")}


def test_there_is_no_import_circle() -> None:
    left = {name: {other for other in imports(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_the_shared_mcp_server_knows_no_client_by_name() -> None:
    for path in sorted(ROOT.joinpath("adapters", "mcp").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for name in PROTOCOL_NAMES:
            text = text.replace(name, "")
        assert not CLIENTS.findall(text), path


def test_the_environment_has_one_reader() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if "os.environ" in text or "getenv" in text:
            assert str(path.relative_to(ROOT)) in READS_THE_ENVIRONMENT


def test_every_module_says_what_it_is_for_and_none_is_too_long() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), path
        assert len(text.splitlines()) <= MAX_LINES, f"{path} is for splitting"
