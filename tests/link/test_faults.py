"""The faults of the link, each with a real server, real processes and real kills. [LINK-3], [LINK-4]"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from agentbus.core.errors import BrokenSetup, Busy
from agentbus.core.linkstore import LinkStore, Outgoing
from agentbus.core.machines import Machine as Far
from agentbus.core.ports import Stored
from agentbus.link import carrier, run
from agentbus.link.nats import NatsRelay
from tests.support.machine import WINDOW_S, Machine, until, wait_until
from tests.support.nats import Nonsense, Proxy, Server, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]  # a loaded machine takes seconds for a server
Machines = Callable[..., Machine]

COUNT = 200


def send(machine: Machine, to: str, count: int = COUNT, *, start: int = 0) -> list[str]:
    texts = [f"m{number}" for number in range(start, start + count)]
    for text in texts:
        machine.send(to, text)
    return texts


@pytest.mark.spec("LINK-2", "LINK-6")
async def test_mail_waits_at_home_while_the_server_is_down(machine: Machines, nats: Server) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        await beta.sees("alpha")
        nats.kill()
        there, here = send(alpha, "x@beta"), send(beta, "y@alpha")
        await until(lambda: "since" not in alpha.bus.store.machines.facts())
        sent = alpha.send("x@beta", "last")
        assert "this machine is not connected" in str(sent)
        nats.start()
        await until(lambda: beta.texts("x") == [*there, "last"] and alpha.texts("y") == here)
        await until(lambda: alpha.count("host = 'beta' AND arrived_at IS NULL") == 0)


@pytest.mark.spec("LINK-3")
async def test_a_server_that_is_killed_under_traffic_loses_and_doubles_nothing(machine: Machines, nats: Server) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        await beta.sees("alpha")
        texts: list[str] = []
        back: list[str] = []
        for _ in range(3):
            before = len(texts)
            texts += send(alpha, "x@beta", start=before)
            back += send(beta, "y@alpha", start=before)
            await until(lambda before=before: len(beta.texts("x")) > before)  # type: ignore[misc]
            nats.kill()
            nats.start()
        await until(lambda: len(beta.texts("x")) >= len(texts) and len(alpha.texts("y")) >= len(back))
        await until(lambda: alpha.count("host = 'beta' AND arrived_at IS NULL") == 0)
        assert beta.texts("x") == texts
        assert alpha.texts("y") == back


@pytest.mark.spec("LINK-4")
async def test_what_a_server_lost_with_its_disk_leaves_again(machine: Machines, nats: Server) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    # The rule of 30 s would find it, too.
    async with alpha.linked(resend_s=3_600):
        async with beta.linked():
            await alpha.sees("beta")
        texts = send(alpha, "x@beta")
        await until(lambda: alpha.count("relayed_at IS NOT NULL") == COUNT)
        nats.kill()
        nats.wipe()
        nats.start()
        async with beta.linked():
            await until(lambda: len(beta.texts("x")) == COUNT)
            assert sorted(beta.texts("x")) == sorted(texts)
        assert any("lost what it had stored" in line for line in alpha.said)


@pytest.mark.spec("LINK-4")
async def test_what_a_server_with_an_older_disk_lacks_leaves_again(machine: Machines, nats: Server) -> None:
    """As after a power cut. Another machine has brought the numbers forward, so that only the resend rule can tell."""
    alpha, beta, gamma = machine("alpha"), machine("beta"), machine("gamma")
    async with gamma.linked(), beta.linked():
        await gamma.sees("beta")
    nats.kill()
    old = nats.folder / "old"
    shutil.copytree(nats.store, old)
    nats.start()
    async with alpha.linked(resend_s=0.5):
        async with beta.linked():
            await alpha.sees("beta")
        texts = send(alpha, "x@beta", 20)
        await until(lambda: alpha.count("relayed_at IS NOT NULL") == 20)
    nats.kill()
    nats.wipe()
    shutil.move(old, nats.store)
    nats.start()
    async with gamma.linked():
        send(gamma, "z@beta", 50)
        await until(lambda: gamma.count("relayed_at IS NOT NULL") == 50)
    async with alpha.linked(resend_s=0.5), beta.linked():
        await until(lambda: len(beta.texts("x")) == 20)
        assert sorted(beta.texts("x")) == sorted(texts)
    assert any("they leave again" in line for line in alpha.said)


PUBLISH_AND_DIE = """
import os
from agentbus.core import linkstore
linkstore.LinkStore.mark_relayed = lambda *a, **k: os.kill(os.getpid(), 9)
"""


@pytest.mark.spec("LINK-3")
@pytest.mark.parametrize("is_late", [False, True])
async def test_a_link_killed_between_publish_and_mark_doubles_nothing(
    machine: Machines, nats: Server, *, is_late: bool
) -> None:
    """A copy is dropped by the server while it knows it, and by the receiver afterwards."""
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
    texts = send(alpha, "x@beta")
    for _ in range(1 if is_late else 3):
        alpha.start(PUBLISH_AND_DIE)
        assert await anyio.to_thread.run_sync(alpha.wait) == -signal.SIGKILL
    assert alpha.count("relayed_at IS NOT NULL") == 0
    if is_late:
        await anyio.sleep(2.2 * WINDOW_S)  # the server looks through what it knows twice in a window
    async with alpha.linked(), beta.linked():
        await until(lambda: alpha.count("host = 'beta' AND arrived_at IS NULL") == 0)
    assert beta.texts("x") == texts


@pytest.mark.spec("LINK-3")
@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_link_killed_between_fetch_and_ack_gets_it_again_first_and_in_order(
    machine: Machines, *, is_committed: bool
) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked():
        async with beta.linked():
            await alpha.sees("beta")
        texts = send(alpha, "x@beta")
        await until(lambda: alpha.count("relayed_at IS NOT NULL") == COUNT)
        took = "take(*a, **k), " if is_committed else ""
        beta.start(
            "import os\nfrom agentbus.core import linkstore\ntake = linkstore.LinkStore.take_in\n"
            f"linkstore.LinkStore.take_in = lambda *a, **k: ({took}os.kill(os.getpid(), 9))\n"
        )
        assert await anyio.to_thread.run_sync(beta.wait) == -signal.SIGKILL
        texts += send(alpha, "x@beta", start=COUNT)
        async with beta.linked():
            await until(lambda: len(beta.texts("x")) == 2 * COUNT)
            assert beta.texts("x") == texts
            await until(lambda: alpha.count("host = 'beta' AND arrived_at IS NULL") == 0)


@pytest.mark.spec("LINK-6")
async def test_a_cut_cable_is_noticed_and_nothing_is_lost(machine: Machines, nats: Server) -> None:
    """Between alpha and beta it is the cable of one, between gamma and beta that of the other."""
    alpha, beta, gamma = machine("alpha"), machine("beta"), machine("gamma")
    proxy = Proxy(nats.port)
    for one in (alpha, gamma):
        one.set(servers=[f"nats://127.0.0.1:{proxy.port}"])
    try:
        async with alpha.linked(), beta.linked(), gamma.linked():
            await alpha.sees("beta")
            await beta.sees("alpha", "gamma")
            there, far = send(alpha, "x@beta"), send(beta, "z@gamma")
            proxy.cut()
            there += send(alpha, "x@beta", start=COUNT)
            here, far = send(beta, "y@alpha"), far + send(beta, "z@gamma", start=COUNT)
            await until(lambda: all(any("nothing was heard" in line for line in one.said) for one in (alpha, gamma)))
            assert len(beta.said) == 1  # its own line is well
            proxy.mend()
            await until(
                lambda: (
                    len(beta.texts("x")) >= 2 * COUNT
                    and len(alpha.texts("y")) >= COUNT
                    and len(gamma.texts("z")) >= 2 * COUNT
                )
            )
            assert (beta.texts("x"), alpha.texts("y"), gamma.texts("z")) == (there, here, far)
    finally:
        proxy.close()


@pytest.mark.spec("LINK-6")
async def test_a_port_that_is_closed_is_one_sentence_and_mail_waits(machine: Machines, nats: Server) -> None:
    alpha = machine("alpha")
    server = alpha.settings.servers[0]
    alpha.set(servers=[f"nats://127.0.0.1:{free_port()}"])
    async with alpha.linked():
        await until(lambda: alpha.said)
        sent = alpha.send("x@beta", "waits")
        assert "this machine is not connected (nats://127.0.0.1:" in str(sent)
        await anyio.sleep(0.5)  # it has tried again
        assert len(alpha.said) == 1
        assert "cannot be reached" in alpha.said[0]
    assert alpha.count("relayed_at IS NULL") == 1
    alpha.set(servers=[server])
    beta = machine("beta")
    async with alpha.linked(), beta.linked():
        await until(lambda: beta.texts("x") == ["waits"])


@pytest.mark.spec("LINK-2", "LINK-3", "RCPT-2")
async def test_who_was_away_for_long_gets_each_once_and_in_order(machine: Machines, nats: Server) -> None:
    """The server and the sender are killed meanwhile, the server's window is past, the sender is away at the return."""
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        await beta.sees("alpha")
    texts: list[str] = []
    for _ in range(3):
        texts += send(alpha, "x@beta", start=len(texts))
        alpha.start(PUBLISH_AND_DIE)
        assert await anyio.to_thread.run_sync(alpha.wait) == -signal.SIGKILL
        nats.kill()
        nats.start()
    await anyio.sleep(2.2 * WINDOW_S)
    async with alpha.linked():
        await until(lambda: alpha.count("relayed_at IS NULL") == 0)
    async with beta.linked():
        await until(lambda: len(beta.texts("x")) >= len(texts))
        await until(lambda: beta.count("origin IS NOT NULL AND reported = 0") == 0)
    assert beta.texts("x") == texts
    nats.kill()
    nats.start()
    assert alpha.count("arrived_at IS NOT NULL") == 0
    async with alpha.linked():
        await until(lambda: alpha.count("arrived_at IS NULL") == 0)
    assert beta.texts("x") == texts


