from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest

from agentbus.core import config, names
from agentbus.core.errors import BrokenSetup, InvalidRequest
from agentbus.registry import Triggers
from agentbus.triggers.file_watch import FileWatchTrigger
from agentbus.triggers.poll import PollTrigger
from agentbus.triggers.socket import SocketTrigger


@pytest.mark.spec("CONF-2", "NAME-3")
def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for env in ({}, dict.fromkeys(["AGENTBUS_HOME", "AGENTBUS_TRIGGER", "AGENTBUS_POLL_MS", "AGENTBUS_SYNC"], "")):
        settings = config.load(env)
        assert settings.home == Path.home() / ".agentbus"
        assert (settings.trigger, settings.poll_ms, settings.sync) == (None, 1_000, "normal")
        assert (settings.max_bytes, settings.retention_hours) == (65_536, 0)
        assert (settings.name, settings.name_note) == (names.fit_name(tmp_path.name), "")


@pytest.mark.spec("NAME-3")
def test_a_session_in_the_root_folder_has_a_name() -> None:
    assert config.load({}, folder="/").name == "agent"
    assert config.load({}, folder="/日本").name == "日本"


@pytest.mark.spec("CONF-4")
def test_a_home_is_one_path_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load({"AGENTBUS_HOME": "~/bus"}).home == Path.home() / "bus"
    assert config.load({"AGENTBUS_HOME": "/a/../b/"}).home == Path("/b")
    assert config.load({"AGENTBUS_HOME": "~/bus"}, home="/elsewhere").home == Path("/elsewhere")
    for value in ("bus", "./bus", "$HOME/bus", "~nobody-here/bus", "/bus\udcff"):
        with pytest.raises(InvalidRequest, match="AGENTBUS_HOME is "):
            config.load({"AGENTBUS_HOME": value})
        with pytest.raises(InvalidRequest, match="home is "):
            config.load({}, home=value)
    monkeypatch.setenv("HOME", "")
    assert config.load({}).home == Path(pwd.getpwuid(os.getuid()).pw_dir, ".agentbus")
    monkeypatch.setenv("HOME", "home")
    with pytest.raises(BrokenSetup, match=r"HOME is 'home', so nothing says where ~/\.agentbus is: set HOME, or AGENT"):
        config.load({})
    monkeypatch.setenv("HOME", "/")
    assert config.load({}).home == Path("/.agentbus")


@pytest.mark.spec("CONF-3")
def test_a_working_folder_that_cannot_be_told_is_no_name_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os, "getcwd", gone)
    settings = config.load({})
    assert (settings.cwd, settings.name) == ("?", "agent")


@pytest.mark.spec("CONF-1", "ERR-1", "WAKE-4")
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("AGENTBUS_POLL_MS", "9", "AGENTBUS_POLL_MS is '9': set it to a whole number from 10 to 60,000, or unset it"),
        ("AGENTBUS_POLL_MS", "60001", "from 10 to 60,000"),
        ("AGENTBUS_POLL_MS", "soon", "AGENTBUS_POLL_MS is 'soon'"),
        ("AGENTBUS_MAX_BYTES", "0", "from 1 to 1,048,576"),
        ("AGENTBUS_MAX_BYTES", "1048577", "from 1 to 1,048,576"),
        ("AGENTBUS_RETENTION_HOURS", "-1", "from 1 to 8,760"),
        ("AGENTBUS_SYNC", "maybe", "AGENTBUS_SYNC is 'maybe': set it to normal or full, or unset it"),
    ],
)
def test_an_unusable_value_is_refused(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        config.load({variable: value})
    assert sentence in str(caught.value)


@pytest.mark.spec("WAKE-5", "CONF-1")
def test_the_trigger_is_what_was_asked_for(home: Path) -> None:
    def preferred(value: str) -> list[type]:
        return [type(one) for one in Triggers(config.load({"AGENTBUS_TRIGGER": value}, home=home)).preferred()]

    assert preferred("") == [SocketTrigger, FileWatchTrigger, PollTrigger]
    assert preferred("socket") == [SocketTrigger]
    assert preferred("file-watch") == [FileWatchTrigger]
    assert preferred("poll") == [PollTrigger]
    with pytest.raises(
        InvalidRequest, match="AGENTBUS_TRIGGER is 'x': set it to socket or file-watch or poll, or unset it"
    ):
        preferred("x")
    triggers = Triggers(config.load({}, home=home))
    assert list(triggers) == ["socket", "file-watch", "poll"]
    assert triggers.get("carrier-pigeon") is None, "a peer of a newer version is not an error"
    assert len(triggers) == 3


@pytest.mark.spec("TRUST-1")
def test_a_home_is_made_private_and_its_parents_are_not(tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    assert config.prepare_home(home) == str(home / "bus.db")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.parent.stat().st_mode) == 0o777 & ~current_umask()
    config.prepare_home(home)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.spec("TRUST-1", "ERR-1")
@pytest.mark.parametrize("which", ["home", "bus.db", "bus.db-wal", "bus.db-shm"])
@pytest.mark.parametrize("problem", ["symlink", "writable by others", "another user's"])
def test_what_is_not_ours_alone_is_refused_with_the_way_out(
    home: Path, which: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o700)
    path = home if which == "home" else home / which
    if which != "home":
        path.touch(mode=0o600)
    if problem == "symlink":
        path.rename(home.parent / "target")
        path.symlink_to(home.parent / "target")
        sentence = "is a symlink: put a real"
    elif problem == "writable by others":
        path.chmod(0o620)
        sentence = f"{path} can be written by other users (mode 0620): chmod go-rwx '{path}'"
    else:
        if os.geteuid() == 0:
            os.chown(path, 12_345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12_345)
        sentence = "set AGENTBUS_HOME to a folder of your own"
    with pytest.raises(BrokenSetup) as caught:
        config.prepare_home(home)
    assert sentence in str(caught.value)


@pytest.mark.spec("TRUST-1", "ERR-1")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
@pytest.mark.parametrize(
    ("us", "owner", "hint"),
    [
        (0, 1_000, "run agentbus as that user, with sudo -u '#1000', or set AGENTBUS_HOME to a folder of your own"),
        (1_000, 0, "sudo chown -R 1000 '{home}', or set AGENTBUS_HOME to a folder of your own"),
        (1_000, 1_001, "set AGENTBUS_HOME to a folder of your own"),
    ],
)
def test_nobody_is_told_to_take_away_what_another_user_has(
    home: Path, us: int, owner: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o700)
    os.chown(home, owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: us)
    with pytest.raises(BrokenSetup) as caught:
        config.prepare_home(home)
    assert str(caught.value).endswith(f": {hint.format(home=home)}")


@pytest.mark.parametrize("home", [Path("/dev/null"), Path("/dev/null/x"), Path("/proc/x")])
def test_a_home_that_cannot_be_is_a_sentence(home: Path) -> None:
    with pytest.raises(BrokenSetup, match=r"(is not a folder|cannot be (created|accessed) \(.*\)): "):
        config.prepare_home(home)
