"""A stand-in for the command `codex`, as recorded with 0.169: `--version`, `mcp add`, `mcp remove`, `app-server`.

`mcp add` replaces an entry whole, without a word. Only the keys that it knows survive a change of its file.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("CODEX_HOME") or Path.home() / ".codex")
FILE = HOME / "config.toml"


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def load() -> dict[str, Any]:
    try:
        return tomllib.loads(FILE.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        sys.exit(f"Error: failed to load configuration: {error}")


def save(state: dict[str, Any]) -> None:
    lines = [f"{key} = {toml(value)}" for key, value in state.items() if key != "mcp_servers"]
    for name, entry in state.get("mcp_servers", {}).items():
        lines += [f"[mcp_servers.{name}]", *(f"{key} = {toml(value)}" for key, value in entry.items())]
    FILE.write_text("\n".join(lines) + "\n")


def add(words: list[str]) -> None:
    name, *rest = words
    options, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    env = dict(pair.split("=", 1) for pair in options[1::2])
    entry = {"command": command[0], "args": command[1:], **({"env": env} if env else {})}
    state = load()
    state.setdefault("mcp_servers", {})[name] = entry
    save(state)
    print(f"Added global MCP server '{name}'.")


def remove(name: str) -> None:
    state = load()
    state.get("mcp_servers", {}).pop(name, None)
    save(state)
    print(f"Removed global MCP server '{name}'.")


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["method"] == "config/value/write":
            state = load()
            *path, last = asked["params"]["keyPath"].split(".")
            place = state
            for key in path:
                place = place.setdefault(key, {})
            place[last] = asked["params"]["value"]
            save(state)
        if "id" in asked:
            print(json.dumps({"id": asked["id"], "result": {}}), flush=True)


def main() -> None:
    words = sys.argv[1:]
    if not HOME.is_dir():
        sys.exit(f"Error: CODEX_HOME points to {HOME}, but that path does not exist")
    if words == ["--version"]:
        print(f"codex-cli {os.environ.get('STAND_IN_VERSION', '0.169.0')}")
    elif words[:2] == ["mcp", "add"]:
        add(words[2:])
    elif words[:2] == ["mcp", "remove"]:
        remove(words[2])
    elif words == ["app-server"]:
        serve()
    else:
        sys.exit(f"Error: {words}")


if __name__ == "__main__":
    main()
