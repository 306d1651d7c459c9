"""The conversations in the middle of the console. Draws only what is on the screen. Implements [CONSOLE-3]."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from agentbus.console import look
from agentbus.console.desk import MOST_OF_THREAD, Thread
from agentbus.core.model import Status

__all__ = ["Feed"]

_GUTTER = 2
_SELECTED = Style(reverse=True)


@dataclass(frozen=True, slots=True)
class _Row:
    """Some lines of the list: a message with its copies in a group, or a note above a thread, which has none."""

    key: tuple[object, ...]  # what the lines depend on: equal keys look the same
    copies: tuple[Status, ...]
    lines: tuple[Strip, ...]

    @property
    def message(self) -> Status | None:
        """The one of its copies that is shown; None for a note."""
        return self.copies[0] if self.copies else None

    def has(self, message_id: int) -> bool:
        """Whether this is the message, or stands for it."""
        return any(one.id == message_id for one in self.copies)


def _entries(messages: Sequence[Status], name: str) -> list[list[Status]]:
    """The messages, each alone, but the copies of one message to a group together: that to `name` first."""
    found: dict[object, list[Status]] = {}
    for one in messages:
        key = one.id if one.to_group is None else (one.sender, one.to_group, one.sent_at, one.text)
        copies = found.setdefault(key, [])
        copies.insert(0 if one.recipient == name else len(copies), one)
    return list(found.values())


class Feed(ScrollView, can_focus=True):
    """The messages of some threads, newest at the end. One of them is selected; at the end it follows what comes."""

    DEFAULT_CSS = "Feed { height: 1fr; width: 1fr; overflow-x: hidden; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "step(-1)", "Up", show=False),
        Binding("down,j", "step(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "top", "Oldest", show=False),
        Binding("end", "end", "Newest, and follow", show=False),
        Binding("enter", "open", "Open"),
    ]

    class Opened(Message):
        """The selected message was opened, by Enter or by a click."""

        def __init__(self, message: Status) -> None:
            super().__init__()
            self.status = message

    class Selected(Message):
        """Another message is selected, or none."""

    class NearTop(Message):
        """The oldest loaded message is near: older ones are wanted."""

    def __init__(self, name: str) -> None:
        super().__init__(id="feed")
        self._person = name
        self._threads: Sequence[Thread] = ()
        self._rows: list[_Row] = []
        self._starts: list[int] = []  # the first line of each row
        self._cache: dict[tuple[object, ...], _Row] = {}
        self._unfolded: set[int] = set()
        self.selected: Status | None = None
        self.is_following = True

    # -- what is shown ---------------------------------------------------------------------------------------

    def show(self, threads: Sequence[Thread]) -> None:
        """Show these threads. What is at the top of the screen stays there, unless the list follows its end."""
        self._threads = threads
        self._rebuild()
        chosen = None if self.selected is None else self._message(self.selected.id)
        newest = self._newest()
        changed = newest if self.is_following or chosen is None else chosen
        if changed != self.selected:
            self.selected = changed
            self.post_message(self.Selected())

    def _build(self) -> None:
        width = max(10, self.scrollable_content_region.width)
        rows: list[_Row] = []
        for thread in self._threads:
            answered = {one.reply_to for one in thread.messages if one.reply_to is not None}
            note = Text(self._earlier(thread), "dim") if thread.is_cut else None
            if note is not None:
                rows.append(self._row((thread.root, width), "╭ ", (), [note], width))
            entries = _entries(thread.messages, self._person)
            last = len(entries) - 1
            for number, copies in enumerate(entries):
                message = copies[0]
                if last == 0 and note is None:
                    gutter = "  "
                else:
                    gutter = "╭ " if number == 0 and note is None else "╰ " if number == last else "│ "
                is_folded = message.id not in self._unfolded
                key = (*copies, message.id in answered, is_folded, gutter, width)
                row = self._cache.get(key)
                if row is None:
                    room = width - _GUTTER
                    head = look.message_head(copies, self._person, answered, width=room)
                    texts = [head, *self._body(message, is_folded=is_folded, width=room)]
                    row = self._row(key, gutter, tuple(copies), texts, width)
                rows.append(row)
        # Rows that are not shown any more are forgotten.
        self._cache = {row.key: row for row in rows}
        self._rows = rows
        starts, line = [], 0
        for row in rows:
            starts.append(line)
            line += len(row.lines)
        self._starts = starts
        self.virtual_size = Size(width, line)

    def _earlier(self, thread: Thread) -> str:
        if len(thread.messages) < MOST_OF_THREAD:
            return "earlier messages: t shows the whole thread"
        return f"earlier messages: agentbus history --thread {thread.root}"

    def _body(self, message: Status, *, is_folded: bool, width: int) -> list[Text]:
        lines = list(look.message_text(message, is_folded=is_folded).wrap(self.app.console, width, tab_size=4))
        if is_folded and len(lines) > look.FOLDED_LINES:
            lines = lines[: look.FOLDED_LINES - 1]
            lines.append(Text(f"... {len(message.text):,} characters: Enter opens it", "dim"))
        return lines

    def _row(
        self, key: tuple[object, ...], gutter: str, copies: tuple[Status, ...], texts: Sequence[Text], width: int
    ) -> _Row:
        lines = []
        for number, text in enumerate(texts):
            before = gutter if number == 0 else "  " if gutter in ("  ", "╰ ") else "│ "
            segments = [Segment(before, Style(dim=True)), *text.render(self.app.console)]
            lines.append(Strip(segments).crop(0, width))
        return _Row(key, copies, tuple(lines))

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        line = y + self.scroll_offset.y
        width = self.scrollable_content_region.width
        number = bisect_right(self._starts, line) - 1
        if number < 0 or line - self._starts[number] >= len(self._rows[number].lines):
            return Strip.blank(width, self.rich_style)
        row = self._rows[number]
        strip = row.lines[line - self._starts[number]].adjust_cell_length(width)
        is_selected = self.selected is not None and row.message is not None and row.message.id == self.selected.id
        if is_selected and line == self._starts[number]:
            strip = strip.apply_style(_SELECTED)
        return strip.apply_style(self.rich_style)

    # -- moving ----------------------------------------------------------------------------------------------

    def _anchor(self) -> tuple[int, int] | None:
        """The message at the top of the screen, and by how many lines it is scrolled out."""
        top = self.scroll_offset.y
        first = max(0, bisect_right(self._starts, top) - 1)
        for number in range(first, len(self._rows)):
            message = self._rows[number].message
            if message is not None:
                return message.id, top - self._starts[number]
        return None

    def _return_to(self, message_id: int, offset: int) -> None:
        number = self._number(message_id)
        if number is not None:
            self.scroll_to(y=self._starts[number] + offset, animate=False, immediate=True, force=True)

    def _number(self, message_id: int) -> int | None:
        return next((at for at, row in enumerate(self._rows) if row.has(message_id)), None)

    def _message(self, message_id: int) -> Status | None:
        number = self._number(message_id)
        return None if number is None else self._rows[number].message

    def _newest(self) -> Status | None:
        return next((row.message for row in reversed(self._rows) if row.message is not None), None)

    @property
    def copies(self) -> tuple[Status, ...]:
        """The selected message, with its copies if it went to a group; empty if nothing is selected."""
        number = None if self.selected is None else self._number(self.selected.id)
        return () if number is None else self._rows[number].copies

    def has(self, message_id: int) -> bool:
        """Whether a message is among those that are shown."""
        return self._number(message_id) is not None

    def select(self, message_id: int) -> bool:
        """Select a message that is shown, and bring it on the screen; False if it is not shown."""
        number = self._number(message_id)
        if number is None:
            return False
        self.selected = self._rows[number].message
        self.is_following = number == len(self._rows) - 1
        start, height = self._starts[number], len(self._rows[number].lines)
        # Of a message that is higher than the screen, its beginning.
        region = Region(0, start, 1, min(height, max(1, self.size.height)))
        self.scroll_to_region(region, animate=False, immediate=True, force=True, x_axis=False)
        self.refresh()
        self.post_message(self.Selected())
        self._ask_for_more()
        return True

    def action_step(self, by: int) -> None:
        """Select the message before or after the selected one."""
        ids = [row.message.id for row in self._rows if row.message is not None]
        if not ids:
            return
        at = ids.index(self.selected.id) if self.selected is not None and self.selected.id in ids else len(ids) - 1
        self.select(ids[min(max(at + by, 0), len(ids) - 1)])

    def action_page(self, by: int) -> None:
        """Move by a screen."""
        self.scroll_relative(y=by * max(1, self.size.height - 1), animate=False, immediate=True)
        self._moved()

    def action_top(self) -> None:
        """Go to the oldest message that is loaded; older ones come in then."""
        first = next((row.message for row in self._rows if row.message is not None), None)
        if first is not None:
            self.select(first.id)

    def action_end(self) -> None:
        """Go to the newest message, and follow what comes."""
        self.is_following = True
        self.selected = self._newest()
        self.scroll_end(animate=False, immediate=True, x_axis=False)
        self.refresh()
        self.post_message(self.Selected())

    def action_open(self) -> None:
        """Open the selected message: it is shown whole, and counts as read if it is to the person."""
        if self.selected is None:
            return
        self._unfolded ^= {self.selected.id}
        self.post_message(self.Opened(self.selected))
        self._rebuild()

    def _rebuild(self) -> None:
        anchor = self._anchor()
        self._build()
        if self.is_following:
            self.scroll_end(animate=False, immediate=True, x_axis=False)
        elif anchor is not None:
            self._return_to(*anchor)
        self.refresh()

    def _moved(self) -> None:
        """The screen was moved by hand: select a message that is on it, and follow only at the very end."""
        self.is_following = self.scroll_offset.y >= self.max_scroll_y
        anchor = self._anchor()
        if self.is_following:
            self.selected = self._newest()
        elif anchor is not None:
            self.selected = self._message(anchor[0])
        self.refresh()
        self.post_message(self.Selected())
        self._ask_for_more()

    def _ask_for_more(self) -> None:
        if self.scroll_offset.y < 2 * self.size.height:
            self.post_message(self.NearTop())

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Scrolling up ends the following."""
        event.stop()
        self.scroll_relative(y=-3, animate=False, immediate=True)
        self._moved()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """At the end, the list follows again."""
        event.stop()
        self.scroll_relative(y=3, animate=False, immediate=True)
        self._moved()

    def on_click(self, event: events.Click) -> None:
        """Select the message under the pointer; a click on the selected one opens it."""
        number = bisect_right(self._starts, event.y + self.scroll_offset.y) - 1
        row = self._rows[number] if 0 <= number < len(self._rows) else None
        if row is None or row.message is None:
            return
        if self.selected is not None and row.message.id == self.selected.id:
            self.action_open()
        else:
            self.select(row.message.id)

    def on_resize(self) -> None:
        """Wrap anew: the width is another one."""
        self._rebuild()
