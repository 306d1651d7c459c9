"""Who may import whom, read from the source. A breach is a change of the design, not of this file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "agentbus"

# Each core module may import those before it.
CORE = (
    *("errors", "process", "eventloop", "model", "findings", "ports", "config", "drain", "adapter", "wakes"),
    *("watchers", "database", "queries", "store", "bus", "pump", "session", "changes"),
)
# A room or a module at the top may import those with a lower number.
LEVELS = {
    "core": 6,
    "triggers": 7,
    "adapters": 7,
    "registry": 8,
    "member": 9,
    "doctor": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 13,  # the front door: everything may be behind it
}
# What the triggers may use of core.
TRIGGERS_MAY_USE = "config"

ONLY_IN = {
    "mcp": {"adapters/mcp/sdk.py", "cli/demo.py"},
    "apsw": {"core/database.py", "doctor/readonly.py"},
    "typer": {"cli/app.py"},
    "watchfiles": {"triggers/file_watch.py"},
    "trio": {"core/eventloop.py"},
    "pydantic": {"adapters/mcp/sdk.py", "cli/demo.py"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            is_package = module.split(".")[0] == "agentbus" and (ROOT / as_path(module)).is_dir()
            found |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
    return found


def as_path(module: str) -> str:
    return module.removeprefix("agentbus").strip(".").replace(".", "/")


def part(dotted: str) -> str:
    """The entry of LEVELS that a dotted name of ours falls under."""
    return dotted.split(".")[1]


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    for name in imports(path):
        top = name.split(".")[0]
        assert str(relative) in ONLY_IN.get(top, {str(relative)}), f"{relative} imports {name}"
        if top != "agentbus" or name in ("agentbus", "agentbus.__version__"):
            continue
        other = part(name)
        if own == other == "core":
            assert CORE.index(name.split(".")[2]) < CORE.index(relative.stem), f"{relative} imports {name}"
            continue
        if own == other in ("doctor", "cli") or (own == "doctor" and name in ("agentbus.cli", "agentbus.cli.output")):
            continue
        if own == other == "adapters":
            assert name.split(".")[2] in ("mcp", relative.parts[1]), f"{relative} imports a sibling: {name}"
        elif own == "triggers":
            assert other == "core", f"{relative} imports {name}"
            assert CORE.index(name.split(".")[2]) <= CORE.index(TRIGGERS_MAY_USE), f"{relative} imports {name}"
        else:
            assert LEVELS[other] < LEVELS[own], f"{relative} imports {name}"


def test_the_environment_has_one_reader() -> None:
    allowed = {"core/config.py", "cli/demo.py"}  # the demo hands its environment to its children
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if "os.environ" in text or "getenv" in text:
            assert str(path.relative_to(ROOT)) in allowed


def test_every_module_says_what_it_is_for_and_none_is_too_long() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), path
        assert len(text.splitlines()) <= 420, f"{path} is for splitting"
