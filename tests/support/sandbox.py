"""Runs a command in a sandbox that refuses system calls, as those of agents do: a seccomp filter, seccomp(2).

    python sandbox.py EPERM socket,bind command ...

`socket` and `socketpair` are refused for unix sockets only, and the others always. Exit code 125: no such filter here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

NOT_HERE = 125
_CALLS = {
    "x86_64": {"socket": 41, "socketpair": 53, "bind": 49, "sendto": 44, "setsockopt": 54, "inotify_init1": 294},
    "aarch64": {"socket": 198, "socketpair": 199, "bind": 200, "sendto": 206, "setsockopt": 208, "inotify_init1": 26},
}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
# bpf(4): load a word; jump if equal; return. The words of struct seccomp_data: the number at 0, arguments from 16 on.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_REFUSE, _ALLOW = 0x00050000, 0x7FFF0000
_AF_UNIX = 1


def _filter(numbers: dict[str, int], code: int) -> bytes:
    def step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", operation, if_true, if_false, value)

    program = b""
    for name, number in numbers.items():
        refuse = step(_RETURN, _REFUSE | code)
        if name in ("socket", "socketpair"):
            refuse = step(_LOAD, 16) + step(_JUMP_IF_EQUAL, _AF_UNIX, 0, 1) + refuse
        program += step(_LOAD, 0) + step(_JUMP_IF_EQUAL, number, 0, len(refuse) // 8) + refuse
    return program + step(_RETURN, _ALLOW)


def main(error: str, calls: str, *command: str) -> None:
    known = _CALLS.get(platform.machine(), {}) if sys.platform == "linux" else {}
    try:
        program = _filter({name: known[name] for name in calls.split(",")}, getattr(errno, error))
        steps = ctypes.create_string_buffer(program)
        described = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(steps)))
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described):
            raise OSError(ctypes.get_errno(), "prctl")
    except (KeyError, OSError, AttributeError):
        sys.exit(NOT_HERE)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
