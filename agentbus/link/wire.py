"""The form in which machines write to one another, `agentbus/1`: messages, receipts, presence.

Pure: values in, bytes out, and back. Everything that comes in is checked: what this module could not have written is
refused. Nothing that a text says about its origin is believed: the machine that sent it is an argument, proven by what
carried it. Knows nothing about the server. Implements [WIRE-1] to [WIRE-4].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agentbus.core.a2a import METADATA_KEY, from_a2a, message_id, split_id, to_a2a
from agentbus.core.config import HIGHEST_MAX_BYTES
from agentbus.core.errors import InvalidRequest
from agentbus.core.linkstore import REFUSED, UNKNOWN, Incoming, Outgoing, Report, digest
from agentbus.core.machines import WIRE_VERSION, FarPeer
from agentbus.core.names import EVERYBODY_THERE, normalise_name
from agentbus.core.text import MAX_FOLDER_CHARS, MAX_REASON_CHARS, one_line, word

__all__ = [
    "MAX_PEERS",
    "MAX_REPORTS",
    "Beat",
    "TooNew",
    "key_of",
    "name_token",
    "read_beat",
    "read_message",
    "read_receipts",
    "token_name",
    "write_beat",
    "write_message",
    "write_receipts",
]

# In one message. A receipt has some 40 bytes, so this is 20 KB.
MAX_REPORTS = 500
# Nobody reads a longer list, and it would be sent to every machine.
MAX_PEERS = 500
_BUS = re.compile(r"[0-9a-f]{16}")
_OTHER_VERSION = re.compile(r"agentbus/(\d{1,6})")
_HIGHEST = 2**53 - 1
_PLAIN = re.compile(r"[a-z0-9_-]+")
_ESCAPED = re.compile(r"(?:[a-z0-9_-]|=[0-9A-F]{2})+")
_LONGEST_WORD = 32


@dataclass(frozen=True, slots=True)
class Beat:
    """What a machine says about itself. `peers` is None in a short beat; `etag` names the list.

    `waiting`: how many messages for it the server holds, as far as it knows. `at`: its clock, in ms since 1970 UTC.
    """

    bus: str
    at: int
    waiting: int
    etag: str
    version: int = WIRE_VERSION
    peers: tuple[FarPeer, ...] | None = None
    has_left: bool = False


class TooNew(InvalidRequest):
    """A message in a later form than this program can read. `report` tells its sender so."""

    def __init__(self, version: int, bus: str, number: int, known: str) -> None:
        super().__init__(f"its agentbus reads agentbus/{WIRE_VERSION}, and this is agentbus/{version}: upgrade it")
        self.report = Report(bus, number, REFUSED, known, str(self))


def name_token(name: str) -> str:
    """`name` as one token of a subject: of ASCII, and without a dot. [WIRE-2]"""
    if name == EVERYBODY_THERE or _PLAIN.fullmatch(name):
        return name
    return "".join(chr(byte) if _PLAIN.fullmatch(chr(byte)) else f"={byte:02X}" for byte in name.encode())


def token_name(token: str) -> str:
    """The name that `name_token` wrote. Raises InvalidRequest for anything else."""
    if _ESCAPED.fullmatch(token):
        try:
            raw = re.sub(rb"=(..)", lambda found: bytes([int(found[1], 16)]), token.encode())
            name = raw.decode()
            if normalise_name(name) == name and name_token(name) == token:
                return name
        except (ValueError, InvalidRequest):
            pass  # it is none, which is said below
    raise InvalidRequest(f"{token[:48]!r} is not the token of a name")


def write_message(envelope: Outgoing, machine: str) -> bytes:
    """`envelope`, from `machine`, as it is sent. [WIRE-1]"""
    far = Outgoing(
        id=envelope.id,
        sender=f"{envelope.sender}@{machine}",
        recipient=envelope.recipient,
        text=envelope.text,
        sent_at=envelope.sent_at,
        answer_by=envelope.answer_by,
    )
    return _json(to_a2a(far, bus=envelope.bus, answers=envelope.answers))


def key_of(envelope: Outgoing) -> str:
    """By which the server knows a copy that is sent again soon. It saves a way, and is not relied on. [LINK-3]"""
    known = digest(envelope.sender, envelope.recipient, envelope.text, envelope.sent_at)
    return f"{message_id(envelope.id, envelope.bus)}.{known}"


def read_message(body: bytes, *, machine: str, here: str, to: str) -> Incoming:
    """The message in `body`, which came from `machine` and is for the name `to` on this machine, `here`. [WIRE-3]

    Raises TooNew, and InvalidRequest for what `write_message` could not have written there.
    """
    message = _read(body)
    _check_version(message)
    # The limit of another machine can be higher than ours; what can be sent anywhere can be taken here.
    envelope = from_a2a(message, max_bytes=HIGHEST_MAX_BYTES)
    bus, number = split_id(message["messageId"])
    if not bus:
        raise InvalidRequest("the message has no bus in its 'messageId'")
    name, at, from_machine = envelope.sender.partition("@")
    if not at or from_machine != machine or name == EVERYBODY_THERE:
        raise InvalidRequest(f"a message from {machine} says that it is from {one_line(envelope.sender)!r}")
    if envelope.recipient != f"{to}@{here}":
        raise InvalidRequest(f"a message to {to}@{here} says that it is to {one_line(envelope.recipient)!r}")
    answered = message["metadata"][METADATA_KEY].get("replyTo")
    answers = None if answered is None else split_id(answered)
    return Incoming(
        machine=machine,
        bus=bus,
        id=number,
        sender=name,
        to=to,
        text=envelope.text,
        sent_at=envelope.sent_at,
        answers=answers if answers is not None and answers[0] else None,
        digest=digest(name, envelope.recipient, envelope.text, envelope.sent_at),
        answer_by=envelope.answer_by,
    )


def _check_version(message: dict[str, Any]) -> None:
    metadata = message.get("metadata")
    if not isinstance(metadata, dict) or METADATA_KEY in metadata:
        return
    versions = [int(found[1]) for found in map(_OTHER_VERSION.fullmatch, metadata) if found]
    if versions and min(versions) > WIRE_VERSION:
        # Whatever else a later form has: its name, and the digest by which its sender knows a report about it.
        bus, number = split_id(message.get("messageId"))
        more = metadata.get(f"agentbus/{min(versions)}")
        known = more.get("digest") if isinstance(more, dict) else None
        if bus and isinstance(known, str) and _BUS.fullmatch(known):
            raise TooNew(min(versions), bus, number, known)


def write_receipts(reports: Iterable[Report]) -> bytes:
    """At most MAX_REPORTS `reports`, for the machine whose messages they are about. [RCPT-1]"""
    rows: list[list[str | int]] = [
        [one.bus, one.id, one.state, one.digest, *([_note(one)] if one.note else [])] for one in reports
    ]
    return _json({"agentbus": WIRE_VERSION, "receipts": rows})


def _note(report: Report) -> str:
    return one_line(report.note, MAX_REASON_CHARS if report.state == REFUSED else _LONGEST_WORD)


def read_receipts(body: bytes) -> list[Report]:
    """The reports in `body`. Raises InvalidRequest for what `write_receipts` could not have written. [WIRE-3]"""
    message = _read(body)
    rows = message.get("receipts")
    if message.get("agentbus") != WIRE_VERSION or not isinstance(rows, list) or len(rows) > MAX_REPORTS:
        raise InvalidRequest("these are no receipts of agentbus/1")
    return [_report(row) for row in rows]


def _report(row: object) -> Report:
    if not isinstance(row, list) or not 4 <= len(row) <= 5:
        raise InvalidRequest("a receipt is not a list of 4 or 5")
    bus, number, state, known, note = (*row, "")[:5]
    for value in (bus, known):
        if not isinstance(value, str) or not _BUS.fullmatch(value):
            raise InvalidRequest("a receipt without a bus or a digest of 16 hex digits")
    if not isinstance(note, str):
        raise InvalidRequest("the note of a receipt is not text")
    report = Report(bus, _whole(number, "id", 1), _whole(state, "state", UNKNOWN, REFUSED), known, note)
    if report.note != _note(report):
        raise InvalidRequest("the note of a receipt is too long, or not on one line")
    return report


def write_beat(beat: Beat) -> bytes:
    """`beat`, for all machines. [MACH-1]"""
    fields: dict[str, Any] = {
        "v": beat.version,
        "bus": beat.bus,
        "at": beat.at,
        "waiting": beat.waiting,
        "etag": beat.etag,
    }
    if beat.peers is not None:
        fields["peers"] = [_peer_fields(peer) for peer in beat.peers[:MAX_PEERS]]
    if beat.has_left:
        fields["left"] = True
    return _json(fields)


def _peer_fields(peer: FarPeer) -> dict[str, str]:
    found = {"name": peer.name, "runtime": word(peer.runtime), "delivery": word(peer.delivery)}
    return {**found, "cwd": one_line(peer.cwd)} if peer.cwd else found


def read_beat(body: bytes) -> Beat:
    """The beat in `body`. Raises InvalidRequest for what `write_beat` could not have written. [WIRE-3]"""
    fields = _read(body)
    version = _whole(fields.get("v"), "v", 1, 1_000_000)
    bus, etag = fields.get("bus"), fields.get("etag")
    for value in (bus, etag):
        if not isinstance(value, str) or not _BUS.fullmatch(value):
            raise InvalidRequest("a beat without a bus or an etag of 16 hex digits")
    peers = fields.get("peers")
    if peers is not None and (not isinstance(peers, list) or len(peers) > MAX_PEERS):
        raise InvalidRequest("the peers of a beat are no list, or too many")
    return Beat(
        bus=str(bus),
        at=_whole(fields.get("at"), "at"),
        waiting=_whole(fields.get("waiting"), "waiting"),
        etag=str(etag),
        version=version,
        peers=None if peers is None else tuple(map(_peer, peers)),
        has_left=fields.get("left") is True,
    )


def _peer(fields: object) -> FarPeer:
    if not isinstance(fields, dict):
        raise InvalidRequest("a peer in a beat is not a JSON object")
    name, runtime, delivery, cwd = (fields.get(key, "") for key in ("name", "runtime", "delivery", "cwd"))
    if not all(isinstance(one, str) for one in (name, runtime, delivery, cwd)):
        raise InvalidRequest("a peer in a beat has a field that is not text")
    if normalise_name(name) != name:
        raise InvalidRequest("the name of a peer in a beat is not in its one form")
    if word(runtime) != runtime or word(delivery) != delivery or one_line(cwd, MAX_FOLDER_CHARS) != cwd:
        raise InvalidRequest("a field of a peer in a beat is too long, or not on one line")
    return FarPeer(name, runtime, delivery, cwd)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _read(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    # Not UTF-8, not JSON, a number of thousands of digits; brackets within brackets without end.
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"it is not JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise InvalidRequest("it is not a JSON object")
    return found


def _whole(value: object, what: str, low: int = 0, high: int = _HIGHEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{what!r} is not a whole number from {low} to {high}")
    return value
