"""The commands of the link, and what other commands show about other machines. No server is needed."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentbus import registry
from agentbus.cli import common, link, setup
from agentbus.core.errors import BrokenSetup, InvalidRequest, Refused
from agentbus.core.linkstore import LinkStore
from agentbus.core.machines import FarPeer, Machine
from agentbus.core.names import LINK_NAME
from agentbus.link import admin, settings
from tests.support.command import agentbus, clean_env
from tests.support.fakes import arrival


@pytest.fixture
def joined(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that is the machine alpha of a mesh."""
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    link.init(["alpha", "beta"], mesh="team", at="127.0.0.1", folder=str(tmp_path / "team"))
    link.join(str(tmp_path / "team" / "alpha.invite"))
    return home


def note(store: LinkStore) -> None:
    """What a link that runs and is connected has written down."""
    store.begin("alpha")
    store.claim(arrival("*link"), now=1, endpoint=str, join_crowd=True)
    store.connected({"server": "nats.example.net", "since": "1"})
    peers = (FarPeer("backend", "claude", "channel"),)
    for name, gone_at, shown in (("beta", None, peers), ("gamma", 5, ())):
        store.note_machines(
            [Machine(name=name, bus="0" * 16, version=1, seen_at=5, gone_at=gone_at, skew_ms=0, peers=shown)]
        )


@pytest.mark.spec("LINK-7")
def test_init_writes_a_configuration_and_invites_and_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "team"
    link.init(["Laptop", "buildbox"], mesh="team", at="nats.example.net:4333", folder=str(folder))
    out = capsys.readouterr().out
    assert f"nats-server -c {folder}/nats.conf" in out
    invite = json.loads((folder / "laptop.invite").read_text())
    assert (invite["server"], invite["machine"], invite["mesh"]) == ("tls://nats.example.net:4333", "laptop", "team")
    assert invite["ca"].startswith("-----BEGIN CERTIFICATE")
    for name in ("laptop.invite", "machines.conf", "mesh.json", "ca.key", "server.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    shown = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", "server.pem"], cwd=folder, capture_output=True
    )
    assert shown.returncode == 0, shown
    # As the README shows it: without a folder it is one in the working directory.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    link.init(["laptop"], mesh="crew", at="nats.example.net", folder=None)
    assert (tmp_path / "here" / "crew" / "server.pem").exists()
    with pytest.raises(Refused, match="is there already: agentbus link add --in"):
        link.init(["x"], mesh="team", at="nats.example.net", folder=str(folder))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(BrokenSetup, match="openssl, which makes the certificates, does not run"):
        link.init(["x"], mesh="team", at="nats.example.net", folder=str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "team"]
    monkeypatch.undo()
    for at in ("a b", "http://x", "user@host", "host:port", ""):
        with pytest.raises(InvalidRequest):
            link.init(["x"], mesh="team", at=at, folder=str(tmp_path / "other"))
    with pytest.raises(InvalidRequest, match="is not the name of a machine"):
        link.init(["x.y"], mesh="team", at="127.0.0.1", folder=str(tmp_path / "other"))


