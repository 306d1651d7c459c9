"""What a member of the mesh can do, and what the way to the server lets pass. With a real server of each version."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import nats as client
import pytest

from agentbus.link import admin
from agentbus.link.nats import probe
from tests.support.machine import Machine, until
from tests.support.nats import MESH, Server, binaries, binary, server

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]  # a loaded machine takes seconds for a server


@pytest.fixture(scope="module", params=list(binaries()) or ["none"])
def shared_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    root = Path(tempfile.mkdtemp(prefix="abs-", dir="/tmp"))
    with server(root / "team", binary(None if request.param == "none" else request.param)) as made:
        yield made
    shutil.rmtree(root)


class Hostile:
    """A member with a valid key and a client of its own."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.errors: list[str] = []

    async def tries(self, subject: str, body: object = b"", *, reply: str = "", headers: Any = None) -> str:
        """What the server says to a publish: an error, or nothing."""
        before = len(self.errors)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.client.publish(subject, data, reply=reply, headers=headers)
        await self.client.flush()
        await anyio.sleep(0.01)
        return " ".join(self.errors[before:])

    async def listens(self, subject: str) -> str:
        before = len(self.errors)
        await self.client.subscribe(subject)
        await self.client.flush()
        await anyio.sleep(0.01)
        return " ".join(self.errors[before:])

    async def asks(self, subject: str, body: object) -> dict[str, Any]:
        answer = await self.client.request(subject, json.dumps(body).encode(), timeout=5)
        return dict(json.loads(answer.data))


@asynccontextmanager
async def member(of: Server, name: str) -> AsyncIterator[Hostile]:
    seed = json.loads(of.invite(name).read_text())["seed"]
    hostile = Hostile(None)

    async def note(error: Exception) -> None:
        hostile.errors.append(str(error))

    hostile.client = await client.connect(
        f"nats://127.0.0.1:{of.port}", nkeys_seed_str=seed, error_cb=note, inbox_prefix=f"_INBOX.{name}"
    )
    try:
        yield hostile
    finally:
        await hostile.client.close()


S = f"AB_{MESH}"


