"""Clients that we did not write: the SDK's current one, in both modes, and the one of its previous generation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from mcp import Client, StdioServerParameters

from tests.support.command import PATIENCE_S, clean_env

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

OLD_SDK = Path(sys.prefix) / "old-sdk"


@pytest.mark.anyio
@pytest.mark.spec("MCP-1", "MCP-2", "TOOL-1")
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_current_sdk_connects(home: Path, mode: str) -> None:
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "agentbus", "serve", "claude-mcp"],
        env={"AGENTBUS_HOME": str(home), "AGENTBUS_NAME": "alice"},
    )
    with anyio.fail_after(PATIENCE_S):
        async with Client(server, mode=mode) as client:
            assert client.protocol_version == "2025-11-25"
            assert client.server_capabilities.experimental == {"claude/channel": {}}
            assert len((await client.list_tools()).tools) == 7
            result = await client.call_tool("whoami", {})
            assert not result.is_error
            assert result.structured_content is None
            assert 'you are "alice"' in result.content[0].text


OLD_CLIENT = """
import sys, anyio, os
from importlib.metadata import version
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

async def main():
    server = StdioServerParameters(
        command=sys.argv[1], args=["-m", "agentbus", "serve", "claude-mcp"],
        env={"AGENTBUS_HOME": os.environ["AGENTBUS_HOME"], "AGENTBUS_NAME": "alice"},
    )
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        hello = await session.initialize()
        assert hello.capabilities.experimental == {"claude/channel": {}}, hello
        tools = await session.list_tools()
        result = await session.call_tool("whoami", {})
        assert not result.isError
        print(hello.protocolVersion, len(tools.tools), result.content[0].text)

anyio.run(main)
"""


@pytest.mark.spec("MCP-2", "TOOL-1")
def test_the_previous_sdk_connects(home: Path) -> None:
    if not OLD_SDK.exists() and not os.environ.get("CI"):
        pytest.skip(f"{OLD_SDK} is missing: run the tests with python3 dev.py test")
    done = subprocess.run(
        [sys.executable, "-c", OLD_CLIENT, sys.executable],
        env={**clean_env(home), "PYTHONPATH": str(OLD_SDK)},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, tools, answer = done.stdout.split(maxsplit=2)
    assert (version, tools) == ("2025-11-25", "7")
    assert answer.startswith('you are "alice"')


def test_the_previous_sdk_is_the_previous_one() -> None:
    if not OLD_SDK.exists():
        pytest.skip(f"{OLD_SDK} is missing: run the tests with python3 dev.py test")
    found = [path.name for path in OLD_SDK.glob("mcp-*.dist-info")]
    assert len(found) == 1
    assert found[0].startswith("mcp-1.")
