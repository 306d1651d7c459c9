"""A stand-in for the `claude` command: `--version` and `mcp add-json|remove|get|list`, as recorded with 2.1.331.

Its output, the stream, the exit code and the content of `.claude.json` were taken from runs of the real one.
adapters/claude_mcp/test_registration.py runs the same checks against the real one where that is on PATH.

STAND_IN_LOG names a file that gets the arguments of every call as a line of JSON. STAND_IN_HANG names the subcommand
(for example `add-json`) that hangs, with a child that holds its output open. STAND_IN_FAIL names the subcommand that
fails. STAND_IN_VERSION is the version that it claims to be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SCOPES = {
    "user": "User config (available in all your projects)",
    "local": "Local config (private to you in this project)",
}


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(1)


def project_root() -> str:
    """The root of the git repository, or the working folder."""
    here = Path.cwd()
    return str(next((one for one in (here, *here.parents) if (one / ".git").exists()), here))


class State:
    """`.claude.json`, in CLAUDE_CONFIG_DIR or the home folder."""

    def __init__(self) -> None:
        self.path = Path(os.environ.get("CLAUDE_CONFIG_DIR") or os.environ["HOME"]) / ".claude.json"
        try:
            self.content: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            self.content = {"firstStartVersion": "2.1.331"}
        except ValueError as error:
            fail(
                f"\nClaude configuration file at {self.path} is corrupted: JSON Parse error: Expected '}}'\n"
                f"\nConfiguration error in {self.path}: JSON Parse error: {error}"
            )

    def servers(self, scope: str) -> dict[str, Any]:
        of = self.content
        if scope == "local":
            of = of.setdefault("projects", {}).setdefault(project_root(), {})
        return of.setdefault("mcpServers", {})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(self.content, indent=2))
        beside.replace(self.path)


def options(arguments: list[str]) -> tuple[str, list[str]]:
    scope, words, left = "local", [], iter(arguments)
    for word in left:
        if word in ("-s", "--scope"):
            scope = next(left)
        else:
            words.append(word)
    return scope, words


def add_json(arguments: list[str]) -> None:
    scope, (name, text) = options(arguments)
    try:
        entry = json.loads(text)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        fail("Invalid configuration: not a JSON object. Check its quotes, commas and braces.")
    if not entry.get("command"):
        fail("Invalid configuration: command: Command cannot be empty")
    state = State()
    if name in state.servers(scope):
        fail(f"MCP server {name} already exists in {scope} config")
    state.servers(scope)[name] = entry
    state.save()
    print(f"Added stdio MCP server {name} to {scope} config")


def remove(arguments: list[str]) -> None:
    scope, (name,) = options(arguments)
    state = State()
    if state.servers(scope).pop(name, None) is None:
        fail(f'No MCP server named "{name}" in {scope} scope')
    state.save()
    print(f"Removed MCP server {name} from {scope} config\nFile modified: {state.path}")


def get(arguments: list[str]) -> None:
    state = State()
    for scope in ("local", "user"):
        entry = state.servers(scope).get(arguments[0])
        if entry is not None:
            print(f"{arguments[0]}:\n  Scope: {SCOPES[scope]}\n  Type: stdio\n  Command: {entry['command']}")
            return
    fail(f'No MCP server named "{arguments[0]}". Run `claude mcp add` to add one.')


def main() -> None:
    arguments = sys.argv[1:]
    if "STAND_IN_LOG" in os.environ:
        with open(os.environ["STAND_IN_LOG"], "a") as log:
            log.write(json.dumps(arguments) + "\n")
    verb = arguments[0] if arguments[:1] != ["mcp"] else arguments[1]
    if os.environ.get("STAND_IN_HANG") == verb:
        # Like a wrapper whose child outlives it: the caller has to stop both.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
    if os.environ.get("STAND_IN_FAIL") == verb:
        fail("the config could not be saved: EROFS: read-only file system")
    match arguments:
        case ["--version"]:
            print(f"{os.environ.get('STAND_IN_VERSION', '2.1.331')} (Claude Code)")
        case ["mcp", "add-json", *rest]:
            add_json(rest)
        case ["mcp", "remove", *rest]:
            remove(rest)
        case ["mcp", "get", name]:
            get([name])
        case ["mcp", "list"]:
            print("No MCP servers configured. Use `claude mcp add` to add a server.")
        case _:
            fail(f"error: unknown command {arguments!r}")


if __name__ == "__main__":
    main()
