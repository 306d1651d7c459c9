"""Setting up a mesh: what its server needs, an invite for each machine, and a home that takes one.

Makes keys and certificates, writes files, starts nothing, and speaks to no server. Implements [LINK-7], [LINK-10],
[LSEC-1], [LSEC-2].
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nkeys  # type: ignore[import-untyped]  # it has no types

from agentbus.core.errors import BrokenSetup, InvalidRequest, Refused
from agentbus.core.names import machine_name
from agentbus.core.text import one_line
from agentbus.link.settings import CA_FILE, KEY_FILE, LINK_FILE, check_server, is_loopback, load, write_private

__all__ = ["add", "init", "join", "permissions", "remove"]

_MESH_FILE, _CONF, _MACHINES_CONF = "mesh.json", "nats.conf", "machines.conf"
_DEFAULT_PORT = 4222
# So that a message of 1 MiB of whatever characters fits, which can have six times as many bytes as JSON.
_MAX_PAYLOAD = "8MB"
# The stream takes 1 GiB of it; the rest is for its index, and for a second mesh.
_MAX_STORE = "4GB"
_DAYS = "3650"
_HOST = re.compile(r"[a-z0-9.:-]+")
_OPENSSL_CONF = """\
[req]
distinguished_name = dn
prompt = no
[dn]
CN = {name}
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {kind}:{host}
"""


def permissions(mesh: str, machine: str) -> dict[str, list[str]]:
    """What a machine may publish, and to what it may subscribe; nothing else. [LSEC-2]"""
    base, stream = f"ab.{mesh}", f"AB_{mesh}"
    return {
        "publish": [
            f"{base}.to.*.{machine}.>",
            f"{base}.here.{machine}",
            f"{base}.who",
            # Makes the stream, if it is not there; of one that is there, it changes nothing.
            f"$JS.API.STREAM.CREATE.{stream}",
            f"$JS.API.CONSUMER.INFO.{stream}.{machine}",
            f"$JS.API.CONSUMER.DELETE.{stream}.{machine}",
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{machine}",
            f"$JS.API.CONSUMER.CREATE.{stream}.{machine}.{base}.to.{machine}.>",
            f"$JS.ACK.{stream}.{machine}.>",
        ],
        "subscribe": [f"_INBOX.{machine}.>", f"{base}.here.*", f"{base}.who"],
    }


def init(mesh: str, at: str, machines: Sequence[str], folder: Path) -> list[str]:
    """Write the configuration of a server into `folder`, and an invite for each of `machines`. [LINK-7]

    `at` is HOST or HOST:PORT, as the machines reach the server. Returns what to tell the user. Raises InvalidRequest,
    Refused if `folder` is there, and BrokenSetup.
    """
    mesh = machine_name(mesh, "mesh")
    host, port = _host_and_port(at)
    is_encrypted = not is_loopback(host)
    server = f"{'tls' if is_encrypted else 'nats'}://{f'[{host}]' if ':' in host else host}:{port}"
    check_server(server, insecure=False)
    names = _distinct(machines)
    if folder.exists():
        raise Refused(f"{folder} is there already", hint=f"agentbus link add --in {folder} NAME lets more machines in")
    with _built(folder) as made:
        if is_encrypted:
            _make_certificates(made, mesh, host)
        facts = {"mesh": mesh, "server": server, "machines": {}}
        (made / _CONF).write_text(_server_conf(mesh, host, port, folder.resolve(), is_encrypted=is_encrypted))
        _let_in(made, facts, names)
    where = shutil.which("nats-server")
    start = "nats-server" if where else "apt install nats-server, then nats-server"
    return [
        f"written to {folder}: {_CONF}, and an invite for {', '.join(names)}",
        f"start the server here: {start} -c {folder / _CONF}",
        f"bring each machine its invite, as secret as a password: {folder}/NAME.invite",
        "there: agentbus link join NAME.invite && agentbus link run",
    ]


def add(folder: Path, machines: Sequence[str]) -> list[str]:
    """Let more machines into the mesh of `folder`. Raises InvalidRequest, Refused and BrokenSetup. [LINK-7]"""
    facts, names = _facts(folder), _distinct(machines)
    known = sorted(set(names) & facts["machines"].keys())
    if known:
        raise Refused(
            f"{', '.join(known)} is a machine of this mesh already", hint="remove it first, to replace its key"
        )
    _let_in(folder, facts, names)
    return [f"written: {', '.join(f'{folder}/{name}.invite' for name in names)}", _RELOAD]


def remove(folder: Path, machines: Sequence[str]) -> list[str]:
    """Let machines into the mesh of `folder` no more. Raises InvalidRequest, Refused and BrokenSetup. [LINK-7]"""
    facts, names = _facts(folder), _distinct(machines)
    unknown = sorted(set(names) - facts["machines"].keys())
    if unknown:
        raise Refused(
            f"{', '.join(unknown)} is no machine of this mesh", hint=f"it has {', '.join(sorted(facts['machines']))}"
        )
    for name in names:
        del facts["machines"][name]
    _write_machines(folder, facts)
    for name in names:
        (folder / f"{name}.invite").unlink(missing_ok=True)
    return [f"removed: {', '.join(names)}. What waits for them stays on the server", _RELOAD]


_RELOAD = "the running server has to read it: nats-server --signal reload (which also ends what was removed)"


def join(home: Path, invite: Path) -> list[str]:
    """Make `home` the machine that `invite` is for. Raises InvalidRequest, Refused if it has a link, BrokenSetup."""
    if (home / LINK_FILE).exists():
        raise Refused(f"{home} has a link already", hint="agentbus link leave ends it")
    try:
        fields = json.loads(invite.read_text(encoding="utf-8"))
        mesh, machine, server = machine_name(fields["mesh"], "mesh"), machine_name(fields["machine"]), fields["server"]
        seed, ca = str(fields["seed"]), str(fields["ca"])
        nkeys.from_seed(bytearray(seed.encode()))
        check_server(server, insecure=False)
    except OSError as error:
        raise InvalidRequest(f"{invite} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, nkeys.NkeysError, InvalidRequest) as error:
        raise InvalidRequest(
            f"{invite} is no invite ({one_line(str(error))})", hint="agentbus link init and add write them"
        ) from error
    lines = [
        "# The link of this home to other machines. See SPEC.md, section 12.",
        f'mesh = "{mesh}"',
        f'machine = "{machine}"',
        f"servers = {json.dumps([server])}",
        f'key = "{KEY_FILE}"',
        *([f'ca = "{CA_FILE}"'] if ca else []),
        "# Tells this home from another one that uses the same name.",
        f'home = "{os.urandom(8).hex()}"',
        '# The machines whose mail is taken: ["*"] for all.',
        'accept = ["*"]',
        "# What others are told about the peers here: names, folders (with their names), or none.",
        'share = "names"',
    ]
    try:
        write_private(home / KEY_FILE, seed)
        if ca:
            write_private(home / CA_FILE, ca)
        write_private(home / LINK_FILE, "\n".join(lines) + "\n")
    except OSError as error:
        raise BrokenSetup(f"{home} cannot be written ({error.strerror})") from error
    load(home)
    return [
        f'this home is "{machine}" in the mesh "{mesh}", by {server}',
        "carry its mail: agentbus link run, or agentbus link service for one that starts by itself",
        f"the invite is used now, remove it: rm {invite}",
    ]


# -- parts ---------------------------------------------------------------------------------------------------


def _host_and_port(at: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{at}")
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if not host or not _HOST.fullmatch(host) or parts.path or parts.username:
        raise InvalidRequest(f"{one_line(at)!r} is no address of a server", hint="use HOST or HOST:PORT")
    return host, port


def _distinct(machines: Sequence[str]) -> list[str]:
    names = [machine_name(one) for one in machines]
    if not names:
        raise InvalidRequest("no machine is named", hint="agentbus link init --at HOST laptop buildbox")
    return list(dict.fromkeys(names))


@contextmanager
def _built(folder: Path) -> Any:
    """A folder that becomes `folder` once it is whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield made
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise BrokenSetup(f"{folder} cannot be written ({error.strerror})") from error


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / _MESH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{folder} is not the folder of a mesh ({one_line(str(error))})", hint="agentbus link init makes one"
        ) from error
    return facts


