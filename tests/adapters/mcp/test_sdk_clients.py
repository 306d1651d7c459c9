"""Clients that we did not write: the SDK's current one, in both modes, and the one of its previous generation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from mcp import Client, StdioServerParameters

from agentbus.adapters.mcp.tools import TOOLS
from tests.support.command import PATIENCE_S, clean_env

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

# A server that answers alone: the SDK cannot be imported. And one that leaves all but `ping` to the SDK.
ALONE = ["-m", "agentbus", "serve", "claude-mcp"]
THROUGH_SDK = [
    "-c",
    "import sys; from agentbus import __main__; from agentbus.adapters.mcp import fast_path\n"
    "fast_path._is_complete = lambda params: False\n"
    "sys.argv[1:] = ['serve', 'claude-mcp']; __main__.main()",
]
OLD_SDK = Path(sys.prefix) / "old-sdk"


@pytest.fixture(params=["alone", "through the SDK"])
def server(home: Path, request: pytest.FixtureRequest) -> StdioServerParameters:
    """How a client starts a server that answers alone, and one that answers through the SDK."""
    environment = {"AGENTBUS_HOME": str(home), "AGENTBUS_NAME": "alice"}
    if request.param == "through the SDK":
        return StdioServerParameters(command=sys.executable, args=THROUGH_SDK, env=environment)
    broken = home.parent / "broken"
    broken.mkdir()
    broken.joinpath("mcp.py").write_text("raise ImportError")
    environment["PYTHONPATH"] = str(broken)
    return StdioServerParameters(command=sys.executable, args=ALONE, env=environment)


@pytest.mark.anyio
@pytest.mark.spec("MCP-1", "MCP-2", "TOOL-1", "DESK-1")
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_current_sdk_connects(server: StdioServerParameters, mode: str) -> None:
    with anyio.fail_after(PATIENCE_S):
        async with Client(server, mode=mode) as client:
            assert client.protocol_version == "2025-11-25"
            assert client.server_capabilities.experimental == {"claude/channel": {}}
            assert len((await client.list_tools()).tools) == len(TOOLS)
            result = await client.call_tool("whoami", {})
            assert not result.is_error
            assert result.structured_content is None
            assert 'you are "alice"' in result.content[0].text


OLD_CLIENT = """
import json, sys, anyio
from importlib.metadata import version
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

async def main():
    server = StdioServerParameters(**json.loads(sys.argv[1]))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        hello = await session.initialize()
        assert hello.capabilities.experimental == {"claude/channel": {}}, hello
        tools = await session.list_tools()
        result = await session.call_tool("whoami", {})
        assert not result.isError
        print(hello.protocolVersion, len(tools.tools), result.content[0].text)

anyio.run(main)
"""


@pytest.mark.spec("MCP-2", "TOOL-1", "DESK-1")
def test_the_previous_sdk_connects(home: Path, server: StdioServerParameters) -> None:
    if not OLD_SDK.exists() and not os.environ.get("CI"):
        pytest.skip(f"{OLD_SDK} is missing: run the tests with python3 dev.py test")
    done = subprocess.run(
        [sys.executable, "-c", OLD_CLIENT, server.model_dump_json(include={"command", "args", "env"})],
        env={**clean_env(home), "PYTHONPATH": str(OLD_SDK)},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, tools, answer = done.stdout.split(maxsplit=2)
    assert (version, tools) == ("2025-11-25", str(len(TOOLS)))
    assert answer.startswith('you are "alice"')


def test_the_previous_sdk_is_the_previous_one() -> None:
    if not OLD_SDK.exists():
        pytest.skip(f"{OLD_SDK} is missing: run the tests with python3 dev.py test")
    found = [path.name for path in OLD_SDK.glob("mcp-*.dist-info")]
    assert len(found) == 1
    assert found[0].startswith("mcp-1.")
