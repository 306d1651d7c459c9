"""The line transport, over real pipes: whole, piecewise, too long, too much, closed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from agentbus.adapters.mcp import transport as module
from agentbus.adapters.mcp.jsonrpc import refusal, salvage
from agentbus.adapters.mcp.lines import MAX_LINE_BYTES
from agentbus.adapters.mcp.transport import Stdio
from agentbus.core.errors import Busy, DeliveryClosed

pytestmark = pytest.mark.anyio


class Ends:
    def __init__(self, refuse=lambda line: None) -> None:
        fd_in, self.theirs_out = os.pipe()
        self.theirs_in, fd_out = os.pipe()
        self.fds = [fd_in, fd_out]
        self.stdio = Stdio(fd_in, fd_out, refuse)

    def hang_up(self) -> None:
        if self.theirs_out >= 0:
            os.close(self.theirs_out)
            self.theirs_out = -1

    def stop_reading(self) -> None:
        if self.theirs_in >= 0:
            os.close(self.theirs_in)
            self.theirs_in = -1

    async def feed(self, data: bytes, piece: int = 65_536) -> None:
        os.set_blocking(self.theirs_out, False)
        while data:
            try:
                count = os.write(self.theirs_out, data[:piece])
                data = data[count:]
            except BlockingIOError:
                pass
            await anyio.lowlevel.checkpoint()

    async def read(self, count: int) -> bytes:
        os.set_blocking(self.theirs_in, False)
        data = b""
        with anyio.fail_after(10):
            while len(data) < count:
                try:
                    data += os.read(self.theirs_in, count - len(data))
                except BlockingIOError:
                    await anyio.sleep(0.001)
        return data


@asynccontextmanager
async def running(refuse=lambda line: None) -> AsyncIterator[Ends]:
    ends = Ends(refuse)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ends.stdio.run)
        yield ends
        tasks.cancel_scope.cancel()
    ends.hang_up()
    ends.stop_reading()
    for fd in ends.fds:
        os.close(fd)


async def next_lines(ends: Ends, count: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    with anyio.fail_after(10):
        while len(found) < count:
            found.append(await ends.stdio.next_line())
    return found


@pytest.mark.parametrize("piece", [1, 3, 7, 65_536])
async def test_lines_come_out_however_they_went_in(piece: int) -> None:
    async with running() as ends, anyio.create_task_group() as tasks:
        tasks.start_soon(ends.feed, b"one\ntwo\r\n\n  \n" + "drei ü".encode() + b"\n\xff\n", piece)
        assert await next_lines(ends, 4) == [b"one", b"two\r", "drei ü".encode(), b"\xff"]


async def test_the_end_is_seen_at_once_and_nothing_before_it_is_lost() -> None:
    async with running() as ends:
        await ends.feed(b"one\nhalf")
        ends.hang_up()
        with anyio.fail_after(10):
            await ends.stdio.closed.wait()
            assert await ends.stdio.next_line() == b"one"
            with pytest.raises(anyio.EndOfStream):
                await ends.stdio.next_line()


@pytest.mark.spec("MCP-3")
async def test_a_line_that_is_too_long_is_reported_and_the_next_one_is_whole() -> None:
    async with running() as ends, anyio.create_task_group() as tasks:
        longest = b"y" * MAX_LINE_BYTES
        tasks.start_soon(ends.feed, b"x" * (MAX_LINE_BYTES + 1) + b"\n" + longest + b"\nshort\n")
        assert await next_lines(ends, 3) == [None, longest, b"short"]


async def test_reading_waits_when_nobody_takes_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING_LINES", 10)
    async with running() as ends, anyio.create_task_group() as tasks:
        lines = [f"{number}".encode() for number in range(100_000)]
        tasks.start_soon(ends.feed, b"\n".join(lines) + b"\n")
        with anyio.move_on_after(0.1):
            await anyio.sleep_forever()
        assert len(ends.stdio._lines) < 40_000  # one read's worth, and no more
        assert await next_lines(ends, len(lines)) == lines


@pytest.mark.spec("MCP-1")
async def test_what_is_refused_is_answered_and_seen_by_nobody() -> None:
    async with running(lambda line: b"no\n" if line == b"bad" else None) as ends:
        await ends.feed(b"bad\ngood\nbad\n")
        assert await next_lines(ends, 1) == [b"good"]
        assert await ends.read(6) == b"no\nno\n"


async def test_a_flood_of_refused_requests_piles_up_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_UNSENT_BYTES", 10_000)
    async with running(lambda line: b"no" * 500 + b"\n") as ends, anyio.create_task_group() as tasks:
        tasks.start_soon(ends.feed, b"bad\n" * 20_000)
        with anyio.move_on_after(0.1):
            await anyio.sleep_forever()
        assert len(ends.stdio._unsent) < 17_000_000  # the answers to one read, and no more
        assert len(await ends.read(20_000 * 1_001)) == 20_000 * 1_001


async def test_who_takes_line_after_line_lets_others_have_their_turn() -> None:
    async with running() as ends, anyio.create_task_group() as tasks:
        await ends.feed(b"line\n" * 100)
        await ends.stdio.next_line()
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        tasks.start_soon(others)
        for _ in range(99):
            await ends.stdio.next_line()
        assert 99 / 16 - 2 < turns < 20
        tasks.cancel_scope.cancel()


async def test_a_line_for_which_it_is_too_early_is_asked_again_and_keeps_its_place() -> None:
    asked: list[bytes] = []

    def refuse(line: bytes) -> bytes | None:
        asked.append(line)
        if line == b"busy" and asked.count(line) < 5:
            raise Busy
        return line + b"!\n" if line != b"mine" else None

    async with running(refuse) as ends:
        await ends.feed(b"one\nbusy\nmine\ntwo\n")
        assert await ends.read(14) == b"one!\nbusy!\ntwo!\n"[:14]
        assert await next_lines(ends, 1) == [b"mine"]
        assert asked == [b"one", *[b"busy"] * 5, b"mine", b"two"]


async def test_all_that_was_read_is_sorted_before_the_end_is_told() -> None:
    count = 0

    def refuse(line: bytes) -> bytes | None:
        nonlocal count
        count += 1
        if count == 7:
            raise Busy
        return b""

    async with running(refuse) as ends:
        await ends.feed(b"line\n" * 500)
        ends.hang_up()
        with anyio.fail_after(10):
            await ends.stdio.closed.wait()
        assert count == 501


async def test_lines_that_wait_are_sifted_anew_and_keep_their_order() -> None:
    async with running() as ends:
        await ends.feed(b"bad\none\nbad\nquiet\ntwo\n")
        with anyio.fail_after(10):
            while len(ends.stdio._lines) < 5:
                await anyio.sleep(0.001)
        ends.stdio.sift(lambda line: {b"bad": b"no\n", b"quiet": b""}.get(line))
        assert await next_lines(ends, 2) == [b"one", b"two"]
        await ends.feed(b"bad\nthree\n")
        assert await next_lines(ends, 1) == [b"three"]
        assert await ends.read(9) == b"no\nno\nno\n"


async def test_lines_that_are_sifted_anew_come_before_those_that_are_not_sorted_yet() -> None:
    async with running() as ends:
        lines = [b"%d" % number for number in range(200)]
        os.write(ends.theirs_out, b"\n".join(lines) + b"\n")
        while not ends.stdio._lines:
            await anyio.lowlevel.checkpoint()
        assert ends.stdio._fresh
        ends.stdio.sift(lambda line: None)
        assert await next_lines(ends, 200) == lines


async def test_what_is_posted_leaves_in_one_piece_and_in_order_with_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces: list[bytes] = []
    real = os.write

    def noted(fd: int, data: bytes) -> int:
        pieces.append(bytes(data))
        return real(fd, data)

    async with running() as ends:
        monkeypatch.setattr(module.os, "write", noted)
        assert ends.stdio.post(b"one\n")
        assert ends.stdio.post(b"two\n")
        assert pieces == []
        await anyio.lowlevel.checkpoint()
        assert pieces == [b"one\ntwo\n"]
        assert ends.stdio.post(b"three\n")
        await ends.stdio.write(b"four\n")
        assert pieces[1:] == [b"three\nfour\n"]
        assert ends.stdio.post(b"at the end\n")
        ends.stdio.restore()
        assert pieces[2:] == [b"at the end\n"]
        monkeypatch.undo()
        assert await ends.read(30) == b"one\ntwo\nthree\nfour\nat the end\n"


async def test_who_posts_more_than_the_client_reads_is_told_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_UNSENT_BYTES", 10_000)
    async with running() as ends:
        assert ends.stdio.post(b"x" * 5_000)
        assert not ends.stdio.post(b"x" * 195_000)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ends.stdio.write, b"")
            await anyio.wait_all_tasks_blocked()
            assert len(ends.stdio._unsent) > 100_000
            await ends.read(200_000)
        assert ends.stdio.post(b"x")
        ends.stop_reading()
        with pytest.raises(DeliveryClosed):
            await ends.stdio.write(b"x")
        assert not ends.stdio.post(b"x")


async def test_writes_are_whole_ordered_and_wait_for_room() -> None:
    async with running() as ends:
        order: list[int] = []

        async def write(number: int) -> None:
            await ends.stdio.write(bytes([number]) * 100_000)
            order.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(write, number)
            await anyio.wait_all_tasks_blocked()
            assert order == []
            data = await ends.read(1_000_000)
        assert data == b"".join(bytes([number]) * 100_000 for number in range(10))
        assert order == sorted(order)


async def test_a_cancelled_write_is_written_whole() -> None:
    async with running() as ends:
        with anyio.move_on_after(0.01) as scope:
            await ends.stdio.write(b"x" * 200_000 + b"\n")
        assert scope.cancelled_caught
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ends.stdio.write, b"next\n")
            assert await ends.read(200_006) == b"x" * 200_000 + b"\nnext\n"


@pytest.mark.spec("CHAN-3")
async def test_what_the_client_has_read_is_known_to_the_byte() -> None:
    async with running() as ends:
        assert await ends.stdio.write(b"12345") == 5
        assert ends.stdio.read_by_client() == 0
        await ends.read(2)
        assert ends.stdio.read_by_client() == 2
        assert await ends.stdio.write(b"678") == 8
        await ends.read(6)
        assert ends.stdio.read_by_client() == 8


@pytest.mark.spec("LIFE-2")
async def test_a_closed_stdout_is_the_end() -> None:
    async with running() as ends:
        ends.stop_reading()
        with pytest.raises(DeliveryClosed):
            await ends.stdio.write(b"x")
        with anyio.fail_after(10):
            await ends.stdio.closed.wait()
        with pytest.raises(DeliveryClosed):
            await ends.stdio.write(b"x")


async def test_descriptors_are_given_back_as_they_were() -> None:
    async with running() as ends:
        assert not os.get_blocking(ends.fds[0])
        ends.stdio.restore()
        assert os.get_blocking(ends.fds[0])
        os.set_blocking(ends.fds[0], False)


@pytest.mark.spec("MCP-1")
def test_only_what_must_be_refused_is_refused() -> None:
    for line in (
        b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":'
        b'{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}',
        b'{"jsonrpc":"2.0","method":"server/discover"}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"arguments":{"text":"server/discover"}}}',
        b'{"jsonrpc":"2.0","id":null,"method":"server/discover"}',
        b'{"jsonrpc":"2.0","id":1,"result":{"server":1}}',
        b"server garbage",
        b'["server/discover"]',
    ):
        assert refusal(line) is None
    assert refusal(b'{"jsonrpc":"2.0","id":"a","method":"server/discover"}') == (
        b'{"jsonrpc": "2.0", "id": "a", "error": {"code": -32601, "message": "Method not found"}}\n'
    )


@pytest.mark.spec("MCP-3")
@pytest.mark.parametrize(
    ("line", "start"),
    [
        (b"{", b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32700'),
        (b'{"id":7}', b'{"jsonrpc": "2.0", "id": 7, "error": {"code": -32600'),
        (b'{"id":[7]}', b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32600'),
        (b"7", b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32600'),
    ],
)
def test_a_broken_line_is_answered_under_its_id(line: bytes, start: bytes) -> None:
    assert salvage(line, "why").startswith(start)