@pytest.mark.spec("LINK-6")
async def test_a_server_that_answers_nonsense_does_not_end_the_link(machine: Machines) -> None:
    alpha = machine("alpha")
    connects = {
        "STREAM.CREATE": {"state": {"last_seq": 0}},
        "CONSUMER.INFO": {"error": {"err_code": 10014}},
        "CONSUMER.CREATE": {"num_pending": 0},
    }
    for answers in ({}, connects):
        alpha.said.clear()
        with Nonsense(answers) as server:
            alpha.set(servers=[f"nats://127.0.0.1:{server.port}"])
            async with alpha.linked():
                if answers:
                    beta = Far(name="beta", bus="0" * 16, version=1, seen_at=1, gone_at=None, skew_ms=0, peers=())
                    await alpha.connected()
                    store = LinkStore(alpha.home / "bus.db", busy_ms=5_000)
                    store.note_machines([beta])
                    store.close()
                    alpha.send("x@beta", "waits")
                    await until(lambda: any("what cannot be read" in line for line in alpha.said))
                else:
                    await until(lambda: any("is lost (KeyError" in line for line in alpha.said))
                assert alpha.bus.store.link() is not None
    assert alpha.count("relayed_at IS NULL") == 1


@pytest.mark.spec("LINK-1")
async def test_what_the_database_does_not_let_happen_now_does_not_end_the_delivery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(carrier, "_BROKEN_PAUSE_S", 0)
    said: list[str] = []
    gate = carrier.Gate()
    gate.sequence = 9
    delivery = carrier.LinkDelivery(gate, "alpha", said.append)
    troubles = [BrokenSetup("the disk is full"), Busy("it is busy")]

    def trouble(*_: object) -> int:
        if troubles:
            raise troubles.pop()
        return 1

    delivery.store = SimpleNamespace(relay_anew=trouble, refuse=trouble)  # type: ignore[assignment]
    stored = Stored(1, 3, "")

    async def publish(_: object) -> Stored:
        return stored

    gate.open(SimpleNamespace(limit=1_000, publish=publish))  # type: ignore[arg-type]
    one = Outgoing(id=1, sender="ci", recipient="x@beta", text="x", sent_at=1, bus="0" * 16)
    assert (await delivery.deliver([one])).count == 1
    assert "the disk is full" in said
    troubles.append(BrokenSetup("the disk is full"))
    assert (await delivery.deliver([replace(one, text="x" * 2_000)])).count == 1
    assert troubles == []