def _let_in(folder: Path, facts: dict[str, Any], names: Sequence[str]) -> None:
    ca = ""
    with suppress(FileNotFoundError):  # a server on this very machine needs none
        ca = (folder / "ca.pem").read_text()
    for name in names:
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        pair = nkeys.from_seed(bytearray(seed))
        facts["machines"][name] = pair.public_key.decode()
        invite = {
            "what": "an invite of agentbus: whoever has it is this machine",
            "mesh": facts["mesh"],
            "machine": name,
            "server": facts["server"],
            "seed": seed.decode(),
            "ca": ca,
        }
        write_private(folder / f"{name}.invite", json.dumps(invite, indent=1))
    _write_machines(folder, facts)


def _write_machines(folder: Path, facts: Mapping[str, Any]) -> None:
    users = "".join(_user(facts["mesh"], name, key) for name, key in sorted(facts["machines"].items()))
    text = (
        "# Written by agentbus link add and remove.\n"
        f"accounts: {{\n  AGENTBUS_{facts['mesh']}: {{\n    jetstream: enabled\n    users: [\n{users}    ]\n  }}\n}}\n"
    )
    write_private(folder / _MACHINES_CONF, text)
    write_private(folder / _MESH_FILE, json.dumps(facts, indent=1))


def _user(mesh: str, name: str, key: str) -> str:
    allowed = permissions(mesh, name)
    rows = "".join(f"        {what}: {{ allow: {json.dumps(subjects)} }}\n" for what, subjects in allowed.items())
    return f"      {{ nkey: {key}, permissions: {{ # {name}\n{rows}      }} }}\n"


