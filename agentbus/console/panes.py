"""The parts of the console around the messages: the peers, the details, and where one writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.suggester import Suggester
from textual.widgets import Input, Label, OptionList, Static, TextArea
from textual.widgets.option_list import Option

from agentbus.console import look
from agentbus.core.errors import AgentbusError
from agentbus.core.model import Status
from agentbus.core.names import address
from agentbus.core.text import escaped

__all__ = ["Composer", "Details", "Draft", "PeerList"]


class PeerList(OptionList):
    """Who is there, and for whom mail waits. Enter shows the messages of that name alone, and all again."""

    DEFAULT_CSS = """
    PeerList { width: 26; height: 1fr; background: ansi_default; text-wrap: nowrap; text-overflow: ellipsis; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
    ]

    def __init__(self, id: str) -> None:
        super().__init__(id=id, compact=True)
        self._shown: list[tuple[str, Text]] = []

    def show(self, lines: Iterable[tuple[str, Text]]) -> None:
        """Show these names, each with its lines. The highlighted one stays so."""
        lines = list(lines)
        if lines == self._shown:
            return
        is_same = [name for name, _ in lines] == [name for name, _ in self._shown]
        self._shown = lines
        if is_same:
            # It stays where it is scrolled to.
            for name, text in lines:
                self.replace_option_prompt(name, text)
            return
        chosen = self.chosen
        self.clear_options()
        self.add_options([Option(text, id=name) for name, text in lines])
        if any(name == chosen for name, _ in lines):
            self.highlighted = self.get_option_index(chosen)

    @property
    def chosen(self) -> str:
        """The highlighted name; "" if there is none."""
        option = self.highlighted_option
        return option.id or "" if option is not None else ""


class Details(VerticalScroll):
    """All about the selected message, where the screen is wide enough."""

    DEFAULT_CSS = "Details { width: 1fr; max-width: 60; padding: 0 1; border-left: solid ansi_bright_black; }"

    def __init__(self) -> None:
        super().__init__()
        self._text = Static(markup=False)
        self._message: Status | None = None

    def compose(self) -> ComposeResult:
        """One text."""
        yield self._text

    def show(self, message: Status | None) -> None:
        """Show this message, from its beginning; or none."""
        self._message = message
        # A new text has the whole screen laid out anew, which doubles what a key costs: not where nobody sees it.
        if self.display:
            self._draw()
            self.scroll_home(animate=False)

    def on_show(self) -> None:
        """There is room for it now."""
        self._draw()

    def _draw(self) -> None:
        self._text.update("" if self._message is None else look.details(self._message))


@dataclass(frozen=True, slots=True)
class Draft:
    """What is being written. `kind`: answer, ask, send or broadcast. `reply_to`: the id that it answers, or 0."""

    kind: str
    to: str = ""
    text: str = ""
    reply_to: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Two drafts with the same key are one: an answer belongs to its message, the others to their kind."""
        return self.kind, self.reply_to

    @property
    def title(self) -> str:
        """What this will be, for the person."""
        if self.kind == "answer":
            return f"Answer #{self.reply_to} to {escaped(self.to)}"
        return {"ask": "Ask a peer", "send": "Send", "broadcast": "To everybody online"}[self.kind]


class _Names(Suggester):
    """Completes the names of those one can write to."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        super().__init__(use_cache=False, case_sensitive=False)
        self._names = names

    async def get_suggestion(self, value: str) -> str | None:
        """The first name that begins like `value`."""
        return next((name for name in self._names() if value and name.startswith(value.casefold())), None)


class _Text(TextArea):
    """Several lines. Enter sends; Ctrl-J, and Shift-Enter where the terminal tells it apart, begin a new line."""

    class Sent(Message):
        """Enter was pressed."""

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.post_message(self.Sent())
        elif event.key in ("ctrl+j", "shift+enter", "alt+enter"):
            event.stop()
            event.prevent_default()
            self.insert("\n")
        else:
            await super()._on_key(event)


