"""What doctor says about the link, with a real server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentbus.core import config
from agentbus.core.findings import Finding, Level
from agentbus.core.names import LINK_NAME
from agentbus.doctor.link import check_far, check_link
from agentbus.doctor.peers import check_mailboxes, check_one
from tests.support.fakes import arrival
from tests.support.machine import Machine, until, wait_until
from tests.support.nats import Server

pytestmark = pytest.mark.timeout(120)  # a loaded machine takes seconds for a server


def by_code(found: list[Finding]) -> dict[str, Finding]:
    return {one.code: one for one in found}


def look(of: Machine) -> dict[str, Finding]:
    return by_code(list(check_link(of.home)))


@pytest.mark.spec("DOCTOR-10")
def test_doctor_sees_a_link_that_is_well_and_each_thing_that_is_not(
    machine: Callable[[str], Machine], nats: Server
) -> None:
    alpha = machine("alpha")
    found = look(alpha)
    assert (found["link"].level, found["link"].seen[:27]) == (Level.WRONG, "the link is not running: ma")
    assert found["link-server"].level is found["link-key"].level is Level.OK
    assert "answers, version 2." in found["link-server"].seen
    alpha.start()
    wait_until(lambda: "since" in alpha.bus.store.machines.facts())
    assert look(alpha)["link"].level is Level.OK
    alpha.kill()
    conf = nats.folder / "machines.conf"
    text = conf.read_text()
    nats.kill()
    try:
        assert "cannot be reached" in look(alpha)["link-server"].seen
        conf.write_text(text.replace("subscribe: { allow: [", 'subscribe: { allow: [">", '))
        nats.start()
        assert "may read the mail of other machines" in look(alpha)["link-key"].seen
        nats.kill()
        conf.write_text(text)
        alpha.home.joinpath("link.key").write_text(machine("beta").settings.seed())
        nats.start()
        assert look(alpha)["link-key"].level is Level.OK  # it is a key of this mesh, and reads its own mail alone
    finally:
        nats.kill()
        conf.write_text(text)
        nats.start()


@pytest.mark.spec("DOCTOR-10", "DOCTOR-6")
@pytest.mark.anyio
async def test_doctor_of_an_address_walks_to_the_peer_there(machine: Callable[[str], Machine]) -> None:
    import anyio

    alpha, beta = machine("alpha"), machine("beta")
    beta.bus.store.claim(arrival("backend"), now=1, endpoint=str, join_crowd=True)

    async def far(address: str) -> dict[str, Finding]:
        return by_code(await anyio.to_thread.run_sync(lambda: list(check_far(alpha.home, address))))

    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        found = await far("backend@beta")
        assert (found["running"].level, found["running"].seen) == (Level.OK, '"backend@beta": online there')
        assert "receives by fake" in found["delivery"].seen
        found = await far("x@gamma")
        assert found["running"].level is Level.WRONG
        assert "was ever heard of" in found["running"].seen
        sent = alpha.send("x@beta", "x")
        await until(lambda: alpha.count(f"id = {sent.id} AND arrived_at IS NOT NULL") == 1)
    assert "the link is not running" in (await far("backend@beta"))["running"].seen


@pytest.mark.spec("DOCTOR-10")
def test_doctor_names_what_waits_what_is_refused_and_clocks_that_are_off(machine: Callable[[str], Machine]) -> None:
    from agentbus.core.linkstore import LinkStore
    from agentbus.core.machines import Machine as Far

    alpha = machine("alpha")
    store = LinkStore(alpha.home / "bus.db", busy_ms=1_000)
    store.begin("alpha")
    ids = [store.send("ci", "x@beta", "x", now=1)[0] for _ in range(2)]
    store.mark_relayed(ids[:1], sequence=1, now=1)
    store.refuse(ids[1], "by the server: too long")
    far = Far(name="beta", bus="0" * 16, version=1, seen_at=1, gone_at=None, skew_ms=3_600_000, peers=())
    store.note_machines([far])
    store.send("ci", "link", "x", now=1)
    found = look(alpha)
    assert "link-waiting" not in found  # without a link, nobody is known to be there
    store.claim(arrival(LINK_NAME), now=1, endpoint=str, join_crowd=True)
    assert look(alpha)["link-waiting"].seen == (
        "1 message to beta, which is there, has not arrived for 10 minutes or more"
    )
    # The link is nobody whom a sender can have meant.
    others = [*check_mailboxes(alpha.home), *check_one(config.load(home=alpha.home), "link")]
    assert {one.code for one in others} >= {"mailbox", "running"}
    assert not [one for one in others if LINK_NAME in f"{one.seen} {one.remedy}"]
    store.close()
    assert found["link-refused"].seen == '1 message to "x@beta" is refused'
    assert found["link-clock"].seen == "the clock of beta is 1 h ahead of the one here"
