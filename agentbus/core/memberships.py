"""Where a name leads, who is in which group, and who is paused: the peers of a bus beyond those that are present.

Synchronous. A method commits all of its changes or none, and raises what those of `Peers` raise. Implements [NAME-6],
[GROUP-2], [GROUP-5], [BRAKE-1] to [BRAKE-4].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from agentbus.core import brakes, groups
from agentbus.core.errors import Refused
from agentbus.core.model import Address, Pause
from agentbus.core.names import LINK_NAME, machine_of
from agentbus.core.peers import LEFT_AT, PEER, Peers, peer_of
from agentbus.core.process import Life, Process, one_look

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Memberships"]


class Memberships(Peers):
    """The peers of one bus with their groups and pauses, over one connection, used from one thread."""

    @contextmanager
    def _looking_for(self, to: str) -> Iterator[None]:
        """Look at the process that decides where `to` leads, if one does: before the transaction, which asks again."""
        with one_look():
            for pid, started, of in self._read(
                "SELECT host_pid, host_started, domain FROM aliases JOIN peers USING (session)"
                " WHERE alias = ? AND left_at IS NOT NULL",
                to,
            ):
                self._host_life(Process(pid, started), of)
            yield

    def _resolve(self, execute: Callable[..., Any], to: str) -> Address:
        # It goes to the link; whether it is known there is not for this machine to say. [ADDR-1]
        is_far = bool(machine_of(to))
        row = execute(
            f"SELECT {PEER} FROM peers WHERE name = ? AND left_at IS NULL", (LINK_NAME if is_far else to,)
        ).fetchone()
        if is_far:
            return Address(to, peer_of(row) if row else None, is_known=True)
        if row:
            return Address(to, peer_of(row), is_known=True)
        row = execute(
            f"SELECT {PEER}, left_at FROM peers JOIN aliases USING (session) WHERE alias = ?", (to,)
        ).fetchone()
        # An alias lives as long as its session, and a session lives as long as its host process. [NAME-6]
        if row and (row[LEFT_AT] is None or self._host_life(Process(row[2], row[3]), row[16]) is not Life.ENDED):
            return Address(row[1], peer_of(row) if row[LEFT_AT] is None else None, is_known=True)
        known = execute("SELECT 1 FROM peers WHERE name = ? LIMIT 1", (to,)).fetchone()
        return Address(to, None, is_known=bool(known))

    def join_group(self, group: str, name: str, *, now: int) -> tuple[list[str], bool]:
        """Make what `name` leads to a member; return all members, and whether it was none before. [GROUP-2]

        Raises Refused when the group is full.
        """
        with self._looking_for(name), self._writing() as execute:
            is_new = groups.join(execute, group, self._resolve(execute, name).mailbox, now)
            return groups.members(execute, group), is_new

    def leave_group(self, group: str, name: str) -> tuple[str, bool]:
        """End the membership of what `name` leads to; return its present name, and whether it was a member."""
        with self._looking_for(name), self._writing() as execute:
            member = self._resolve(execute, name).mailbox
            return member, groups.leave(execute, group, member)

    def drop_absent(self, before: int) -> list[tuple[str, str]]:
        """End the memberships of names that nobody had since `before`; return group and name. [GROUP-5]"""
        if not groups.has_absent(self._read, before):
            return []
        with self._writing() as execute:
            return groups.drop_absent(execute, before)

    def pause(self, name: str | None, *, by: str, now: int, until: int | None) -> list[str]:
        """Pause the session that `name` leads to, or all that are there; return their names. [BRAKE-2]

        Raises Refused when no session has or had that name, and when nobody is there.
        """
        with self._judging() as execute:
            if name is None:
                self._end_ended(execute, now)
                names = [peer.name for peer in self._present(execute) if peer.name != LINK_NAME]
                if not names:
                    raise Refused("nobody is online, and nobody was paused", hint="agentbus pause NAME pauses one")
            else:
                names = [self._session_called(execute, name, "paused")]
            brakes.pause(execute, names, by, now, until)
            return names

    def resume(self, name: str | None, *, by: str, now: int) -> tuple[list[str], list[str]]:
        """End the pause of what `name` leads to, or all pauses. Its sending is counted from now on. [BRAKE-2]

        Returns the names that are meant, and those of them that were paused. Raises Refused when no session has or had
        that name.
        """
        with self._judging() as execute:
            pauses = brakes.check(execute, None, now)
            names = list(pauses) if name is None else [self._session_called(execute, name, "resumed")]
            brakes.resume(execute, names, by, now)
            return names, [one for one in names if one in pauses]

    def _session_called(self, execute: Callable[..., Any], name: str, what: str) -> str:
        """The present name of the session, there or not, that `name` leads to. Raises Refused."""
        address = self._resolve(execute, name)
        if not address.is_known:
            raise Refused(
                f'no session has or had the name "{name}", nobody was {what}', hint="agentbus peers shows them"
            )
        return address.mailbox

    def forget_pauses(self, now: int) -> None:
        """Forget the pauses that ended long ago."""
        if self._read("SELECT 1 FROM pauses WHERE until < ? LIMIT 1", now - brakes.HOUR_MS):
            with self._writing() as execute:
                brakes.forget(execute, now)

    def pause_of(self, session: str, now: int) -> Pause | None:
        """The pause of a session, by the name that it has now; None if it is not paused. [BRAKE-1]"""
        rows = self._read(f"{brakes.PAUSES} AND name = (SELECT name FROM peers WHERE session = ?)", now, session)
        return Pause(*rows[0]) if rows else None

    def sent_lately(self, session: str, names: Sequence[str], now: int) -> tuple[str, int, int] | None:
        """See `brakes.sent_lately`."""
        return brakes.sent_lately(self._read, session, names, now)