@pytest.mark.spec("LSEC-2")
async def test_a_member_may_do_nothing_as_another(machine: Callable[[str], Machine], nats: Server) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        alpha.send("kept@gamma", "for gamma alone")
        async with member(nats, "gamma") as hostile:
            create = {"stream_name": S, "config": {"durable_name": "beta", "ack_policy": "explicit"}}
            for subject, body in [
                (f"ab.{MESH}.to.beta.alpha.m.x", b"as alpha"),
                (f"ab.{MESH}.to.beta.alpha.r", b"as alpha"),
                (f"ab.{MESH}.here.alpha", b"as alpha"),
                (f"$JS.ACK.{S}.beta.1.1.1.1.0", b"+ACK"),
                (f"$JS.API.CONSUMER.MSG.NEXT.{S}.beta", b"1"),
                (f"$JS.API.CONSUMER.INFO.{S}.beta", b""),
                (f"$JS.API.CONSUMER.DELETE.{S}.beta", b""),
                (f"$JS.API.CONSUMER.CREATE.{S}.beta.ab.{MESH}.to.beta.>", create),
                (f"$JS.API.CONSUMER.CREATE.{S}.gamma.ab.{MESH}.to.beta.>", create),
                (f"$JS.API.CONSUMER.CREATE.{S}", create),
                (f"$JS.API.CONSUMER.DURABLE.CREATE.{S}.gamma", create),
                (f"$JS.API.CONSUMER.LIST.{S}", b""),
                (f"$JS.API.STREAM.INFO.{S}", b""),
                (f"$JS.API.STREAM.DELETE.{S}", b""),
                (f"$JS.API.STREAM.PURGE.{S}", b""),
                (f"$JS.API.STREAM.UPDATE.{S}", {"name": S}),
                (f"$JS.API.STREAM.MSG.GET.{S}", {"seq": 1}),
                (f"$JS.API.DIRECT.GET.{S}", {"seq": 1}),
                (f"$JS.API.STREAM.MSG.DELETE.{S}", {"seq": 1}),
                (f"$JS.API.STREAM.SNAPSHOT.{S}", {"deliver_subject": "x"}),
                ("$JS.API.STREAM.CREATE.OTHER", {"name": "OTHER"}),
                ("$SYS.REQ.SERVER.PING", b""),
                ("_INBOX.beta.x", b""),
            ]:
                assert "permissions violation" in (await hostile.tries(subject, body)).lower(), subject
            for subject in (f"ab.{MESH}.to.>", f"ab.{MESH}.to.beta.>", "_INBOX.beta.>", ">", "$JS.EVENT.>"):
                assert "permissions violation" in (await hostile.listens(subject)).lower(), subject
            # Of the requests that it may make: what is in the body cannot reach beyond the subject.
            filtered = f"$JS.API.CONSUMER.CREATE.{S}.gamma.ab.{MESH}.to.gamma.>"
            for config in (
                {"name": "gamma", "durable_name": "gamma", "filter_subject": f"ab.{MESH}.to.beta.>"},
                {"name": "gamma", "durable_name": "gamma", "filter_subjects": [f"ab.{MESH}.to.beta.>"]},
                {"name": "beta", "durable_name": "beta", "filter_subject": f"ab.{MESH}.to.gamma.>"},
            ):
                answer = await hostile.asks(
                    filtered, {"stream_name": S, "config": {**config, "ack_policy": "explicit"}}
                )
                assert "error" in answer or answer["config"].get("filter_subject") == f"ab.{MESH}.to.gamma.>", answer
            other = {"name": S, "subjects": [f"ab.{MESH}.to.>"], "retention": "limits", "storage": "memory"}
            assert "error" in await hostile.asks(f"$JS.API.STREAM.CREATE.{S}", other)
        alpha.send("x@beta", "all is well")
        await until(lambda: beta.texts("x") == ["all is well"])
        assert not any("something" in line for line in beta.said)


@pytest.mark.spec("LSEC-3")
async def test_what_a_member_makes_the_server_send_is_dropped(machine: Callable[[str], Machine], nats: Server) -> None:
    """The server answers to wherever a request says: it becomes the deputy of whoever asks."""
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        async with member(nats, "gamma") as hostile:
            await hostile.tries(f"ab.{MESH}.here.gamma", json.dumps(beat("gamma")).encode())
            await alpha.sees("gamma")
            subject = f"ab.{MESH}.to.gamma.>"
            config = {"name": "gamma", "durable_name": "gamma", "ack_policy": "explicit", "filter_subject": subject}
            made = await hostile.asks(
                f"$JS.API.CONSUMER.CREATE.{S}.gamma.{subject}", {"stream_name": S, "config": config}
            )
            assert "error" not in made
            forged = json.dumps({**beat("beta"), "peers": [{"name": "forged"}]}).encode()
            for place in (
                f"ab.{MESH}.here.beta",
                f"ab.{MESH}.to.alpha.beta.m.x",
                f"$JS.API.STREAM.DELETE.{S}",
                f"$JS.API.CONSUMER.DELETE.{S}.beta",
            ):
                # A message of its own to itself, which the server then brings to that place.
                await hostile.tries(f"ab.{MESH}.to.gamma.gamma.m.x", forged)
                await hostile.tries(f"$JS.API.CONSUMER.MSG.NEXT.{S}.gamma", b"1", reply=place)
                push = {**config, "name": "gamma2", "durable_name": "gamma2", "deliver_subject": place}
                with suppress(Exception):
                    await hostile.asks(
                        f"$JS.API.CONSUMER.CREATE.{S}.gamma.{subject}", {"stream_name": S, "config": push}
                    )
            alpha.send("x@beta", "all is well")
            await until(lambda: beta.texts("x") == ["all is well"])
            await until(lambda: alpha.count("host = 'beta' AND arrived_at IS NULL") == 0)
        named = {peer.name for one in alpha.bus.store.machines.all() for peer in one.peers}
        assert "forged" not in named
        assert alpha.texts("x") == []