class Composer(Vertical):
    """Where one writes. A draft stays when the composer is closed, until it is sent."""

    DEFAULT_CSS = """
    Composer { height: auto; max-height: 50%; border-top: solid ansi_bright_black; display: none; }
    Composer.open { display: block; }
    Composer Input { height: 1; border: none; padding: 0; background: ansi_default; }
    Composer TextArea { height: auto; min-height: 3; max-height: 12; border: none; padding: 0; }
    Composer #problem { color: ansi_red; height: auto; display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "Close, the draft stays")]

    class Finished(Message):
        """The person has finished a draft: it is to be sent."""

        def __init__(self, draft: Draft) -> None:
            super().__init__()
            self.draft = draft

    class Closed(Message):
        """The composer was closed."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        super().__init__()
        self._title = Label(markup=False)
        self._to = Input(placeholder="to: a name or @group", suggester=_Names(names), id="to", compact=True)
        self._text = _Text(id="text", compact=True, highlight_cursor_line=False)
        self._problem = Static(id="problem", markup=False)
        self._drafts: dict[tuple[str, int], Draft] = {}
        self._now = Draft("send")
        self._is_sending = False  # a second Enter must not send it again

    def compose(self) -> ComposeResult:
        """The title, the name, the text, and a line for what is wrong."""
        yield self._title
        yield self._to
        yield self._text
        yield self._problem

    @property
    def is_open(self) -> bool:
        """Whether somebody is writing."""
        return self.has_class("open")

    def open(self, draft: Draft) -> None:
        """Write `draft`, or go on with what was written for the same purpose."""
        if self.is_open:
            self._keep()
        known = self._drafts.get(draft.key)
        self._now = draft if known is None else replace(known, to=draft.to or known.to)
        self.add_class("open")
        self._title.update(f"{self._now.title}   (Enter sends, Ctrl-J new line, Esc keeps it)")
        to, text = self._to, self._text
        to.display = self._now.kind in ("ask", "send")
        to.value = self._now.to
        text.text = self._now.text
        text.move_cursor(text.document.end)
        self._complain("")
        (to if to.display and not to.value else text).focus()

    def _keep(self) -> Draft:
        to, text = self._to, self._text
        self._now = replace(self._now, to=to.value if to.display else self._now.to, text=text.text)
        if self._now.text:
            self._drafts[self._now.key] = self._now
        else:
            self._drafts.pop(self._now.key, None)
        return self._now

    def action_close(self) -> None:
        """Close, and keep the draft."""
        self._keep()
        self.remove_class("open")
        self.post_message(self.Closed())

    def _complain(self, problem: str) -> None:
        self._problem.update(problem)
        self._problem.display = bool(problem)

    def failed(self, draft: Draft, problem: str) -> bool:
        """The draft, which stays, could not be sent: say why below it. False if it is not open any more."""
        self._is_sending = False
        is_shown = self.is_open and self._now.key == draft.key
        if is_shown:
            self._complain(problem)
        return is_shown

    def sent(self, draft: Draft) -> None:
        """The draft was sent, and is gone."""
        self._is_sending = False
        self._drafts.pop(draft.key, None)
        if self._now.key == draft.key:
            self.remove_class("open")
            self.post_message(self.Closed())

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter in the name goes to the text, if it is a name."""
        event.stop()
        try:
            if not event.value.startswith("@"):
                address(event.value)
        except AgentbusError as error:
            self._complain(str(error))
            return
        self._complain("")
        self._text.focus()

    def on__text_sent(self, event: _Text.Sent) -> None:
        """Enter in the text sends it."""
        event.stop()
        draft = self._keep()
        if self._is_sending:
            self._complain("wait: the message before is being sent")
        elif not draft.text.strip():
            self._complain("the message is empty: write something, or Esc")
        elif draft.kind in ("ask", "send") and not draft.to:
            self._complain("to whom? Write a name above")
            self._to.focus()
        else:
            self._complain("")
            self._is_sending = True
            self.post_message(self.Finished(draft))
