"""The relay on NATS JetStream: one stream for all machines of a mesh, one durable consumer for each.

The only importer of the client library. Of that, its connection and its parser are used. Not its reconnecting, which
hides why nothing goes, and not its `fetch`: a line is one connection, with one known start. Knows nothing about the
database. Implements [RELAY-1] to [RELAY-4], [WIRE-2], [LSEC-1] to [LSEC-3].
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
import nats.aio.client
import nats.aio.msg
import nats.errors

from agentbus.core.errors import InvalidRequest, RelayDown, RelayRefused
from agentbus.core.ports import Line, Parcel, Stored
from agentbus.core.text import one_line
from agentbus.link.settings import LinkSettings
from agentbus.link.wire import name_token, token_name

__all__ = ["MAX_STORE_BYTES", "NatsRelay", "Probe", "probe"]

# What waits for machines that are away can have this much: 1 GiB. Beyond it, mail waits at home.
MAX_STORE_BYTES = 1 << 30
# How long the server knows a copy, in seconds. It saves a way; the receiver decides.
_WINDOW_S = 120.0
# After this time the server offers what was taken and not acknowledged again, on the same line: never, in practice.
_ACK_WAIT_S = 60
_MAX_UNACKED = 512
_CONNECT_S = 3.0
_ANSWER_S = 5.0
_PUBLISH_S = 10.0
# One request for messages: so many, so many bytes, for so long. Meanwhile the server says that it is there.
_PULL = 128
_PULL_BYTES = 16 << 20
_PULL_S = 20
_HEARTBEAT_S = 3
# Two heartbeats and a little: then the line is dead, whatever the connection says.
_SILENCE_S = 7.0
# How long another process of this machine has to answer. It looks once a second whether it is asked.
_TWIN_S = 3.0
# What the headers of a message have at most, as the server counts them to its body.
_HEADER_BYTES = 512
_NS = 1_000_000_000

# The library changes a connection to TLS in a way of which asyncio says, when it ends, that it has no effect.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received() has no effect" not in record.getMessage())

_NO_CONSUMER = 10014
_OTHER_STREAM = 10058


class _Client(nats.aio.client.Client):
    """The connection of the library, which must not be in plain text where it was asked to be encrypted."""

    must_encrypt = False

    def _connect_command(self) -> bytes:
        # The library asks for no more than the server: a server that says nothing of TLS would be given the credential
        # in plain text, also under tls://. So nothing is said to it. [LSEC-1]
        if self.must_encrypt and not self.is_encrypted():
            raise nats.errors.Error("the server does not encrypt, and nothing was sent to it")
        return super()._connect_command()

    def is_encrypted(self) -> bool:
        """Whether the connection is by TLS now."""
        writer = getattr(self._transport, "_io_writer", None)
        return writer is not None and writer.get_extra_info("ssl_object") is not None

    async def _process_op_err(self, e: Exception) -> None:
        # The connection is lost, and with it what was not sent yet. The library would try to send that, fail, and end
        # its reader without telling anybody that the connection is closed.
        self._pending, self._pending_data_size = [], 0
        await super()._process_op_err(e)

    async def _process_headers(self, headers: Any) -> Any:
        # Whoever may send to us could otherwise end the library's reader with each attempt to take one message.
        try:
            return await super()._process_headers(headers)
        except Exception:  # noqa: BLE001 - whatever it is, it is the header of one message
            return {}


class NatsRelay:
    """A NATS server, as `settings` says. `window_s` and `max_bytes` are those of the stream, for tests."""

    def __init__(
        self, settings: LinkSettings, *, window_s: float = _WINDOW_S, max_bytes: int = MAX_STORE_BYTES
    ) -> None:
        self._settings = settings
        self._window_s = window_s
        self._max_bytes = max_bytes
        hosts = (urlsplit(one).hostname or one for one in settings.servers)
        self.place = ", ".join(dict.fromkeys(hosts))
        # Whether another process has taken over the mail of this machine before. [LINK-8]
        self._was_taken = False

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Line]:
        """See Relay. Raises RelayDown and RelayRefused."""
        line = _NatsLine(self._settings, self._window_s, self._max_bytes)
        try:
            await line.open(is_doubted=self._was_taken)
            yield line
        finally:
            self._was_taken = self._was_taken or line.was_taken
            with anyio.move_on_after(1, shield=True):
                await line.close()


def stream_of(mesh: str) -> str:
    """The name of the stream of a mesh."""
    return f"AB_{mesh}"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server says to the key of a machine. `reads_others`: it may read the mail of others, which is wrong."""

    version: str
    is_encrypted: bool
    reads_others: bool


