"""`agentbus console`: one window for the person: who is there, what was said, what waits. Answer it, or stop it.

A face. desk.py is what the console knows and does, without a terminal; look.py is how a message is drawn; the rest are
parts of the screen. Textual is imported here alone. Implements [CONSOLE-1] to [CONSOLE-9].
"""

from __future__ import annotations

import sys

from agentbus.core.errors import BrokenSetup, InvalidRequest

__all__ = ["run"]


def run(asked: str | None, *, is_quiet: bool, is_shown: bool) -> None:
    """Open the console for the person called `asked` (None: AGENTBUS_NAME, else the login name), until it is closed.

    `is_quiet`: no bell. `is_shown`: what is for the person is shown by the desktop too.

    Raises InvalidRequest without a terminal, BrokenSetup where Textual is not installed, and what opening the bus
    raises.
    """
    # Textual draws on stderr.
    if not (sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()):
        raise InvalidRequest("the console needs a terminal", hint="agentbus watch shows what happens in a pipe, too")
    try:
        import textual  # noqa: F401 - looked for first, so that its absence is one sentence
    except ImportError as error:
        raise BrokenSetup(
            f"the console needs Textual, which cannot be imported ({error})",
            hint="pip install 'agentbus-local[console]', or the same with pipx or uv",
        ) from error
    from agentbus.console.app import open_console

    open_console(asked, is_quiet=is_quiet, is_shown=is_shown)
