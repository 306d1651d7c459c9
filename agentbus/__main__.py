"""`agentbus` and `python -m agentbus`: a fast path for the commands that must be instant, typer for the rest.

typer costs 50 to 300 ms. `send` is used in loops and hooks, and an agent waits for `serve`, so both are parsed here by
hand. Every error is printed as one line. Implements [CLI-1], [CLI-4], [ERR-2].
"""

from __future__ import annotations

import gc
import os
import sys

from agentbus import __version__
from agentbus.core import stdout
from agentbus.core.errors import AgentbusError, InvalidRequest
from agentbus.core.stderr import say

__all__ = ["main"]


def main() -> None:
    """Run the command in sys.argv and exit with its code."""
    _open_standard_descriptors()
    is_send = sys.argv[1:2] == ["send"]
    if is_send:
        gc.disable()  # the process ends before collecting would help; this saves 2 ms of 50
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
    except stdout.ReaderGone as error:
        code = error.exit_code  # `agentbus peers | head -1`
    except AgentbusError as error:
        say(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130  # 128 + SIGINT, as shells report it
    except Exception as error:  # noqa: BLE001 - the last line of defence: one sentence, never a traceback [ERR-2]
        say(_unexpected(error))
        code = 1
    if is_send:
        # The message is committed and the database is closed. A normal exit would cost 5 ms for nothing.
        os._exit(code)
    sys.exit(code)


def _open_standard_descriptors() -> None:
    """Open /dev/null as each of 0, 1 and 2 that is closed. Otherwise the database, or a socket, would become stderr."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    # Python has no stream for a descriptor that was closed at its start, and would print to another one instead.
    if sys.stdin is None:
        sys.stdin = open(0)  # noqa: SIM115 - for as long as we run
    stdout.claim()
    if sys.stderr is None:
        sys.stderr = open(2, "w")  # noqa: SIM115 - for as long as we run


def _unexpected(error: Exception) -> str:
    """An error that nobody has foreseen, in one line, with the place in our code where it came from."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if os.sep + "agentbus" + os.sep in path:
            place = f"{os.path.basename(path)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"internal error at {place}, {type(error).__name__}: {error}"


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command == "--version":
        print(f"agentbus {__version__}")
    elif command == "send" and not {"-h", "--help"} & set(rest):
        _send(rest)
    elif command == "serve" and len(rest) == 1 and not rest[0].startswith("-"):
        from agentbus.cli import common

        common.serve(rest[0])
    else:
        from agentbus.cli import app

        return app.run(arguments)
    return 0


def _send(arguments: list[str]) -> None:
    sender: str | None = None
    wait_read: str | None = None
    words: list[str] = []
    left = iter(arguments)
    for word in left:
        if word == "--":
            words.extend(left)
        elif word == "--from" or word.startswith("--from="):
            sender = word[7:] if "=" in word else next(left, None)
            if not sender:
                raise InvalidRequest("--from needs a name", hint="agentbus send --from ci backend 'build is green'")
        elif word == "--wait-read" or word.startswith("--wait-read="):
            wait_read = word[12:] if "=" in word else next(left, "")
        elif word.startswith("-") and word != "-":
            raise InvalidRequest(f"send has no option {word[:40]!r}", hint="put -- before a text that begins with -")
        else:
            words.append(word)
    if not 1 <= len(words) <= 2:
        problem = "send needs a name" if not words else f"send takes a name and one text, not {len(words)} words"
        raise InvalidRequest(problem, hint="agentbus send backend 'the text, in quotes'")

    to, text = words[0], words[1] if len(words) == 2 else None
    if wait_read is None:
        from agentbus.cli import common

        common.send(to, text, sender=sender)
    else:
        from agentbus.cli import wait

        seconds = wait.parse_seconds("--wait-read", wait_read)
        wait.send_until_read(to, text, sender=sender, seconds=seconds)


if __name__ == "__main__":
    main()