@pytest.mark.spec("LINK-1")
async def test_a_link_that_is_stopped_ends_although_the_database_is_busy(
    machine: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_LAST_S", 0.1)
    alpha = machine("alpha")
    with anyio.fail_after(60), ExitStack() as locked:
        async with alpha.linked():
            await alpha.connected()
            locked.enter_context(alpha.bus.store._writing())


@pytest.mark.spec("LINK-1")
async def test_a_second_link_of_a_home_is_refused(machine: Machines) -> None:
    alpha = machine("alpha")
    async with alpha.linked():
        await alpha.connected()
        alpha.start()
        assert await anyio.to_thread.run_sync(alpha.wait) == 1
        assert f"process {os.getpid()}" in (alpha.home / "said").read_text()
        assert "Traceback" not in (alpha.home / "said").read_text()
        await alpha.connected()


@pytest.mark.spec("LINK-6")
async def test_two_homes_with_one_machine_name_the_second_is_refused_and_takes_nothing(machine: Machines) -> None:
    alpha, beta, other = machine("alpha"), machine("beta"), machine("beta", "other")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        async with other.linked():
            await until(lambda: other.said)
            assert "another home uses the machine name" in other.said[0]
            texts = send(alpha, "x@beta")
            await until(lambda: beta.texts("x") == texts)
            assert other.texts("x") == []


@pytest.mark.spec("LINK-8")
async def test_of_a_home_that_was_copied_with_its_machine_the_later_link_has_the_mail(
    machine: Machines, folder: Path
) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    copy = folder / "copy"
    beta.shut()
    shutil.copytree(beta.home, copy, ignore=shutil.ignore_patterns("live", "sock"))
    beta.open()
    twin = Machine(copy, "beta", Path())
    try:
        async with alpha.linked(), beta.linked():
            await beta.connected()
            async with twin.linked():
                await until(lambda: any('another process is "beta" now' in line for line in beta.said))
                texts = send(alpha, "x@beta")
                await until(lambda: twin.texts("x") == texts)
                assert beta.texts("x") == []
    finally:
        twin.close()


@pytest.mark.spec("LINK-5")
async def test_a_database_that_is_replaced_is_another_bus(machine: Machines) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        first = alpha.send("x@beta", "before")
        await until(lambda: beta.texts("x") == ["before"])
        alpha.shut()
        for path in alpha.home.glob("bus.db*"):
            path.unlink()
        alpha.open()
        await until(lambda: alpha.bus.store.machine() == "alpha")
        again = alpha.send("x@beta", "after")
        assert again.id == first.id  # ids start anew
        await until(lambda: beta.texts("x") == ["before", "after"])
        beta.read(2)
        await until(lambda: alpha.count("read_by = 'receipt'") == 1)


@pytest.mark.spec("LINK-5")
async def test_a_home_that_is_put_back_from_a_backup_loses_no_new_message(machine: Machines, folder: Path) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with beta.linked():
        async with alpha.linked():
            await alpha.sees("beta")
        alpha.shut()
        backup = (alpha.home / "bus.db").read_bytes()
        alpha.open()
        lost = send(alpha, "x@beta", 5)
        async with alpha.linked():
            await until(lambda: beta.texts("x") == lost)
        alpha.shut()
        for path in alpha.home.glob("bus.db*"):
            path.unlink()
        (alpha.home / "bus.db").write_bytes(backup)
        (alpha.home / "bus.db").chmod(0o600)
        alpha.open()
        new = [f"n{number}" for number in range(5)]
        ids = [alpha.send("x@beta", text).id for text in new]
        assert ids == [1, 2, 3, 4, 5]
        async with alpha.linked():
            await until(lambda: sorted(beta.texts("x")) == sorted([*lost, *new]))
            later = alpha.send("x@beta", "later")
            await until(lambda: beta.texts("x")[-1] == "later")
            await until(lambda: alpha.bus.store.queries.status(later.id).arrived_at is not None)
    assert any("put back from a backup" in line for line in alpha.said)


@pytest.mark.spec("ADDR-2", "LINK-2")
async def test_mail_for_a_machine_that_nobody_heard_of_waits_and_goes_when_it_appears(machine: Machines) -> None:
    alpha = machine("alpha")
    async with alpha.linked():
        await alpha.connected()
        sent = alpha.send("x@beta", "early")
        assert str(sent) == f'queued #{sent.id} for "x@beta": no machine of that name was ever heard of'
        alpha.send("x@gamma", "for ever")
        beta = machine("beta")
        async with beta.linked():
            await until(lambda: beta.texts("x") == ["early"])
        assert alpha.count("host = 'gamma' AND relayed_at IS NULL") == 1


@pytest.mark.spec("ADDR-4")
async def test_a_message_that_the_server_does_not_take_is_refused_and_holds_up_nothing(
    machine: Machines, nats: Server
) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    conf = nats.folder / "nats.conf"
    text = conf.read_text()
    nats.kill()
    conf.write_text(text.replace("max_payload: 8MB", "max_payload: 8KB"))
    nats.start()
    try:
        async with alpha.linked(), beta.linked():
            await alpha.sees("beta")
            large = alpha.send("x@beta", "x" * 20_000)
            alpha.send("x@beta", "small")
            await until(lambda: beta.texts("x") == ["small"])
            said = str(alpha.bus.store.queries.status(large.id))
            assert 'to "x@beta" is refused by the server: message is 20,' in said
            assert "the limit is 7,680" in said
    finally:
        nats.kill()
        conf.write_text(text)


@pytest.mark.spec("LINK-6")
async def test_a_full_stream_refuses_and_what_it_refuses_waits_at_home(machine: Machines) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    size = 100_000

    def relay(of: Machine) -> NatsRelay:
        return NatsRelay(of.settings, window_s=WINDOW_S, max_bytes=size)

    async with alpha.linked(relay(alpha)):
        async with beta.linked(relay(beta)):
            await alpha.sees("beta")
        texts = [f"{number}{'x' * 2_000}" for number in range(100)]
        for text in texts:
            alpha.send("x@beta", text)
        await until(lambda: any("does not take everything" in line for line in alpha.said))
        await until(lambda: 0 < alpha.count("relayed_at IS NOT NULL") < 100)
        async with beta.linked(relay(beta)):
            await until(lambda: len(beta.texts("x")) >= 100)
            assert sorted(beta.texts("x")) == sorted(texts)
            await until(lambda: alpha.count("host = 'beta' AND arrived_at IS NULL") == 0)


@pytest.mark.spec("LINK-3")
async def test_a_clock_an_hour_off_changes_no_order_and_makes_no_future(machine: Machines) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    alpha.bus.clock = lambda: __import__("time").time_ns() // 1_000_000 + 3_600_000
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        texts = send(alpha, "x@beta", 20)
        await until(lambda: beta.texts("x") == texts)
        assert beta.count(f"sent_at > {beta.bus.clock()}") == 0


def test_a_link_that_is_stopped_leaves_no_trace_and_says_that_it_goes(machine: Machines) -> None:
    alpha = machine("alpha")
    alpha.start()
    wait_until(lambda: "since" in alpha.bus.store.machines.facts())
    assert alpha.process is not None
    alpha.process.send_signal(signal.SIGTERM)
    assert alpha.wait() == 0
    assert "since" not in alpha.bus.store.machines.facts()
    assert alpha.bus.store.present() == []
    assert "Traceback" not in (alpha.home / "said").read_text()