@pytest.mark.spec("LINK-7")
def test_machines_are_added_and_removed(tmp_path: Path, joined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "team"
    link.add(["tablet"], folder=str(folder))
    assert "# tablet" in (folder / "machines.conf").read_text()
    with pytest.raises(Refused, match="tablet is a machine of this mesh already: remove it first"):
        link.add(["tablet"], folder=str(folder))
    link.remove(["tablet", "beta"], folder=str(folder))
    assert "nats-server --signal reload" in capsys.readouterr().out
    text = (folder / "machines.conf").read_text()
    assert "tablet" not in text
    assert "beta" not in text
    assert not (folder / "beta.invite").exists()
    with pytest.raises(Refused, match="beta is no machine of this mesh: it has alpha"):
        link.remove(["beta"], folder=str(folder))
    with pytest.raises(InvalidRequest, match="is not the folder of a mesh"):
        link.add(["x"], folder=str(tmp_path))


@pytest.mark.spec("LINK-7")
def test_join_writes_settings_that_are_ours_alone_once(
    joined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("link.toml", "link.key"):
        assert stat.S_IMODE((joined / name).stat().st_mode) == 0o600, name
    found = settings.load(joined)
    assert (found.mesh, found.machine, found.servers) == ("team", "alpha", ("nats://127.0.0.1:4222",))
    assert (found.accepts("anybody"), found.share, len(found.home_id)) == (True, "names", 16)
    common.send("backend@beta", "x", sender="ci")
    assert 'queued #1 for "backend@beta": the link is not running: agentbus link run' in capsys.readouterr().out
    with pytest.raises(Refused, match="has a link already: agentbus link leave ends it"):
        link.join(str(tmp_path / "team" / "beta.invite"))
    other = tmp_path / "other.invite"
    for text in ("", "[]", "{}", '{"mesh": 1}', (tmp_path / "team" / "alpha.invite").read_text().replace("SU", "XX")):
        other.write_text(text)
        with pytest.raises(InvalidRequest, match="is no invite"):
            admin.join(tmp_path, other)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        admin.join(tmp_path, tmp_path / "missing")
    assert not (tmp_path / "link.toml").exists()


@pytest.mark.spec("LINK-7", "LSEC-1")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('servers = ["nats://nats.example.net"]', "nats://nats.example.net is not encrypted: use tls://"),
        ('servers = ["http://x"]', "use tls://HOST:PORT"),
        ("servers = []", "servers is empty"),
        ("servers = [1]", "servers is not a list of texts"),
        ('machine = "A B"', "is not the name of a machine"),
        ('share = "all"', "use names or none or folders"),
        ("accept = 1", "accept is not a list"),
        ('colour = "red"', "there is no setting 'colour'"),
        ("mesh = [", "is not valid"),
        ('key = ""', "neither key nor creds is set"),
        ("ca = 1", "ca is not a text"),
    ],
)
def test_settings_that_are_not_valid_are_refused_in_a_sentence(joined: Path, line: str, said: str) -> None:
    path = joined / "link.toml"
    key = line.partition(" ")[0]
    kept = [one for one in path.read_text().splitlines() if not one.startswith(f"{key} =")]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(BrokenSetup) as caught:
        settings.load(joined)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.spec("LINK-7")
def test_a_key_that_others_can_read_is_refused(joined: Path) -> None:
    (joined / "link.toml").chmod(0o644)
    with pytest.raises(BrokenSetup, match="can be read by other users: chmod 600"):
        settings.load(joined)
    (joined / "link.toml").chmod(0o600)
    (joined / "link.key").chmod(0o640)
    with pytest.raises(BrokenSetup, match="can be read by other users"):
        settings.load(joined).seed()


@pytest.mark.spec("LINK-9")
def test_without_the_library_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.split(".")[0] == "nats" or one == "agentbus.link.nats"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(BrokenSetup, match=r"nats is not installed, .*agentbus-local\[link\]"):
        registry.link("nats:NatsRelay")