def beat(bus: str) -> dict[str, Any]:
    return {"v": 1, "bus": bus.encode().hex()[:16].ljust(16, "0"), "at": 1, "waiting": 0, "etag": "0" * 16, "peers": []}


@pytest.mark.spec("WIRE-3")
async def test_what_is_no_message_is_dropped_and_holds_up_nothing(
    machine: Callable[[str], Machine], nats: Server
) -> None:
    beta = machine("beta")
    async with beta.linked():
        await beta.connected()
        async with member(nats, "gamma") as hostile:
            for kind, body, headers in [
                ("m.x", b"garbage", None),
                ("m.x", b"[" * 50_000, None),
                ("m.x", b'{"a":' + b"9" * 10_000 + b"}", None),
                ("m.=ZZ", b"{}", None),
                ("m.x.y", b"{}", None),
                ("q", b"{}", None),
                ("r", b'{"agentbus":1,"receipts":[[1]]}', None),
                ("b", b"\xff", None),
                ("m.x", b"{}", {"Status": "100"}),
            ]:
                await hostile.tries(f"ab.{MESH}.to.beta.gamma.{kind}", body, headers=headers)
            await hostile.tries(f"ab.{MESH}.here.gamma", b"garbage")
            # Headers that end the reader of the client library, in the form in which a server sends a status.
            head = b"NATS/1.0 1\xff\xfe\xfd\r\n\r\n"
            raw = f"HPUB ab.{MESH}.to.beta.gamma.m.x {len(head)} {len(head)}\r\n".encode() + head + b"\r\n"
            hostile.client._transport.write(raw)
            good = {
                "messageId": "0123456789abcdef.1",
                "parts": [{"text": "good"}],
                "metadata": {"agentbus/1": {"from": "evil@gamma", "to": "x@beta", "sentAt": 1}},
            }
            await hostile.tries(f"ab.{MESH}.to.beta.gamma.m.x", good)
            await until(lambda: beta.texts("x") == ["good"])
        assert sum("that is no message (1 so far)" in line for line in beta.said) == 1
        assert not any("lost" in line for line in beta.said)


@pytest.mark.spec("ADDR-7")
async def test_mail_of_a_machine_that_is_not_accepted_is_refused_and_its_sender_told(
    machine: Callable[[str], Machine],
) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    beta.set(accept=["gamma"])
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        sent = alpha.send("x@beta", "let me in")
        await until(lambda: "refused" in str(alpha.bus.store.queries.status(sent.id)))
        said = str(alpha.bus.store.queries.status(sent.id))
        assert said == f'#{sent.id} from "ci" to "x@beta" is refused by beta: it takes no mail from alpha'
        assert beta.texts("x") == []


@pytest.mark.spec("MACH-3")
@pytest.mark.parametrize(("share", "shown"), [("none", None), ("names", ""), ("folders", "/somewhere")])
async def test_what_others_are_told_is_what_is_shared(
    machine: Callable[[str], Machine], share: str, shown: str | None
) -> None:
    from tests.support.fakes import arrival

    alpha, beta = machine("alpha"), machine("beta")
    beta.set(share=share)
    beta.bus.store.claim(arrival("backend"), now=1, endpoint=str, join_crowd=True)
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        there = next(one for one in alpha.bus.store.machines.all() if one.name == "beta")
        assert [peer.cwd for peer in there.peers] == ([] if shown is None else [shown])


@pytest.mark.spec("LINK-7", "LSEC-2")
async def test_a_machine_that_is_removed_is_out_at_the_next_reload(
    machine: Callable[[str], Machine], nats: Server
) -> None:
    alpha, gamma = machine("alpha"), machine("gamma")
    kept = {name: (nats.folder / name).read_text() for name in ("mesh.json", "machines.conf", "gamma.invite")}
    try:
        async with alpha.linked(), gamma.linked():
            await alpha.sees("gamma")
            admin.remove(nats.folder, ["gamma"])
            assert nats.process is not None
            nats.process.send_signal(signal.SIGHUP)
            await until(lambda: any('refuses the key of "gamma"' in line for line in gamma.said))
            await alpha.connected()
    finally:
        for name, text in kept.items():
            (nats.folder / name).write_text(text)


