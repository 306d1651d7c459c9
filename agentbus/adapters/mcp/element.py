"""The element that the model gets for a message. It is the same for channel, inbox and check_messages.

Pure. Knows no client: an adapter says with which tags its client frames texts. Implements [CHAN-2], [CHAN-4],
[GROUP-3], [INBOX-7], [ADDR-3], [TRUST-2], [TRUST-4], [READ-4].
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence

from agentbus.core.model import Envelope, timestamp
from agentbus.core.names import machine_of

__all__ = ["CHANNEL", "Frames", "attributes", "client_chars", "element", "parts"]

# The tag of an element of ours. As a prefix: `<channels` is not ours, but it looks too much like it.
_OWN = "channel"
# What may stand between the parts of a tag: spaces of any kind, control characters and those that nobody sees.
_SPACE = r"[\s\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]*+"
# A message that is younger than this, in ms, was sent just now: its instant would only cost room. [CHAN-2]
RECENT_MS = 60_000
# An hour, in ms: a message that is younger is not worth a remark on its age. [CHAN-4]
AGED_MS = 3_600_000
_DAY_MS = 86_400_000


class Frames:
    """The tags that a peer's text must not bring with it, ours and those of the client. [TRUST-2], [TRUST-4]

    `names` are whole names, in any case, with `-` and `_` alike, with any namespace before them. Every tag in one of
    the `namespaces` counts, whatever its name is. `is_escaped`: the client writes the `<` of our element as `&lt;`, so
    a text that has it so already looks like one, too.
    """

    def __init__(self, names: Iterable[str] = (), namespaces: Iterable[str] = (), *, is_escaped: bool = False) -> None:
        whole = "|".join(re.sub("[-_]", "[-_]", name) for name in sorted(names))
        spaces = "|".join(re.escape(one) for one in sorted(namespaces))
        found = [_OWN, *([rf"(?:{whole})(?![\w-])"] if whole else []), *([rf"(?:{spaces}){_SPACE}:"] if spaces else [])]
        # Possessive (`*+`), so that a text of thousands of spaces or brackets costs no more than its length.
        opening = "(?:<|&lt;)" if is_escaped else "<"
        self._harmless = "&amp;lt;" if is_escaped else "&lt;"
        self._tag = re.compile(
            rf"{opening}(?={_SPACE}(?:/{_SPACE})?+(?:[\w.-]++{_SPACE}:{_SPACE})*(?:{'|'.join(found)}))", re.IGNORECASE
        )

    def defused(self, text: str) -> str:
        """`text` with each such tag, opening or closing, made harmless, and everything else unchanged."""
        return self._tag.sub(self._harmless, text) if "<" in text or "&" in text else text


# For a client of which nothing more is known.
CHANNEL = Frames()


def attributes(envelope: Envelope, now: int | None = None) -> dict[str, str]:
    """What the element says about a message besides its text, at `now` (ms). No value needs escaping. [CHAN-2]"""
    # Names consist of letters, digits and _ - . @ alone; the others are numbers, a time and an age.
    found = {"from": envelope.sender, "msg_id": str(envelope.id)}
    machine = machine_of(envelope.sender)
    if machine:
        found["machine"] = machine
    if envelope.reply_to is not None:
        found["reply_to"] = str(envelope.reply_to)
    if envelope.to_group is not None:
        found["to_group"] = envelope.to_group
    if envelope.answer_by is not None:
        found["answer_by"] = timestamp(envelope.answer_by)  # [ASK-1]
    old_ms = (time.time_ns() // 1_000_000 if now is None else now) - envelope.sent_at
    if old_ms > RECENT_MS:
        found["ts"] = timestamp(envelope.sent_at)
    if old_ms > AGED_MS:
        found["age"] = f"{old_ms // AGED_MS} h" if old_ms < _DAY_MS else f"{old_ms // _DAY_MS} d"
    return found


def element(envelope: Envelope, frames: Frames = CHANNEL, now: int | None = None) -> str:
    """`envelope` as the element that a client makes from its event. [READ-1]"""
    return _element(envelope, frames.defused(envelope.text), now)


def _element(envelope: Envelope, text: str, now: int | None, part: str = "") -> str:
    said = attributes(envelope, now)
    if part:
        said["part"] = part
    words = "".join(f' {key}="{value}"' for key, value in said.items())
    return f'<channel source="agentbus"{words}>{text}</channel>'


def client_chars(text: str) -> int:
    """The length of `text` as a client in JavaScript counts it: a character outside of the first plane is two."""
    return len(text) + sum(character > "\uffff" for character in text) if not text.isascii() else len(text)


def parts(envelope: Envelope, frames: Frames, max_chars: int, now: int | None = None) -> Sequence[str]:
    """`envelope` as one element, or as numbered ones of at most `max_chars` characters of text each. [READ-4]

    The texts of the parts, one after the other, are the text. They are the same each time.
    """
    text = frames.defused(envelope.text)  # before it is cut: no frame can hide in a cut
    if client_chars(text) <= max_chars:
        return [_element(envelope, text, now)]
    # Where every character counts once, this is a slice. A character that counts twice halves the slice at most.
    step = max_chars if client_chars(text) == len(text) else max_chars // 2
    cut = [text[start : start + step] for start in range(0, len(text), step)]
    return [_element(envelope, one, now, f"{number}/{len(cut)}") for number, one in enumerate(cut, 1)]