@pytest.mark.spec("CLI-1")
def test_a_send_without_a_link_loads_nothing_of_it(home: Path) -> None:
    code = (
        "import sys, agentbus.__main__ as m\n"
        "sys.argv = ['agentbus', 'send', 'bob', 'hi']\n"
        "import os\n"
        "def end(code):\n"
        "    found = [one for one in sys.modules if 'link' in one or 'machines' in one or one == 'nats']\n"
        "    os.write(2, repr(found).encode())\n"
        "    exit(code)\n"
        "exit, os._exit = os._exit, end\n"
        "m.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_env(home), capture_output=True, text=True)
    assert done.stderr == "[]", done


@pytest.mark.spec("MACH-2", "LINK-10")
def test_peers_and_status_show_the_other_machines(joined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LinkStore(joined / "bus.db", busy_ms=0)
    note(store)
    store.send("ci", "backend@beta", "x", now=1)
    capsys.readouterr()
    common.peers(as_json=False)
    header, row, line = capsys.readouterr().out.splitlines()
    assert header.startswith("NAME")
    assert row.split()[:3] == ["backend@beta", "claude", "channel"]
    assert row.endswith("d ago")
    assert line.startswith("alpha -> nats.example.net connected ")
    assert "; beta: 1 online, 1 message waits for it; gamma: last heard of " in line
    common.peers(as_json=True)
    rows = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert [(one["name"], one["online"]) for one in rows] == [("backend@beta", False), ("backend@beta", True)]
    link.status(as_json=True)
    own, beta, gamma = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert (own["machine"], own["trouble"]) == ("alpha", None)
    assert (beta["machine"], beta["online"], beta["waiting"], beta["peers"]) == ("beta", True, 1, ["backend"])
    assert gamma["online"] is False
    link.status(as_json=False)
    assert 'this home is "alpha" in the mesh "team"' in capsys.readouterr().out
    store.close()


@pytest.mark.spec("MACH-2", "ADDR-2")
def test_nobody_is_there_once_the_link_was_killed(joined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It could not write down that it is not connected any more."""
    store = LinkStore(joined / "bus.db", busy_ms=0)
    note(store)
    link_peer = store.link()
    assert link_peer is not None
    store.leave(link_peer.session, link_peer.process.pid, now=2)
    with common.bus_and_settings() as (bus, _settings):
        assert [one.is_there for one in bus.machines()] == [False, False]
        assert str(bus.send("ci", "backend", "x")).endswith("no such peer yet, it is delivered when one starts")
        assert bus.broadcast("ci", "x", everywhere=True) == []
    capsys.readouterr()
    common.peers(as_json=False)
    shown = capsys.readouterr().out
    assert "nobody is online" in shown
    assert "alpha: the link is not running: agentbus link run; beta: last heard of" in shown
    link.status(as_json=True)
    assert [json.loads(one)["online"] for one in capsys.readouterr().out.splitlines()[1:]] == [False, False]
    store.close()


@pytest.mark.spec("LINK-10")
def test_leave_removes_what_join_wrote_and_keeps_the_mail(joined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LinkStore(joined / "bus.db", busy_ms=0)
    store.begin("alpha")
    store.send("ci", "backend@beta", "x", now=1)
    claimed = store.claim(arrival("*link"), now=1, endpoint=str, join_crowd=True)
    assert claimed is not None
    with pytest.raises(Refused, match="the link runs: end it first"):
        link.leave()
    store.leave(claimed[0].session, claimed[0].process.pid, now=2)
    capsys.readouterr()
    link.leave()
    assert "1 message for another machine stays here" in capsys.readouterr().out
    assert not list(joined.glob("link*"))
    assert store.machine() == ""
    assert [one.text for one in store.queries.inbox("backend@beta", 9)] == ["x"]
    with pytest.raises(InvalidRequest, match="has no link: agentbus link join"):
        link.status(as_json=False)
    store.close()


@pytest.mark.spec("UNINST-1", "UNINST-2")
def test_uninstall_waits_for_the_link_and_takes_its_key(joined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "registry", SimpleNamespace(**{**vars(registry), "manifests": lambda: ([], [])}))
    store = LinkStore(joined / "bus.db", busy_ms=0)
    claimed = store.claim(arrival(LINK_NAME), now=1, endpoint=str, join_crowd=True)
    assert claimed is not None
    with pytest.raises(Refused, match=r"1 session is online \(the link\)"):
        setup.uninstall(keep_mail=True, force=False)
    store.leave(claimed[0].session, claimed[0].process.pid, now=2)
    store.close()
    setup.uninstall(keep_mail=True, force=False)
    assert not list(joined.glob("link*"))
    assert (joined / "bus.db").exists()


@pytest.mark.spec("LINK-10")
def test_service_prints_a_unit_and_changes_nothing(joined: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    link.service()
    found = capfd.readouterr()
    assert "link run" in found.out
    assert str(joined) in found.out
    assert "put this into" in found.err
    if shutil.which("systemd-analyze") and sys.platform != "darwin":
        unit = joined / "agentbus-link.service"
        unit.write_text(found.out)
        done = subprocess.run(["systemd-analyze", "verify", "--user", str(unit)], capture_output=True, text=True)
        assert "agentbus-link" not in done.stderr, done.stderr


@pytest.mark.spec("LINK-7", "ERR-2")
def test_what_is_typed_wrongly_is_one_line(home: Path, tmp_path: Path) -> None:
    for words, code in (
        (("link", "run"), 2),
        (("link", "status"), 2),
        (("link", "join", str(tmp_path / "x")), 2),
        (("link", "init", "a"), 2),
        (("link", "what"), 2),
    ):
        done = agentbus(home, *words)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done
