"""Every number that SPEC promises is held against the constant that keeps it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.adapters.claude_mcp import caller, mode, records
from agentbus.adapters.claude_mcp import registration as claude_registration
from agentbus.adapters.claude_mcp import server as claude_server
from agentbus.adapters.mcp import element, fast_path, gate, hold, inbox, lines, rate_limit, server
from agentbus.cli import common
from agentbus.core import (
    bus,
    changes,
    config,
    database,
    peers,
    presence,
    proof,
    pump,
    queries,
    session,
    store,
    text,
    upkeep,
)
from agentbus.core.adapter import Variable
from agentbus.core.drain import Pace
from agentbus.core.names import MAX_NAME_CHARS

SPEC = Path(__file__).parents[2].joinpath("SPEC.md").read_text(encoding="utf-8")
PACE = Pace()
BURST = registry.manifest("claude-mcp").variables["AGENTBUS_BURST"]
assert isinstance(BURST, Variable)

# The clause, what it says (with the number as SPEC writes it), and the number that the code has, in that unit.
PROMISES = [
    ("NAME-1", "1 to {} letters", MAX_NAME_CHARS),
    ("NAME-7", "up to\n  {} ms", session._PREDECESSOR_PATIENCE_S * 1_000),
    ("NAME-8", "waits up to {} ms", records._PATIENCE_S * 1_000),
    ("BODY-1", "1 to {} bytes", config.DEFAULT_MAX_BYTES),
    ("BODY-1", "1 to {})", config.HIGHEST_MAX_BYTES),
    ("STATE-4", "for {} hours", config.RETENTION.default),
    ("SEND-3", "{} pending messages", store.MAX_PENDING),
    ("DRAIN-5", "every {} seconds", PACE.safety_s),
    ("DRAIN-6", "start at {} ms", PACE.retry_s[0] * 1_000),
    ("DRAIN-6", "up to {} s", PACE.retry_s[1]),
    ("DRAIN-7", "up to {} ms", PACE.mark_s * 1_000),
    ("DRAIN-7", "once in {} ms", PACE.stream_s * 1_000),
    ("DRAIN-7", "within\n  {} ms", pump._STREAM_GAP_S * 1_000),
    ("DRAIN-8", "batches of {} envelopes", pump.BATCH),
    ("DRAIN-8", "at most {}\n", pump.MOST_OUT),
    ("PRES-2", "heartbeat of {} s", session.HEARTBEAT_S),
    ("PRES-3", "every {} s", session.HEARTBEAT_S),
    ("PRES-3", "for {} s of its own", presence.SILENT_S),
    ("PRES-3", "gap of {} s", presence._LONGEST_GAP_S),
    ("PRES-6", "{} such heartbeats", upkeep.MOST_QUIET),
    ("PRES-6", "those {} hold", peers.MOST_LOOKED_AFTER),
    ("WAKE-4", "default {})", config.DEFAULT_POLL_MS),
    ("LIFE-1", "{} ms", (server._STOP_S + server._CLOSE_PATIENCE_S) * 1_000 + 20),  # the rest is for the system
    ("MCP-3", "{} MiB", lines.MAX_LINE_BYTES / (1 << 20)),
    ("HOST-2", "{} ms at its start", records._PATIENCE_S * 1_000),
    ("DESK-4", "more than {} ms", fast_path._BUSY_S * 1_000),
    ("CHAN-1", "{} ms have passed", gate.SETTLE_S * 1_000),
    ("CHAN-1", "{} s after `initialized`", gate.UNLISTED_S),
    ("CHAN-4", "more than {} hour", element.AGED_MS / 3_600_000),
    ("OLD-1", "more than {} day", queries.OLD_MS / 86_400_000),
    ("OLD-4", "more than {} messages", session.MOST_OLD),
    ("BURST-1", "{} messages", BURST.default),
    ("BURST-1", "within {} s", rate_limit.WINDOW_S),
    ("TRUST-5", "at most {} characters", text.MAX_FOLDER_CHARS),
    ("TRUST-5", "a reason {},", text.MAX_REASON_CHARS),
    ("TRUST-5", "single word {};", text.MAX_WORD_CHARS),
    ("INBOX-2", "{} KiB of text", inbox._MAX_TEXT_BYTES / 1_024),
    ("INBOX-2", "{} characters as JSON", inbox._MAX_LINE_CHARS),
    ("INBOX-4", "{} posts", inbox._BURST),
    ("INBOX-4", "one in {} s", inbox._REFILL_S),
    ("INBOX-6", "for {} s", inbox._TROUBLE_S),
    ("PRES-2", "the {} sessions that follow", peers.MOST_LOOKED_AFTER),
    ("PROOF-3", "every {} ms", proof._FIRST_PAUSE_S * 1_000),
    ("PROOF-3", "once in {} s", proof._LONGEST_PAUSE_S),
    ("PROOF-3", "every {} s while", proof._NO_PLACE_PAUSE_S),
    ("READ-1", "at most {} messages", claude_server.PROFILE.max_checked),
    ("READ-1", "at most {} characters", claude_server.PROFILE.max_checked_chars),
    ("READ-3", "0 to {}", claude_server.PROFILE.max_wait_s),
    ("READ-6", "begins {} min", store.AGAIN_MS / 60_000),
    ("READ-7", "up to {} s after", caller._PATIENCE_S),
    ("LEDGER-3", "for {} days", peers.SESSIONS_KEPT_MS / 86_400_000),
    ("WATCH-1", "costs {} s", changes.SAFETY_S),
    ("WATCH-2", "more than {} messages", changes._MAX_FOLLOWED),
    ("WATCH-3", "tried again every {} s", changes.SAFETY_S),
    ("BYPASS-1", "last {} bytes", mode._TAIL_BYTES),
    ("BYPASS-2", "every {} s", hold._LOOK_S),
    ("WAIT-3", "0 to {} s", common._LONGEST_S),
    ("REG-5", "within {} s", claude_registration._PATIENCE_S),
    ("DOCTOR-4", "from {}", ".".join(map(str, claude_registration._LEAST_VERSION))),
    ("STORE-4", "up to {} s", bus.BUSY_PATIENCE_S),
    ("STORE-4", "up to {} s", common._BUSY_MS / 1_000),
]


def clause(name: str) -> str:
    return SPEC.split(f"- **[{name}]**")[1].split("\n- **[")[0]


@pytest.mark.parametrize(("name", "words", "number"), PROMISES, ids=lambda value: str(value)[:40])
def test_spec_promises_what_the_code_has(name: str, words: str, number: float | str) -> None:
    said = clause(name)
    before, after = (re.escape(part) for part in re.sub(r"\s+", " ", words).split("{}"))
    found = re.findall(rf"{before}([\d.,]*\d){after}", re.sub(r"\s+", " ", said + "\n"))
    shown = number if isinstance(number, str) else f"{number:,.10g}"
    assert shown in found, f"{name} says {found or said!r}, the code has {shown}"


def test_the_numbers_that_are_used_twice_agree() -> None:
    assert queries._LATELY == store.MAX_PENDING
    assert changes.SAFETY_S == session._CHECK_POLL_S == PACE.safety_s
    assert presence.SILENT_S == 3 * session.HEARTBEAT_S
    assert presence._LONGEST_GAP_S == 2 * session.HEARTBEAT_S
    assert database.CHECKPOINT_PAGES == 1_000
