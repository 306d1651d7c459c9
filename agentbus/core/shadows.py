"""Finds what shadows a module of ours or of Python: a path of PYTHONPATH, or the working folder of `python -m`.

Asked only when something has failed. It may import nothing, because that could be what is shadowed. Implements [ISO-2].
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # true for a type checker; the module must not import what could be shadowed
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["explain", "unexpected"]

_SUFFIXES = ("", ".py", ".so")


def explain(error: BaseException) -> str:
    """Which path shadows which module, if `error` can come from that: one sentence; else nothing."""
    files = set(_files(error))
    for folder in _foreign():
        for name in sorted(_modules(folder)):
            if name == "agentbus" or not _is_met(folder, name, error, files) or not _is_elsewhere(name, folder):
                continue
            return (
                f"{os.path.abspath(os.path.join(folder, name))} shadows the module {name} that agentbus needs "
                f"({type(error).__name__}: {error}): unset PYTHONPATH, leave that folder, or run {sys.executable}"
                " -E -P -m agentbus"
            )
    return ""


def unexpected(error: BaseException) -> str:
    """One sentence for an error that nobody has foreseen: what is shadowed, or where it came from. [ERR-2]"""
    trace, place = error.__traceback__, ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if os.sep + "agentbus" + os.sep in path:
            place = f" at {os.path.basename(path)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return explain(error) or f"internal error{place}, {type(error).__name__}: {error}"


def _foreign() -> list[str]:
    """The folders that Python searches before its own: those of PYTHONPATH, and that of the script or of `-m`."""
    own = os.path.dirname(os.__file__)
    return sys.path[: sys.path.index(own)] if own in sys.path else []


def _modules(folder: str) -> set[str]:
    try:
        return {name for file in os.listdir(folder or ".") if (name := file.split(".")[0]).isidentifier()}
    except OSError:
        return set()


def _files(error: BaseException) -> Iterator[str]:
    """The files that an error went through, and those of the errors before it."""
    seen: BaseException | None = error
    while seen is not None:
        trace = seen.__traceback__
        while trace is not None:
            yield trace.tb_frame.f_code.co_filename
            trace = trace.tb_next
        if isinstance(seen, SyntaxError) and seen.filename:
            yield seen.filename
        seen = seen.__cause__ or seen.__context__


def _is_met(folder: str, name: str, error: BaseException, files: set[str]) -> bool:
    """Whether `error` came through the module `name` of `folder`, or speaks of it."""
    here = os.path.abspath(os.path.join(folder, name))
    loaded = getattr(sys.modules.get(name), "__file__", None) or ""
    met = {*files, loaded} if f"'{name}" in str(error) else files
    return any(one.startswith((f"{here}.", here + os.sep)) for one in met)


def _is_elsewhere(name: str, folder: str) -> bool:
    """Whether Python itself, or what is installed, has a module of that name too."""
    others = [path for path in sys.path if os.path.abspath(path) != os.path.abspath(folder)]
    return name in sys.stdlib_module_names or any(
        os.path.exists(os.path.join(path, name + suffix)) for path in others for suffix in _SUFFIXES
    )