# -- the way to the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Server]:
    """A server with certificates. The address leads to this machine, and does not look so."""
    root = Path(tempfile.mkdtemp(prefix="abt-", dir="/tmp"))
    with server(root / "team", at="0.0.0.0") as made:
        yield made
    shutil.rmtree(root)


@pytest.mark.spec("LSEC-1", "LSEC-2")
async def test_mail_goes_by_tls_with_keys(folder: Path, encrypted: Server, caplog: pytest.LogCaptureFixture) -> None:
    alpha = Machine(folder / "alpha", "alpha", encrypted.invite("alpha"))
    beta = Machine(folder / "beta", "beta", encrypted.invite("beta"))
    try:
        assert alpha.settings.servers == (f"tls://0.0.0.0:{encrypted.port}",)
        async with alpha.linked(), beta.linked():
            await alpha.sees("beta")
            alpha.send("x@beta", "hello")
            await until(lambda: beta.texts("x") == ["hello"])
        assert (await probe(alpha.settings)).is_encrypted
        assert not caplog.records  # doctor would print them
    finally:
        alpha.close()
        beta.close()


@pytest.mark.spec("LSEC-1", "LINK-6")
async def test_a_certificate_of_another_authority_is_one_sentence(folder: Path, encrypted: Server) -> None:
    other = folder / "other"
    admin.init(MESH, "0.0.0.0", ["gamma"], other)
    gamma = Machine(folder / "gamma", "gamma", other / "gamma.invite")
    gamma.set(servers=[f"tls://0.0.0.0:{encrypted.port}"])
    try:
        async with gamma.linked():
            await until(lambda: gamma.said)
            sent = gamma.send("x@beta", "waits")
            assert "the link is not running" not in str(sent)
        assert [line for line in gamma.said if "does not show a certificate of this mesh" in line]
        assert len(gamma.said) == 1
    finally:
        gamma.close()


@pytest.mark.spec("LSEC-2", "LINK-6")
async def test_a_wrong_key_is_one_sentence(folder: Path, encrypted: Server) -> None:
    other = folder / "other"
    admin.init(MESH, "0.0.0.0", ["gamma"], other)
    gamma = Machine(folder / "gamma", "gamma", encrypted.invite("gamma"))
    (gamma.home / "link.key").write_text(json.loads((other / "gamma.invite").read_text())["seed"])
    try:
        async with gamma.linked():
            await until(lambda: gamma.said)
        assert gamma.said == [
            f'tls://0.0.0.0:{encrypted.port} refuses the key of "gamma": ask whoever runs the server for a new invite, '
            "then agentbus link join"
        ]
    finally:
        gamma.close()


@pytest.mark.spec("LSEC-1")
async def test_nothing_is_said_to_a_server_in_plain_text(folder: Path, encrypted: Server) -> None:
    """The library would send it the key's signature, or a password, as it is. So our hook is held by its bytes."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        info = {"server_id": "x", "version": "2.9.10", "max_payload": 1_000_000, "headers": True, "nonce": "abc"}

        def serve() -> None:
            with suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    with near:
                        near.sendall(b"INFO " + json.dumps(info).encode() + b"\r\n")
                        near.settimeout(5)
                        heard.append(near.recv(10_000))

        threading.Thread(target=serve, daemon=True).start()
        gamma = Machine(folder / "gamma", "gamma", encrypted.invite("gamma"))
        gamma.set(servers=[f"tls://0.0.0.0:{listener.getsockname()[1]}"])
        try:
            async with gamma.linked():
                await until(lambda: gamma.said and heard)
        finally:
            gamma.close()
            listener.shutdown(socket.SHUT_RDWR)
    assert set(heard) == {b""}
    assert "does not encrypt, and nothing was sent to it" in gamma.said[0]
