"""`agentbus serve mcp`: any MCP client; nothing is pushed to it. The promises of all adapters: e2e/test_sessions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.client import RawClient
from tests.support.command import agentbus, until

pytestmark = pytest.mark.timeout(90)

ROOT = Path(__file__).parents[3]


@pytest.fixture
def adapter() -> str:
    return "mcp"


@pytest.mark.spec("VOID-1")
def test_mail_waits_until_it_is_asked_for(home: Path, start: Callable[..., RawClient]) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="auto")
    instructions = bob.handshake()["instructions"]
    assert "Messages are not pushed into this session" in instructions
    sent = agentbus(home, "send", "bob", "are you there?").stdout
    assert "online, but nothing can be pushed to it" in sent
    assert bob.call("whoami").splitlines() == [
        f'you are "bob", woken by socket, in {Path.cwd()}; messages wait for check_messages '
        "(pull: this client shows only what a tool returns)",
        "1 unread message: call check_messages",
    ]
    assert "are you there?</channel>" in bob.call("check_messages")
    assert bob.call("check_messages") == "no unread messages"
    assert bob.events == []


@pytest.mark.spec("READ-3")
def test_a_check_waits_for_mail(home: Path, start: Callable[..., RawClient]) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="auto")
    bob.handshake()
    check = bob.post_call("check_messages", wait_s=50)
    agentbus(home, "send", "bob", "here it is")
    assert "here it is" in bob.result(check)[0]


@pytest.mark.spec("ARG-2")
def test_what_a_client_adds_to_every_call_is_ignored(start: Callable[..., RawClient]) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="auto")
    bob.handshake()
    assert "sent #1" in bob.call("send_message", to="bob", text="to myself", wait_for_previous=True)
    assert bob.call("whoami", wait_for_previous=False).startswith('you are "bob"')
    assert "no argument 'other'" in bob.refuse("whoami", other=1)
    assert bob.refuse("check_messages", wait_s=51).startswith("'wait_s' is 51: use 0 to 50")


@pytest.mark.spec("CONF-1")
def test_a_delivery_that_this_client_does_not_have_is_refused(home: Path) -> None:
    done = agentbus(home, "serve", "mcp", AGENTBUS_DELIVERY="inbox")
    assert done.returncode == 2
    assert done.stderr == "agentbus: AGENTBUS_DELIVERY is 'inbox': set it to auto or channel or pull, or unset it\n"


@pytest.mark.spec("DOCTOR-5", "DOCTOR-6")
def test_doctor_does_not_call_it_wrong(home: Path, start: Callable[..., RawClient]) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="auto")
    bob.handshake()
    until(lambda: "bob" in agentbus(home, "peers").stdout)
    done = agentbus(home, "doctor", "bob")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'a message to "bob" may wait until its model calls check_messages' in done.stdout
    assert "its model has to call check_messages" in done.stdout


@pytest.mark.spec("REG-4")
def test_what_to_paste_is_printed(home: Path) -> None:
    done = agentbus(home, "enable", "mcp")
    assert (done.returncode, done.stderr) == (0, "")
    assert '"serve",\n          "mcp"' in done.stdout
    launched = agentbus(home, "launch", "mcp", "bob")
    assert (launched.returncode, launched.stdout) == (2, "")
    assert "AGENTBUS_NAME=bob" in launched.stderr
    assert not home.exists()


def test_it_is_as_short_as_an_adapter_should_be() -> None:
    code = ROOT.joinpath("agentbus", "adapters", "mcp_generic", "server.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) < 70
