"""The commands about groups: groups, join, leave. Implements [GROUP-2], [CLI-3]."""

from __future__ import annotations

from agentbus.cli import common, output
from agentbus.core.stdout import reported

__all__ = ["groups", "join", "leave"]


def groups(*, as_json: bool) -> None:
    """Show the groups, with the members of each and who of them is online."""
    with common.bus_and_settings() as (bus, _settings):
        found = bus.store.queries.groups()
        online = {peer.name for peer in bus.peers()}
    for group, members in found.items():
        if as_json:
            rows = [{"name": name, "online": name in online} for name in members]
            output.json_line({"group": group, "members": rows})
        else:
            shown = ", ".join(name if name in online else f"{name} (offline)" for name in members)
            print(f"{group}  {shown}")
    if not found and not as_json:
        print("there are no groups; agentbus join @NAME makes one")


def join(group: str, name: str | None) -> None:
    """Make `name`, by default the name of this shell, a member of `group`. Raises InvalidRequest and Refused."""
    with common.bus_and_settings() as (bus, settings):
        member = common.own_name(bus, settings, name)
        joined, members, is_new = bus.join_group(member, group)
    with reported():
        print(f'"{member}" is in {joined} {"now" if is_new else "already"}: {len(members):,} of it in all')


def leave(group: str, name: str | None) -> None:
    """End the membership of `name`, by default the name of this shell. Raises InvalidRequest and Refused."""
    with common.bus_and_settings() as (bus, settings):
        member = common.own_name(bus, settings, name)
        left = bus.leave_group(member, group)
    with reported():
        print(f'"{member}" has left {left}')
