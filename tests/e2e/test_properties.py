"""Every input gets one clear error or an exact round trip; never a crash, a cut or a changed byte."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentbus.adapters.mcp import jsonrpc
from agentbus.adapters.mcp.channel import channel_event
from agentbus.adapters.mcp.element import CHANNEL, element
from agentbus.adapters.mcp.lines import LineBuffer
from agentbus.core.bus import now_ms
from agentbus.core.config import prepare_home
from agentbus.core.errors import InvalidRequest
from agentbus.core.model import check_body
from agentbus.core.names import MAX_NAME_CHARS, fit_name, normalise_name, numbered_name
from agentbus.core.store import Store
from tests.support.client import RawClient, clients
from tests.support.command import PATIENCE_S
from tests.support.fakes import arrival, envelope
from tests.support.group_changer import GROUPS, Changer

# A loaded machine takes its time; a correct result does not depend on it.
PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=200, derandomize=True)
ROOT = Path(__file__).parents[2]
STEPS = ("join", "leave", "rename", "pause", "resume", "send")
NAME = re.compile(r"[^\s<>'\"&]{1,32}")

# Text with lone surrogates and NUL, as JSON can carry them, and with what looks like a channel tag.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=200)
TAGS = st.sampled_from(
    ["<channel", "</channel", "< channel", "</ CHANNEL", '<channel from="root">', "<", ">", '"', "&"]
)
TRICKY_TEXT = st.lists(ANY_TEXT | TAGS, max_size=8).map("".join)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.spec("NAME-1", "NAME-2")
@given(ANY_TEXT | st.sampled_from(["../x", "*", "a" * 33, "x" * 100_000, "Bob Smith", "\u0130"]))
@PATIENT
def test_a_name_is_a_name_or_refused(raw: str) -> None:
    try:
        name = normalise_name(raw)
    except InvalidRequest as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
        str(error).encode()
        return
    assert NAME.fullmatch(name)
    assert normalise_name(name) == normalise_name(raw.upper()) == name or raw.upper().lower() != raw.lower()
    for number in (2, 10, 999):
        assert normalise_name(numbered_name(name, number)) == numbered_name(name, number)


@pytest.mark.spec("NAME-3")
@given(ANY_TEXT)
@PATIENT
def test_a_folder_makes_a_name_or_none(raw: str) -> None:
    name = fit_name(raw)
    assert name is None or (normalise_name(name) == name and len(name) <= MAX_NAME_CHARS)


@pytest.mark.spec("BODY-1", "BODY-2")
@given(st.lists(TRICKY_TEXT, min_size=1, max_size=20))
@PATIENT
def test_a_body_is_stored_to_the_byte_or_refused(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        store = Store(prepare_home(Path(folder, "bus")), busy_ms=1_000)
        accepted = []
        for text in texts:
            try:
                accepted.append(check_body(text, 200))
            except InvalidRequest as error:
                assert "\n" not in str(error)
                size = len(text.encode(errors="surrogatepass"))
                assert not text or "\0" in text or size > 200 or any("\ud800" <= c <= "\udfff" for c in text)
                continue
            store.send("alice", "bob", text, now=0)
        claimed = store.claim(arrival("bob"), now=0, endpoint=str, join_crowd=True)
        assert claimed is not None
        found = store.pending(claimed[0].session, claimed[0].process.pid, 100)
        assert [one.text for one in found] == accepted
        store.close()


@pytest.mark.spec("TRUST-2", "CHAN-2")
@given(TRICKY_TEXT.filter(lambda text: text.isprintable() or "\n" in text), st.none() | st.integers(1, 2**53))
@PATIENT
def test_no_text_makes_a_second_element_or_line(text: str, reply_to: int | None) -> None:
    one = envelope(7, text, reply_to=reply_to)
    try:
        line = channel_event(one)
    except UnicodeEncodeError:
        assert any("\ud800" <= character <= "\udfff" for character in text)  # no stored body has one
        return
    assert line.count(b"\n") == 1
    params = json.loads(line)["params"]
    assert all(isinstance(value, str) and re.fullmatch(r"[\w:. -]+", value) for value in params["meta"].values())
    for shown in (params["content"], element(one).removeprefix("<channel ").removesuffix("</channel>")):
        assert not re.search(r"<\s*/?\s*channel", shown, re.IGNORECASE)
    assert params["content"].replace("&lt;", "<") == text.replace("&lt;", "<")
    assert CHANNEL.defused(CHANNEL.defused(text)) == CHANNEL.defused(text)


@pytest.mark.spec("MCP-3")
@given(st.binary(max_size=2_000), st.lists(st.integers(0, 2_000), max_size=6))
@PATIENT
def test_lines_come_out_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    buffer = LineBuffer()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut <= len(data))})
    found = [line for start, end in pairwise(edges) for line in buffer.feed(data[start:end])]
    assert found == data.split(b"\n")[:-1]


@pytest.mark.spec("MCP-3", "DESK-1")
@given(
    st.dictionaries(ANY_TEXT, ANY_JSON, max_size=4),
    st.booleans(),
    st.sampled_from([b"", b" ", b"\t\r", b"x", b"{}", b",", b"\xff", b"\xef\xbb\xbf"]),
    st.sampled_from([b"", b" ", b"\r", b"x", b"{}", b"\xff"]),
)
@PATIENT
def test_a_line_is_parsed_as_json_loads_would(
    message: dict[str, Any], is_ascii: bool, head: bytes, tail: bytes
) -> None:
    line = head + json.dumps(message, ensure_ascii=is_ascii).encode(errors="surrogatepass") + tail
    try:
        expected = json.loads(line)
        json.dumps(expected, ensure_ascii=False).encode()
    except ValueError:
        expected = None
    assert repr(jsonrpc.parse(line)) == repr(expected)  # NaN is not equal to itself


@pytest.mark.spec("MCP-1", "MCP-3")
@given(ANY_JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
@PATIENT
def test_any_line_is_refused_or_answered_in_one_line(line: bytes) -> None:
    for answer in (jsonrpc.refusal(line), jsonrpc.salvage(line, "why")):
        if answer is not None:
            assert answer.count(b"\n") == 1
            assert json.loads(answer)["error"]["code"] in (-32700, -32600, -32601, -32022)


@pytest.mark.timeout(120)
@pytest.mark.spec("TOOL-2", "MCP-3", "ERR-1")
def test_whatever_a_client_calls_a_real_server_answers_in_a_sentence(home: Path) -> None:
    with clients() as start:
        alice: RawClient = start(home, "alice")
        alice.handshake()

        @given(
            st.sampled_from(["send_message", "set_name", "broadcast", "check_messages", "message_status", "x"])
            | ANY_TEXT,
            st.dictionaries(st.sampled_from(["to", "text", "name", "wait_s", "id", "reply_to", "x"]), ANY_JSON)
            | ANY_JSON,
        )
        @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150, derandomize=True)
        def call(tool: str, arguments: object) -> None:
            if isinstance(arguments, dict) and isinstance(arguments.get("wait_s"), (int, float)):
                arguments.pop("wait_s")  # otherwise the call would really wait
            request = alice.post("tools/call", {"name": tool, "arguments": arguments})
            answer = alice.answer(request)
            if "error" in answer:
                assert len(answer["error"]["message"]) < 2_000
            else:
                (block,) = answer["result"]["content"]
                assert block["text"]
                assert "Traceback" not in block["text"]

        call()
        assert alice.call("whoami").startswith('you are "')
        assert "Traceback" not in alice.stderr


def audit_groups(store: Store, states: list[dict[str, Any]]) -> None:
    groups, pauses = store.queries.groups_of(), store.queries.pauses(2**62)
    assert groups == {state["name"]: state["groups"] for state in states if state["groups"]}
    assert set(store.queries.pauses(now_ms())) == {state["name"] for state in states if state["is_paused"]}
    assert {pause.until for pause in pauses.values()} <= {None}
    accepted = sorted(row_id for state in states for row_id in state["ids"])
    assert [one.id for one in store.queries.after(0, 100_000)] == accepted
    assert all(one.to_group for one in store.queries.after(0, 100_000))


@pytest.mark.spec("GROUP-2", "GROUP-3", "GROUP-4", "BRAKE-2")
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(STEPS), st.integers(0, 8)), max_size=40))
@settings(PATIENT, max_examples=40)
def test_each_session_is_in_what_it_joined_whatever_the_others_do(steps: list[tuple[int, str, int]]) -> None:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        prepare_home(Path(folder))
        changers = [Changer(Path(folder), name) for name in ("x", "y", "z")]
        for who, what, which in steps:
            changers[who].step(what, which)
        audit_groups(changers[0].store, [one.state() for one in changers])
        for one in changers:
            one.close()


@pytest.mark.spec("GROUP-2", "GROUP-3", "GROUP-4", "BRAKE-1", "BRAKE-2")
def test_groups_and_pauses_hold_while_two_processes_change_them(home: Path) -> None:
    store = Store(prepare_home(home), busy_ms=10_000)
    there = {"name": "there", "groups": list(GROUPS), "is_paused": False, "ids": []}
    for group in GROUPS:
        store.join_group(group, "there", now=0)
    command = [sys.executable, "-m", "tests.support.group_changer", str(home)]
    running = [
        subprocess.Popen([*command, name, str(seed), "400"], stdout=subprocess.PIPE, cwd=ROOT)
        for seed, name in enumerate(("x", "y"))
    ]
    states = [json.loads(child.communicate(timeout=PATIENCE_S)[0]) for child in running]
    audit_groups(store, [there, *states])
    assert all(state["ids"] for state in states)
    store.close()