def _server_conf(mesh: str, host: str, port: int, folder: Path, *, is_encrypted: bool) -> str:
    # Whoever reaches it by a name may reach it at any of its addresses.
    listen = f"0.0.0.0:{port}" if is_encrypted else f"{f'[{host}]' if ':' in host else host}:{port}"
    tls = ""
    if is_encrypted:
        tls = f'tls: {{\n  cert_file: "{folder}/server.pem"\n  key_file: "{folder}/server.key"\n}}\n'
    return (
        f"# The server of the mesh {mesh}. Written once by agentbus link init: it is yours to change.\n"
        f'listen: "{listen}"\nserver_name: "agentbus-{mesh}"\nmax_payload: {_MAX_PAYLOAD}\n'
        f'jetstream: {{\n  store_dir: "{folder}/store"\n  max_file_store: {_MAX_STORE}\n}}\n'
        f"{tls}include ./{_MACHINES_CONF}\n"
    )


def _make_certificates(folder: Path, mesh: str, host: str) -> None:
    """A certificate authority for the mesh alone, and a certificate for its server. Raises BrokenSetup. [LSEC-1]"""
    kind = "IP" if host.replace(".", "").isdigit() or ":" in host else "DNS"
    conf = folder / "openssl.cnf"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", conf.name)
    conf.write_text(_OPENSSL_CONF.format(name=f"agentbus mesh {mesh}", kind=kind, host=host))
    _openssl(folder, "req", "-x509", *key, "-extensions", "ca", "-days", _DAYS, "-keyout", "ca.key", "-out", "ca.pem")
    conf.write_text(_OPENSSL_CONF.format(name=host[:64], kind=kind, host=host))
    _openssl(folder, "req", *key, "-keyout", "server.key", "-out", "server.csr")
    _openssl(
        folder,
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-days", _DAYS, "-extfile", conf.name, "-extensions", "server", "-out", "server.pem"),
    )
    for name in ("openssl.cnf", "server.csr", "ca.srl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("ca.key", "server.key"):
        (folder / name).chmod(0o600)


def _openssl(folder: Path, *arguments: str) -> None:
    try:
        done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokenSetup(
            f"openssl, which makes the certificates, does not run ({error})", hint="install it"
        ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise BrokenSetup(f"openssl {arguments[0]} failed ({one_line(said)})")
