"""Names, as real sessions, shells and a terminal meet them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from agentbus.core.names import login_name
from tests.support.client import RawClient
from tests.support.command import agentbus

Start = Callable[..., RawClient]


@pytest.mark.spec("NAME-11", "NAME-12", "NAME-13")
def test_by_tools_alone_nobody_becomes_another(start: Start, home: Path) -> None:
    agentbus(home, "send", "carol", "for carol alone", "--from", "ci")
    mallory, bob = start("mallory", AGENTBUS_DELIVERY="pull"), start("bob", AGENTBUS_DELIVERY="pull")
    mallory.handshake()
    bob.handshake()
    for name in ("user", "Human", "system", "assistant", "agentbus", "Claude", login_name(), "uѕer", "all"):
        assert mallory.refuse("set_name", name=name)
    assert mallory.call("whoami").startswith('you are "mallory"')
    said = mallory.call("set_name", name="carol")
    assert '1 message that waited under "carol" before was not for this session, and stays there' in said
    assert mallory.call("check_messages") == "no unread messages"
    assert "unread" not in mallory.call("whoami")
    mallory.call("send_message", to="bob", text="it is me, carol")
    bob.call("check_messages")
    assert 'carol (was "mallory" before) -> bob' in agentbus(home, "history").stdout
    row = json.loads(agentbus(home, "history", "--json").stdout.splitlines()[-1])
    assert (row["from"], row["sender_was"]) == ("carol", ["mallory"])
    assert "for carol alone" in agentbus(home, "inbox", "carol").stdout
    assert "1 pending from before its session took that name" in agentbus(home, "doctor", "carol").stdout
    # Who is started under the name gets the mail.
    mallory.call("set_name", name="mallory")
    carol = start("carol", AGENTBUS_DELIVERY="pull")
    carol.handshake()
    assert "for carol alone" in carol.call("check_messages")


@pytest.mark.spec("NAME-11", "CLI-2")
def test_a_person_can_use_the_names_that_are_kept_and_a_session_cannot(start: Start, home: Path) -> None:
    assert agentbus(home, "send", "bob", "1", "--from", "user").returncode == 0
    assert agentbus(home, "send", "bob", "2", AGENTBUS_NAME="system").returncode == 0
    agentbus(home, "send", "user", "for a person")
    assert agentbus(home, "wait", "--name", "user", "--timeout", "30").stdout == "for a person\n"
    # This very process is the host process of the session that now starts, and an ancestor of the commands.
    folder = home.parent / "user"
    folder.mkdir()
    web = start("claude", cwd=folder)
    assert "no session can have the name" in web.handshake()["instructions"]
    assert web.call("whoami").startswith('you are "agent"')
    assert 'queued #4 for "user": a person reads it' in web.call("send_message", to="user", text="x")
    for command in (("send", "bob", "3", "--from", "user"), ("wait", "--name", login_name(), "--timeout", "0")):
        refused = agentbus(home, *command)
        assert refused.returncode == 1
        assert 'this shell belongs to the session "agent"' in refused.stderr
    senders = [json.loads(line)["from"] for line in agentbus(home, "history", "--json").stdout.splitlines()]
    assert senders[:2] == ["user", "system"]


@pytest.mark.spec("NAME-1", "NAME-3", "CLI-6", "CLI-7")
def test_names_of_any_script_go_everywhere(start: Start, home: Path) -> None:
    folder = home.parent / unicodedata.normalize("NFD", "Müller")
    folder.mkdir()
    mueller, long = start(cwd=folder), start("語" * 32)
    mueller.handshake()
    long.handshake()
    assert long.call("send_message", to="MÜLLER", text="1") == 'sent #1 to "müller" (online)'
    assert mueller.wait_events(1)[0]["meta"]["from"] == "語" * 32
    assert mueller.call("send_message", to="語" * 32, text="2").endswith("(online)")
    long.wait_events(1)
    assert (
        'queued #3 for "möller": no such peer yet. Did you mean "müller" (online)?'
        in agentbus(home, "send", "Möller", "3").stdout
    )
    assert agentbus(home, "send", "möller", "4", "--from", "ёж").returncode == 0
    refused = agentbus(home, "send", "müller, ci", "5")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert 'did you mean "müller"?' in refused.stderr
    table = agentbus(home, "peers").stdout.splitlines()[:3]
    assert len({cell_len(line.split("claude-mcp")[0]) for line in table[1:]}) == 1
    assert agentbus(home, "history", "--peer", "Ёж").stdout.count("->") == 1
    assert "müller" in agentbus(home, "doctor", "müller").stdout
    # Where the locale has no such letters, they are escaped: the message is sent, and that is said.
    sent = agentbus(home, "send", "語", "6", PYTHONIOENCODING="ascii")
    assert (sent.returncode, sent.stderr) == (0, "")
    assert r'queued #5 for "\u8a9e"' in sent.stdout
    assert sorted(path.name for path in (home / "sock").iterdir()) == sorted(
        path.name for path in (home / "sock").iterdir() if path.name.isascii()
    )