async def probe(settings: LinkSettings) -> Probe:
    """Ask the server, and change nothing there. Raises RelayDown and RelayRefused. [DOCTOR-10]"""
    line = _NatsLine(settings, _WINDOW_S, MAX_STORE_BYTES)
    try:
        return await line.probe()
    finally:
        with anyio.move_on_after(1, shield=True):
            await line.close()


class _NatsLine:
    """One connection. See Line."""

    def __init__(self, settings: LinkSettings, window_s: float, max_bytes: int) -> None:
        self._settings = settings
        self._window_s = window_s
        self._max_bytes = max_bytes
        self._base = f"ab.{settings.mesh}"
        self._stream = stream_of(settings.mesh)
        # Nobody else can guess it: an answer that comes here is an answer to this line.
        self._inbox = f"_INBOX.{settings.machine}.{os.urandom(8).hex()}"
        self._client = _Client()
        self._errors: list[str] = []
        self._down = ""
        self._answers: dict[str, asyncio.Future[bytes]] = {}
        self._number = 0
        self._arrived: list[Parcel] = []
        self._heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(1_000)
        self._unacked = 0
        self._behind = 0
        self._pull = ""
        self._pull_left = 0
        self._is_pull_small = False
        self._seen_at = 0.0
        self._woken = asyncio.Event()
        self.was_taken = False
        self.limit = 0
        self.sequence = 0

    @property
    def waiting(self) -> int:
        """See Line."""
        return self._behind + self._unacked

    # -- the connection ------------------------------------------------------------------------------------

    async def open(self, *, is_doubted: bool) -> None:
        """Connect, and be the consumer of this machine. Raises RelayDown and RelayRefused.

        `is_doubted`: another process was the consumer of this machine, so it is asked for first.
        """
        await self._connect()
        self.limit = self._client.max_payload - _HEADER_BYTES
        async with self._guarded():
            await self._client.subscribe(f"{self._inbox}.>", cb=self._on_inbox, pending_bytes_limit=0)
            await self._client.subscribe(f"{self._base}.here.*", cb=self._on_beat)
            await self._client.subscribe(f"{self._base}.who", cb=self._on_question)
            await self._client.flush(timeout=int(_ANSWER_S))
        if is_doubted:
            await self._look_for_twin()
        async with self._guarded():  # what it answers can be anything
            await self._make_stream()
            await self._make_consumer()
        self._seen_at = anyio.current_time()

    async def probe(self) -> Probe:
        """Connect, and try to read the mail of others, which must be refused. Raises RelayDown and RelayRefused."""
        await self._connect()
        is_encrypted, version = self._client.is_encrypted(), self._client.connected_server_version
        refused = False
        try:
            async with self._guarded():
                await self._client.subscribe(f"{self._base}.to.>")
                await self._client.flush(timeout=int(_ANSWER_S))
                # The refusal comes before the answer to the flush, and is told a turn of the event loop later.
                await anyio.sleep(0.05)
        except RelayDown:
            refused = "permissions violation" in self._down.lower()
            if not refused:
                raise
        number = f"{version.major}.{version.minor}.{version.patch}"
        return Probe(number, is_encrypted, reads_others=not refused)

    async def close(self) -> None:
        """End the connection."""
        self._fail("the line was closed")
        with suppress(Exception):  # whatever the library meets at its end, it has ended
            await self._client.close()

    async def _connect(self) -> None:
        settings = self._settings
        self._client.must_encrypt = settings.is_encrypted
        options: dict[str, Any] = {"tls": settings.tls_context()} if settings.is_encrypted else {}
        options |= {"user_credentials": settings.creds} if settings.creds else {"nkeys_seed_str": settings.seed()}
        try:
            with anyio.fail_after(_CONNECT_S * (1 + len(settings.servers))):
                await self._client.connect(
                    servers=list(settings.servers),
                    name=f"agentbus {settings.machine}",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=int(_CONNECT_S),
                    no_echo=True,
                    inbox_prefix=f"_INBOX.{settings.machine}",
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    **options,
                )
        except (InvalidRequest, RelayRefused):
            raise
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: BaseException) -> RelayDown | RelayRefused:
        """Why there is no connection, in a sentence, and whether somebody has to do something."""
        # The library tries each server, keeps what it met to itself, and then says that there are no servers.
        said = [*self._errors, str(error) or type(error).__name__]
        place = ", ".join(self._settings.servers)
        text = " ".join(said).lower()
        if "authorization" in text or "authentication" in text:
            return RelayRefused(
                f'{place} refuses the key of "{self._settings.machine}"',
                hint="ask whoever runs the server for a new invite, then agentbus link join",
            )
        if "does not encrypt" in text:
            return RelayRefused(f"{place} does not encrypt, and nothing was sent to it", hint="see its nats.conf")
        if "certificate" in text:
            return RelayRefused(
                f"{place} does not show a certificate of this mesh ({one_line(said[0])})",
                hint="check the address in link.toml, or ask for a new invite",
            )
        return RelayDown(f"{place} cannot be reached ({one_line(said[0])})", hint="it is tried again")

    @asynccontextmanager
    async def _guarded(self) -> AsyncIterator[None]:
        """Turn whatever the library raises into RelayDown."""
        self._check()
        try:
            yield
        except (RelayDown, RelayRefused):
            raise
        except Exception as error:  # noqa: BLE001 - the library raises whatever its transport raises
            self._fail(one_line(f"{type(error).__name__} {error}".strip()))
        self._check()

    def _check(self) -> None:
        if self._down:
            raise RelayDown(f"the line to {', '.join(self._settings.servers)} is lost ({self._down})")

    def _fail(self, why: str) -> None:
        self._down = self._down or why
        for future in self._answers.values():
            if not future.done():
                future.set_result(b"")  # no answer: each place that waits for one checks the line then
        self._answers.clear()
        self._woken.set()
        with suppress(asyncio.QueueFull):
            self._heard.put_nowait(("", b""))  # who waits there looks again

    async def _on_error(self, error: Exception) -> None:
        self._errors.append(str(error) or type(error).__name__)
        if self._client.is_connected and "permissions violation" in str(error).lower():
            # The server says so later than the request, and to nobody in particular.
            self._fail(one_line(str(error)))

    async def _on_closed(self) -> None:
        self._fail(one_line(self._errors[-1]) if self._errors else "the server has closed it")

    async def _look_for_twin(self) -> None:
        """Leave the mail of this machine to another process that is this machine too, if there is one. [LINK-8]"""
        await self.ask()
        with anyio.move_on_after(_TWIN_S):
            while True:
                machine, _ = await self.hear()
                if machine == self._settings.machine:
                    raise RelayRefused(
                        f'another process is "{machine}" now, and has its mail',
                        hint="if this home was copied with its machine, ask for an invite for the copy",
                    )

    # -- stream and consumer -------------------------------------------------------------------------------

    async def _ask_server(self, subject: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request to JetStream. Raises RelayDown."""
        reply, future = self._expect("q")
        async with self._guarded():
            await self._client.publish(f"$JS.API.{subject}", json.dumps(body).encode(), reply=reply)
            with anyio.fail_after(_ANSWER_S):
                answer = json.loads(await future)
        found: dict[str, Any] = answer if isinstance(answer, dict) else {}
        return found

    def _expect(self, kind: str) -> tuple[str, asyncio.Future[bytes]]:
        self._number += 1
        token = f"{kind}{self._number}"
        future = self._answers[token] = asyncio.get_running_loop().create_future()
        return f"{self._inbox}.{token}", future

    async def _make_stream(self) -> None:
        """See to it that the stream is there, and as it has to be; note how far it has counted."""
        answer = await self._ask_server(
            f"STREAM.CREATE.{self._stream}",
            {
                "name": self._stream,
                "subjects": [f"{self._base}.to.>"],
                # Mail for a machine that was never seen is kept (unlike "interest"), and what was taken is not (unlike
                # "limits"): a home that loses its place would get a month again.
                "retention": "workqueue",
                "storage": "file",
                "discard": "new",
                "max_bytes": self._max_bytes,
                "max_consumers": -1,
                "max_msgs": -1,
                "max_age": 0,
                "num_replicas": 1,
                "duplicate_window": int(self._window_s * _NS),
            },
        )
        error = answer.get("error", {})
        if error.get("err_code") == _OTHER_STREAM:
            raise RelayRefused(
                f"the stream {self._stream} of {', '.join(self._settings.servers)} is not as agentbus makes it",
                hint="whoever runs the server has to look at it, and remove it",
            )
        if error:
            raise RelayRefused(
                f"the server makes no stream {self._stream} ({one_line(str(error.get('description')))})",
                hint="whoever runs the server has to look at its nats.conf",
            )
        self.sequence = int(answer["state"]["last_seq"])

    async def _make_consumer(self) -> None:
        """Delete the consumer of this machine, and make it anew: it begins with the oldest that was not acknowledged.

        After a crash the server would withhold what was taken and not acknowledged, and newer mail would overtake it.
        """
        machine, mesh = self._settings.machine, self._settings.mesh
        consumer = f"{self._stream}.{machine}"
        answer = await self._ask_server(f"CONSUMER.INFO.{consumer}", {})
        error = answer.get("error", {})
        if not error:
            owner = answer.get("config", {}).get("description")
            if owner != self._settings.home_id:
                raise RelayRefused(
                    f'another home uses the machine name "{machine}" in the mesh "{mesh}"',
                    hint="ask for an invite with a name of its own, or type agentbus link leave in that other home",
                )
            await self._ask_server(f"CONSUMER.DELETE.{consumer}", {})
        elif error.get("err_code") != _NO_CONSUMER:
            raise RelayDown(f"the server says: {one_line(str(error.get('description')))}")
        subject = f"{self._base}.to.{machine}.>"
        answer = await self._ask_server(
            f"CONSUMER.CREATE.{consumer}.{subject}",
            {
                "stream_name": self._stream,
                "config": {
                    "name": machine,
                    "durable_name": machine,
                    "description": self._settings.home_id,
                    "deliver_policy": "all",
                    "ack_policy": "explicit",
                    "replay_policy": "instant",
                    "filter_subject": subject,
                    "ack_wait": _ACK_WAIT_S * _NS,
                    "max_ack_pending": _MAX_UNACKED,
                    # No max_deliver: a work queue drops what reaches it.
                },
            },
        )
        if "error" in answer:
            raise RelayDown(f"the server makes no consumer: {one_line(str(answer['error'].get('description')))}")
        self._behind = int(answer.get("num_pending", 0))

    # -- what comes ----------------------------------------------------------------------------------------

    async def _on_inbox(self, message: nats.aio.msg.Msg) -> None:
        self._seen_at = anyio.current_time()
        if not message.subject.startswith(f"{self._inbox}."):
            self._on_parcel(message)
            return
        token = message.subject.rpartition(".")[2]
        if token == self._pull:
            self._on_pull_status(message)
            return
        future = self._answers.pop(token, None)
        if future is not None and not future.done():
            if (message.headers or {}).get("Status") == "503":
                self._fail("the server has no JetStream, or not yet")
            future.set_result(message.data)

    def _on_pull_status(self, message: nats.aio.msg.Msg) -> None:
        headers = message.headers or {}
        status = headers.get("Status")
        if status == "100":
            return  # it is there, which is all that a heartbeat says
        if status == "409" and "bytes" in str(headers.get("Description")).lower():
            self._is_pull_small = True
        elif status == "409" and "deleted" in str(headers.get("Description")).lower():
            self.was_taken = True
            self._fail("another process has taken over the mail of this machine, or its consumer was removed")
        elif status == "503":
            self._fail("the server has no JetStream, or not yet")
        self._pull = ""
        self._woken.set()

    def _on_parcel(self, message: nats.aio.msg.Msg) -> None:
        # $JS.ACK.STREAM.CONSUMER.DELIVERED.SEQUENCE.NUMBER.TIME.PENDING
        mark = message.reply.split(".")
        if mark[:4] != ["$JS", "ACK", self._stream, self._settings.machine]:
            return  # somebody has made the server send us what is not ours: it stays there
        with suppress(ValueError, IndexError):
            self._behind = int(mark[-1])
        self._unacked += 1
        self._arrived.append(self._parcel(message))
        self._pull_left -= 1
        if self._pull_left <= 0:
            self._pull = ""
        self._woken.set()

    def _parcel(self, message: nats.aio.msg.Msg) -> Parcel:
        """The message as a parcel; without a kind if its subject is none of ours. The server has checked the sender."""
        tokens = message.subject.split(".")
        own = [*self._base.split("."), "to", self._settings.machine]
        kind, name = "", ""
        if tokens[:4] == own and len(tokens) in (6, 7):
            kind = tokens[5]
            with suppress(InvalidRequest):
                name = token_name(tokens[6]) if len(tokens) == 7 else ""
                if (kind == "m") == bool(name) and kind in ("m", "b", "r"):
                    return Parcel(tokens[4], kind, name, message.data, mark=message.reply)
        return Parcel("", "", one_line(message.subject), b"", mark=message.reply)

    async def take(self) -> list[Parcel]:
        """See Line."""
        while not self._arrived:
            self._check()
            self._woken.clear()
            if not self._pull:
                await self._request_more()
            with anyio.move_on_after(self._seen_at + _SILENCE_S - anyio.current_time()):
                await self._woken.wait()
                continue
            if not self._arrived and anyio.current_time() >= self._seen_at + _SILENCE_S:
                self._fail(f"nothing was heard of the server for {_SILENCE_S:.0f} s")
        taken, self._arrived = self._arrived, []
        return taken

    async def _request_more(self) -> None:
        self._number += 1
        self._pull = f"p{self._number}"
        # One that is longer than what is asked for at once is asked for alone.
        size: dict[str, int] = {"batch": 1} if self._is_pull_small else {"batch": _PULL, "max_bytes": _PULL_BYTES}
        self._is_pull_small = False
        self._pull_left = size["batch"]
        wish = {**size, "expires": _PULL_S * _NS, "idle_heartbeat": _HEARTBEAT_S * _NS}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._settings.machine}"
        async with self._guarded():
            await self._client.publish(subject, json.dumps(wish).encode(), reply=f"{self._inbox}.{self._pull}")

    async def ack(self, parcels: Sequence[Parcel]) -> None:
        """See Line."""
        async with self._guarded():
            for parcel in parcels:
                await self._client.publish(parcel.mark, b"+ACK")
                self._unacked -= 1

    # -- what goes -----------------------------------------------------------------------------------------

    async def publish(self, parcels: Sequence[Parcel]) -> Stored:
        """See Line."""
        expected: list[asyncio.Future[bytes]] = []
        try:
            async with self._guarded():
                for parcel in parcels:
                    reply, future = self._expect("a")
                    expected.append(future)
                    name = f".{name_token(parcel.name)}" if parcel.kind == "m" else ""
                    subject = f"{self._base}.to.{parcel.machine}.{self._settings.machine}.{parcel.kind}{name}"
                    headers = {"Nats-Msg-Id": parcel.key} if parcel.key else None
                    await self._client.publish(subject, parcel.body, reply=reply, headers=headers)
                with anyio.move_on_after(_PUBLISH_S):
                    await asyncio.wait(expected)
        except RelayDown:
            stored = self._stored(expected)
            if stored.count:
                return stored  # what was answered before is stored
            raise
        return self._stored(expected)

    def _stored(self, expected: Sequence[asyncio.Future[bytes]]) -> Stored:
        count, sequence, trouble = 0, 0, ""
        for future in expected:
            if not future.done() or not future.result():
                trouble = trouble or "the server has not answered"
                continue
            try:
                answer = json.loads(future.result())
                error = answer.get("error")
                if error:
                    trouble = trouble or one_line(str(error.get("description")))
                elif not trouble:
                    # A copy has the number that the first one got.
                    sequence = sequence if answer.get("duplicate") else max(sequence, int(answer["seq"]))
                    count += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                trouble = trouble or "the server has answered what cannot be read"
        return Stored(count, sequence, trouble)

    # -- presence ------------------------------------------------------------------------------------------

    async def announce(self, body: bytes) -> None:
        """See Line."""
        async with self._guarded():
            await self._client.publish(f"{self._base}.here.{self._settings.machine}", body)

    async def ask(self) -> None:
        """See Line."""
        async with self._guarded():
            await self._client.publish(f"{self._base}.who", b"")

    async def hear(self) -> tuple[str, bytes]:
        """See Line."""
        self._check()
        heard = await self._heard.get()
        self._check()
        return heard

    async def _on_beat(self, message: nats.aio.msg.Msg) -> None:
        # By its subject alone the server vouches for the sender. With a reply or with headers it is something else,
        # which somebody has made the server send here. [LSEC-3]
        tokens = message.subject.split(".")
        is_beat = len(tokens) == 4 and tokens[:3] == [*self._base.split("."), "here"]
        if is_beat and not message.reply and not message.headers:
            self._note_heard(tokens[3], message.data)

    async def _on_question(self, message: nats.aio.msg.Msg) -> None:
        if message.subject == f"{self._base}.who":
            self._note_heard("", b"")

    def _note_heard(self, machine: str, body: bytes) -> None:
        with suppress(asyncio.QueueFull):  # a beat that is lost comes again in 15 s
            self._heard.put_nowait((machine, body))
