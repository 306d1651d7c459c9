"""The windows that open over the console: a question, help, findings of doctor, the search, and the filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

__all__ = ["Choice", "Question", "Reading", "Search"]

_BOX = """
{name} {{ align: center middle; }}
{name} > .box {{ width: 90%; max-width: 100; height: auto; max-height: 90%; border: round ansi_blue; padding: 0 1;
  background: ansi_default; }}
"""


class Question(ModalScreen[bool]):
    """A question with what the answer will do: y or n."""

    DEFAULT_CSS = _BOX.format(name="Question")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The text, and the two keys."""
        with Vertical(classes="box"):
            yield Static(self._text, markup=False)
            yield Static(Text("\ny yes   n no", "bold"))

    def action_answer(self, answer: bool) -> None:
        """Close with the answer."""
        self.dismiss(answer)


class Reading(ModalScreen[None]):
    """A text to read."""

    DEFAULT_CSS = _BOX.format(name="Reading")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter,question_mark", "close", "Close")]

    def __init__(self, text: Text) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The text, which can be scrolled."""
        with VerticalScroll(classes="box"):
            yield Static(self._text, markup=False)

    def action_close(self) -> None:
        """Close it."""
        self.dismiss()


class Choice(ModalScreen[str | None]):
    """One of several."""

    DEFAULT_CSS = _BOX.format(name="Choice")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "close", "Close")]

    def __init__(self, title: str, options: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._title = title
        self._options = options

    def compose(self) -> ComposeResult:
        """The title and the list."""
        with Vertical(classes="box"):
            yield Static(self._title, markup=False)
            yield OptionList(*[Option(Text(label), id=key) for key, label in self._options])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Close with what was chosen."""
        self.dismiss(event.option_id)

    def action_close(self) -> None:
        """Close without a choice."""
        self.dismiss(None)


class Search(ModalScreen[int | None]):
    """Looks for words in all messages; closes with the id of the message that was chosen."""

    DEFAULT_CSS = (
        _BOX.format(name="Search")
        + """
    Search Input { border: none; height: 1; padding: 0; }
    Search OptionList { height: auto; max-height: 30; border: none; }
    """
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close"),
        Binding("down", "into", "Results", show=False),
    ]

    def __init__(self, find: Callable[[Search, str], object]) -> None:
        super().__init__()
        self._find = find
        self._state = Static(markup=False)
        self._found = OptionList(id="found")

    def compose(self) -> ComposeResult:
        """The words, what is going on, and what was found."""
        with Vertical(classes="box"):
            yield Input(placeholder='words, "a phrase", begin*, this OR that', id="words", compact=True)
            yield self._state
            yield self._found

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter looks for the words."""
        event.stop()
        if event.value.strip():
            self._find(self, event.value)

    def say(self, state: str) -> None:
        """What the search is doing, or what is wrong with the words."""
        self._state.update(state)

    def show(self, found: Sequence[tuple[int, Text]]) -> None:
        """Show these messages."""
        results = self._found
        results.clear_options()
        results.add_options([Option(text, id=str(row_id)) for row_id, text in found])
        if found:
            results.highlighted = 0
            results.focus()

    def action_into(self) -> None:
        """Go to what was found."""
        self._found.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Close with the chosen message."""
        self.dismiss(int(event.option_id or 0))

    def action_close(self) -> None:
        """Close without a choice."""
        self.dismiss(None)
