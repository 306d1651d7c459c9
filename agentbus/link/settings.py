"""The settings of the link: `link.toml` in the home, with the key beside it. Reads and writes them, and checks them.

Knows neither the server nor the database. Implements [LINK-7], [LSEC-1].
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agentbus.core.config import LINK_FILES, check_private
from agentbus.core.errors import BrokenSetup, InvalidRequest
from agentbus.core.names import machine_name
from agentbus.core.text import one_line

__all__ = ["CA_FILE", "KEY_FILE", "LINK_FILE", "SHARES", "LinkSettings", "load", "write_private"]

LINK_FILE, KEY_FILE, CA_FILE = LINK_FILES
# What other machines are told about the peers here: nothing, their names, their folders too.
SHARES = ("names", "none", "folders")
ANYBODY = "*"
_KEYS = frozenset(("mesh", "machine", "servers", "key", "creds", "ca", "home", "accept", "share", "insecure"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """What link.toml says. `key` is the path of an nkey seed, `creds` of a credentials file, `ca` of a certificate.

    `home_id` tells this home from another one that uses the same machine name.
    """

    home: Path
    mesh: str
    machine: str
    servers: tuple[str, ...]
    home_id: str
    key: str = ""
    creds: str = ""
    ca: str = ""
    accept: tuple[str, ...] = (ANYBODY,)
    share: str = SHARES[0]
    insecure: bool = False

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection is by TLS, and must be."""
        return self.servers[0].startswith("tls://")

    def accepts(self, machine: str) -> bool:
        """Whether mail from `machine` is taken. [ADDR-7]"""
        return ANYBODY in self.accept or machine in self.accept

    def seed(self) -> str:
        """The secret key. Raises BrokenSetup."""
        return _read_private(Path(self.key)).strip()

    def tls_context(self) -> ssl.SSLContext:
        """TLS 1.2 or later, with the certificates of `ca` alone; with those of the system if there is none. [LSEC-1]

        Raises BrokenSetup.
        """
        try:
            context = ssl.create_default_context(cadata=Path(self.ca).read_text() if self.ca else None)
        except (OSError, ssl.SSLError) as error:
            raise BrokenSetup(f"{self.ca} is no certificate ({one_line(str(error))})", hint=_AGAIN) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


_AGAIN = "agentbus link join INVITE writes it anew"


def load(home: Path) -> LinkSettings:
    """The settings of the link of `home`. Raises InvalidRequest if it has none, and BrokenSetup."""
    path = home / LINK_FILE
    if not path.exists():
        raise InvalidRequest(f"{home} has no link", hint="agentbus link join FILE.invite makes one")
    try:
        fields = tomllib.loads(_read_private(path))
    except tomllib.TOMLDecodeError as error:
        raise BrokenSetup(f"{path} is not valid ({error})", hint=_AGAIN) from error
    try:
        return _checked(home, fields)
    except InvalidRequest as error:
        raise BrokenSetup(f"{path}: {error}") from error


def _checked(home: Path, fields: Mapping[str, Any]) -> LinkSettings:
    for key in fields:
        if key not in _KEYS:
            raise InvalidRequest(f"there is no setting {one_line(key)!r}", hint=f"use {', '.join(sorted(_KEYS))}")
    servers = tuple(_texts(fields, "servers"))
    if not servers:
        raise InvalidRequest("servers is empty", hint='for example servers = ["tls://nats.example.net:4222"]')
    insecure = fields.get("insecure", False) is True
    for server in servers:
        check_server(server, insecure=insecure)
    share = _text(fields, "share", SHARES[0])
    if share not in SHARES:
        raise InvalidRequest(f"share is {one_line(share)!r}", hint=f"use {' or '.join(SHARES)}")
    accept = tuple(_texts(fields, "accept", [ANYBODY]))
    key, creds, ca = (_text(fields, name, "") for name in ("key", "creds", "ca"))
    if not key and not creds:
        raise InvalidRequest("neither key nor creds is set", hint=_AGAIN)
    return LinkSettings(
        home=home,
        mesh=machine_name(_text(fields, "mesh"), "mesh"),
        machine=machine_name(_text(fields, "machine")),
        servers=servers,
        home_id=_text(fields, "home"),
        key=str(home / key) if key else "",
        creds=str(home / creds) if creds else "",
        ca=str(home / ca) if ca else "",
        accept=tuple(one if one == ANYBODY else machine_name(one) for one in accept),
        share=share,
        insecure=insecure,
    )


def check_server(server: str, *, insecure: bool) -> None:
    """Refuse an address of a server that is none, or in plain text beyond this machine. [LSEC-1]

    Raises InvalidRequest.
    """
    try:
        parts = urlsplit(server)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("tls", "nats") or parts.username or parts.password:
        raise InvalidRequest(f"the server is {one_line(server)!r}", hint="use tls://HOST:PORT")
    if parts.scheme == "nats" and not insecure and not is_loopback(host):
        raise InvalidRequest(
            f"{one_line(server)} is not encrypted", hint="use tls://, or set insecure = true if the way there is safe"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, and cannot be another one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(fields: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = fields.get(key, default)
    if not isinstance(value, str):
        raise InvalidRequest(f"{key} is missing" if value is None else f"{key} is not a text", hint=_AGAIN)
    return value


def _texts(fields: Mapping[str, Any], key: str, default: list[str] | None = None) -> list[str]:
    value = fields.get(key, default)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidRequest(f"{key} is not a list of texts", hint=_AGAIN)
    return value


def _read_private(path: Path) -> str:
    """A file that nobody else may write or read. Raises BrokenSetup."""
    check_private(path, is_folder=False)
    try:
        if path.stat().st_mode & 0o077:
            raise BrokenSetup(f"{path} can be read by other users", hint=f"chmod 600 '{path}'")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenSetup(f"{path} cannot be read ({one_line(str(error))})", hint=_AGAIN) from error


def write_private(path: Path, text: str) -> None:
    """Write a file that is ours alone (0600), whole or not at all. Raises OSError."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
