"""Makes what others chose - folders, reasons, runtimes - fit to be shown: one line, printable, bounded. Also ages.

Not for the text of a message: that is delivered as it is, and what shows it keeps its lines. Pure.
Implements [TRUST-5].
"""

from __future__ import annotations

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MAX_FOLDER_CHARS", "MAX_REASON_CHARS", "MAX_WORD_CHARS", "age", "escaped", "one_line", "span", "word"]

# What a person still reads at a glance. A longer path is cut in the middle: its ends say the most.
MAX_FOLDER_CHARS = 120
# The longest of our own reasons, with a path in it, has some 200.
MAX_REASON_CHARS = 240
# A runtime, a trigger, a delivery.
MAX_WORD_CHARS = 32
_CUT = "..."
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))
# Python calls these printable (letters and marks), but nobody sees them: a text could be hidden in them. They are those
# of Unicode's Default_Ignorable_Code_Point that are not in its categories Cf and Cn.
# A set and no pattern: to import `re` would cost `agentbus send` 2 ms.
_UNSEEN = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0),
            *range(0xFE00, 0xFE10),
            *range(0xE0100, 0xE01F0),
        ),
    )
)


def escaped(text: str) -> str:
    """`text` on one line: each control, format or unseen character, line break and lone surrogate as its escape."""
    if text.isprintable() and _UNSEEN.isdisjoint(text):
        return text
    return "".join(map(_shown, text))


def one_line(value: str, most: int = MAX_FOLDER_CHARS) -> str:
    """`value` as `escaped`, in at most `most` characters (7 or more), with `...` in the place of its middle.

    A character outside of the first plane counts as two, as in a client in JavaScript, and as it is wide on a terminal.
    Idempotent. The cost does not grow with the length of what is cut.
    """
    whole = _fitting(value, most)
    if len(whole) == len(value):
        return "".join(whole)
    room = most - len(_CUT)
    head, tail = _fitting(value, room - room // 2), _fitting(reversed(value), room // 2)
    return "".join([*head, _CUT, *reversed(tail)])


def word(value: str | None) -> str:
    """`value` as `one_line`, where it is one of a few words: a runtime, a trigger, a delivery. Empty for None."""
    return one_line(value or "", MAX_WORD_CHARS)


def span(ms: float) -> str:
    """A length of time in the unit that suits it."""
    if ms < 1_000:
        return f"{ms:.0f} ms"
    seconds = ms / 1_000
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def age(at_ms: int, now_ms: int) -> str:
    """How long ago `at_ms` was, at least 1 s, even if the clock was set back since then."""
    return span(max(1_000, now_ms - at_ms))


def _fitting(text: Iterable[str], room: int) -> list[str]:
    """The first characters of `text`, as they are shown, as far as there is room for them."""
    found: list[str] = []
    for character in text:
        shown = _shown(character)
        room -= 2 if shown > "\uffff" else len(shown)
        if room < 0:
            break
        found.append(shown)
    return found


def _shown(character: str) -> str:
    return character if character.isprintable() and character not in _UNSEEN else ascii(character)[1:-1]
