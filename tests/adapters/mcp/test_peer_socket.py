"""Sockets of ours between a server and its agent process."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from agentbus.adapters.mcp import peer_socket


def test_a_socket_that_cannot_be_made_ours_alone_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no")

    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        at = Path(folder, "a.sock")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "chmod", refuse)
            with pytest.raises(PermissionError):
                peer_socket.listen(at)
        assert not at.exists()
        peer_socket.listen(at).close()
