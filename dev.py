#!/usr/bin/env python3
"""Set up a checkout and run it: python3 dev.py demo | test | check | setup  (what follows is handed on)

Needs Python 3.11 or newer with its venv module, and nothing else. Everything is installed into .venv beside this
file, once, and again when pyproject.toml or this file changes. Written so that an old Python can still read it and
say what is missing.
"""

import hashlib
import os
import shutil
import subprocess
import sys

NEEDED = (3, 11)
ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
# The previous generation of the SDK, beside the current one: a test connects its client to our server.
OLD_SDK = os.path.join(VENV, "old-sdk")
OLD_SDK_REQUIREMENT = "mcp>=1.20,<2"


def fail(message):
    sys.exit("dev.py: " + message)


def find_python():
    """Run again under a Python that is new enough, if this one is not."""
    if sys.version_info >= NEEDED:
        return
    for minor in range(19, NEEDED[1] - 1, -1):
        found = shutil.which("python3.%d" % minor)
        # A version manager may have put a name on PATH that runs nothing.
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            os.execv(found, [found, os.path.abspath(__file__)] + sys.argv[1:])
    fail("agentbus needs Python 3.11 or newer, this is %d.%d: install one, then repeat" % sys.version_info[:2])


def run(*command):
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        fail("this failed with exit code %d: %s" % (done.returncode, " ".join(command)))


def pip(*arguments):
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments)


def ready(stage, install):
    """Run `install` unless it was run for these very files."""
    stamp = os.path.join(VENV, "ready-" + stage)
    digest = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "dev.py"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    try:
        with open(stamp) as file:
            if file.read() == digest.hexdigest():
                return
    except OSError:
        pass  # never installed, or interrupted
    print("dev.py: setting up %s for %s, once" % (os.path.relpath(VENV), stage), flush=True)
    install()
    with open(stamp, "w") as file:
        file.write(digest.hexdigest())


def make_venv():
    if os.path.exists(PYTHON):
        return
    try:
        import ensurepip  # noqa: F401 - some Linux distributions ship it apart, and venv fails late without it
        import venv  # noqa: F401
    except ImportError:
        fail("this Python cannot make virtual environments: on Debian or Ubuntu, apt install python3-venv, then repeat")
    run(sys.executable, "-m", "venv", "--clear", VENV)


def install_package():
    make_venv()
    pip("--editable", ".")


def install_tools():
    ready("use", install_package)
    pip("--editable", ".[dev]")
    # It is never beside ours on one path, so pip's warning that the two do not fit together is none of ours.
    pip("--no-warn-conflicts", "--target", OLD_SDK, "--upgrade", OLD_SDK_REQUIREMENT)


def main():
    find_python()
    task, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if task == "setup":
        ready("use", install_package)
        print("dev.py: the command is %s" % os.path.join(VENV, "bin", "agentbus"))
    elif task == "demo":
        ready("use", install_package)
        os.execv(PYTHON, [PYTHON, "-m", "agentbus", "demo"] + rest)
    elif task == "test":
        ready("development", install_tools)
        # The whole suite mostly waits for processes, so there are more workers than cores.
        side_by_side = ["-n", str(min(8, 2 * (os.cpu_count() or 1))), "--dist", "worksteal"]
        os.execv(PYTHON, [PYTHON, "-m", "pytest"] + (rest or side_by_side))
    elif task == "check":
        ready("development", install_tools)
        run(PYTHON, "-m", "ruff", "format", "--check", ".")
        run(PYTHON, "-m", "ruff", "check", ".")
        run(PYTHON, "-m", "mypy")
    else:
        fail("say what to do: python3 dev.py demo | test | check | setup")


if __name__ == "__main__":
    main()
