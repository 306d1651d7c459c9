"""`agentbus` and `python -m agentbus`: a fast path for the commands that must be instant, typer for the rest.

typer costs 50 to 300 ms and 10 MB. `send` and `ask` are used in loops and hooks, an agent waits for `serve`, and
`link run` runs for weeks, so they are parsed here by hand. Every error is printed as one line. PYTHONPATH cannot shadow
what is imported at the top, since Python itself has loaded it before. An import that fails later is explained.
Implements [CLI-1], [CLI-4], [ERR-2], [ISO-2].
"""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command in sys.argv and exit with its code."""
    is_quick = sys.argv[1:2] in (["send"], ["ask"])
    if is_quick:
        gc.disable()  # the process ends before collecting would help; this saves 2 ms of 25
    try:
        code = _run_and_report(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130  # 128 + SIGINT, as shells report it
    except Exception as error:  # noqa: BLE001 - the last line of defence: one sentence, never a traceback [ERR-2]
        from agentbus.core.shadows import unexpected

        _say(unexpected(error))
        code = 1
    if is_quick:
        # The message is committed and the database is closed. A normal exit would cost 5 ms for nothing.
        os._exit(code)
    sys.exit(code)


def _say(sentence: str) -> None:
    # Not by core.stderr, and without contextlib: these may be what could not be imported.
    line = " ".join(f"agentbus: {sentence}".splitlines()) + "\n"
    try:
        os.write(2, line.encode(errors="backslashreplace"))
    except OSError:
        return  # stderr is full or gone, and there is nobody else to tell


def _run_and_report(arguments: list[str]) -> int:
    """Run the command; print the error that it raises, if it is one of ours. Return the exit code."""
    _open_standard_descriptors()
    from agentbus.core import stdout
    from agentbus.core.errors import AgentbusError

    stdout.claim()
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except stdout.ReaderGone as error:
        code = error.exit_code  # `agentbus peers | head -1`
    except AgentbusError as error:
        from agentbus.core.stderr import say

        say(str(error))
        code = error.exit_code
    return code


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
    if sys.stderr is None:
        sys.stderr = open(2, "w")  # noqa: SIM115 - for as long as we run


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command == "--version":
        from agentbus import __version__

        print(f"agentbus {__version__}")
    elif command == "send" and not {"-h", "--help"} & set(rest):
        _send(rest)
    elif command == "ask" and not {"-h", "--help"} & set(rest):
        return _ask(rest)
    elif command == "serve" and len(rest) == 1 and not rest[0].startswith("-"):
        from agentbus.cli import common

        common.serve(rest[0])
    elif arguments == ["link", "run"]:
        from agentbus.cli import link  # it runs for weeks: without what parses a command line

        link.run()
    else:
        from agentbus.cli import app

        return app.run(arguments)
    return 0


def _send(arguments: list[str]) -> None:
    to, text, options = _parsed("send", arguments, ("--from", "--wait-read", "--reply-to"))
    sender, reply_to, wait_read = options.get("--from"), options.get("--reply-to"), options.get("--wait-read")
    from agentbus.cli import common

    if wait_read is None:
        common.send(to, text, sender=sender, reply_to=reply_to)
    else:
        seconds = common.parse_seconds("--wait-read", wait_read)
        from agentbus.cli import wait

        wait.send_until_read(to, text, sender=sender, seconds=seconds, reply_to=reply_to)


def _ask(arguments: list[str]) -> int:
    to, text, options = _parsed("ask", arguments, ("--from", "--timeout"), ("--json",))
    from agentbus.cli import ask

    timeout = options.get("--timeout")
    return ask.ask(to, text, sender=options.get("--from"), timeout=timeout, as_json="--json" in options)


def _parsed(
    command: str, arguments: list[str], valued: tuple[str, ...], flags: tuple[str, ...] = ()
) -> tuple[str, str | None, dict[str, str]]:
    """The name, the text if there is one, and the options of `command`: those with a value, and flags."""
    from agentbus.core.errors import InvalidRequest

    options: dict[str, str] = {}
    words: list[str] = []
    left = iter(arguments)
    for word in left:
        option, is_joined, value = word.partition("=")
        if word == "--":
            words.extend(left)
        elif option in valued:
            options[option] = value if is_joined else next(left, "")
        elif word in flags:
            options[word] = ""
        elif word.startswith("-") and word != "-":
            problem = f"{command} has no option {word[:40]!r}"
            raise InvalidRequest(problem, hint="put -- before a text that begins with -")
        else:
            words.append(word)
    if options.get("--from") == "":
        raise InvalidRequest("--from needs a name", hint=f"agentbus {command} --from ci backend 'build is green'")
    if not 1 <= len(words) <= 2:
        problem = (
            f"{command} needs a name" if not words else f"{command} takes a name and one text, not {len(words)} words"
        )
        raise InvalidRequest(problem, hint=f"agentbus {command} backend 'the text, in quotes'")
    return words[0], words[1] if len(words) == 2 else None, options


if __name__ == "__main__":
    main()
