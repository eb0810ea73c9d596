"""The asynchronous client: ask a cluster to generate text, follow the stream, look at the cluster, invite workers.

Knows nothing of sockets (`manyhands.line`) or of the protocol's states (`manyhands.conversation`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from manyhands.connection import Status
from manyhands.home import find_link
from manyhands.line import Line
from manyhands.mailbox import Mailbox
from manyhands.options import Messages, OptionFields, Options, Order, Prompt, chat_order, completion_order
from manyhands.results import Generation, Piece
from protocol.errors import RequestInvalid
from protocol.ids import RequestId, WorkerId
from protocol.security import Link


class AsyncGenerationStream:
    """The pieces of a running answer: `async for piece in stream`.

    Closing it (`aclose`, leaving its `async with`, cancelling the task that reads it, dropping it) stops the work on
    the workers. `result` is the whole answer, after the last piece.
    """

    def __init__(self, line: Line, request: RequestId, mailbox: Mailbox) -> None:
        self._line = line
        self._request = request
        self._mailbox = mailbox
        self._loop = asyncio.get_running_loop()

    @property
    def result(self) -> Generation:
        """The finished answer; raises RequestInvalid before the stream has ended."""
        if not isinstance(self._mailbox.end, Generation):
            raise RequestInvalid("the stream has not ended", remedy="read its pieces to the end first")
        return self._mailbox.end

    @property
    def waits_for(self) -> str:
        """What this request waits for: as the coordinator says, or for a connection; empty while tokens flow."""
        return self._mailbox.waits_for

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        piece = await self.next_piece()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def next_piece(self) -> Piece | None:
        """Wait for the next piece; None after the last one."""
        try:
            return await self._mailbox.next_piece()
        except asyncio.CancelledError:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop the work, if any is left; safe to call twice."""
        self._line.abandon(self._request)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # A `break` out of `async for` leaves the stream to the garbage collector, maybe in another thread.
        if self._mailbox.end is None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
                self._loop.call_soon_threadsafe(self._line.abandon, self._request)


class AsyncClient:
    """A client of one cluster; any number of requests at once over one connection, dialled when first needed.

    `link`: a client link, or None for $MANYHANDS_LINK or the coordinator of this machine. `timeout_s`: how long the
    coordinator may be silent; while it lives it says what a request waits for, so this does not bound the answer.
    `reconnect_s`: when the connection is lost, how long to try for another one before open requests fail; they go on
    where they stopped, each token is seen once, and `waits_for` says so meanwhile. 0: they fail at once.

    Every method raises CoordinatorLost when nobody answers, AccessRefused when the link's key is not admitted, and
    the typed error that the coordinator reports. Use it in one event loop, as `async with AsyncClient() as client`.
    """

    def __init__(self, link: str | Link | None = None, timeout_s: float = 10.0, reconnect_s: float = 60.0) -> None:
        if not timeout_s > 0:
            raise RequestInvalid(f"timeout_s {timeout_s} must be positive")
        if not 0 <= reconnect_s < math.inf:
            raise RequestInvalid(f"reconnect_s {reconnect_s} must be a number of seconds, 0 or more")
        self._link = find_link(link, os.environ)
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s
        self._line: Line | None = None
        self._dialling = asyncio.Lock()

    @overload
    async def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[OptionFields]
    ) -> Generation: ...

    @overload
    async def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[OptionFields]
    ) -> AsyncGenerationStream: ...

    async def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[OptionFields]
    ) -> Generation | AsyncGenerationStream:
        """Continue a text or a list of token ids; `Options` lists the keyword arguments.

        Returns the whole answer, or with `stream` an iterator over its pieces. Cancelling the task stops the work.
        Raises RequestInvalid for a bad value, PeerLost when a worker vanishes, Overloaded when the queue is full.
        """
        checked = Options(**options)
        return await self._submit(completion_order(_name(checked), prompt, checked), stream)

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[OptionFields]
    ) -> Generation: ...

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[OptionFields]
    ) -> AsyncGenerationStream: ...

    async def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[OptionFields]
    ) -> Generation | AsyncGenerationStream:
        """Answer a conversation of {"role", "content"} messages, rendered with the model's own template.

        Otherwise as `generate`.
        """
        checked = Options(**options)
        return await self._submit(chat_order(_name(checked), messages, checked), stream)

    async def status(self) -> Status:
        """Return what the cluster looks like: phase, model, plan, workers, sessions (keys in ARCHITECTURE.md)."""
        return await (await self._connected()).status()

    async def invite(self, trusted: bool = False) -> str:
        """Return a fresh join link for one worker; a `trusted` one may see token ids, as the head does."""
        return await (await self._connected()).invite(trusted)

    async def drain(self, worker: str) -> None:
        """Let a worker hand over what it does and leave; `status` says when it is gone, or that it can't be spared.

        Raises RequestInvalid when there is no such worker.
        """
        line = await self._connected()
        names = [str(one.get("name")) for one in (await line.status()).get("workers", [])]
        if worker not in names:
            raise RequestInvalid(f"there is no worker {worker!r:.80}; there are {', '.join(names) or 'none'}")
        await line.drain(WorkerId(worker))

    async def close(self) -> None:
        """Stop what is running and hang up; a later request dials again."""
        line, self._line = self._line, None
        if line is not None:
            await line.close()

    async def __aenter__(self) -> Self:
        await self._connected()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(self, order: Order, stream: bool) -> Generation | AsyncGenerationStream:
        line = await self._connected()
        mailbox = line.submit(order)
        request = order.message.request
        if stream:
            return AsyncGenerationStream(line, request, mailbox)
        try:
            return await mailbox.result()
        finally:
            line.abandon(request)  # only does something when we leave early

    async def _connected(self) -> Line:
        async with self._dialling:
            if self._line is not None and not self._line.is_open:
                await self.close()
            if self._line is None:
                self._line = await Line.open(self._link, self._timeout_s, self._reconnect_s)
            return self._line


def _name(options: Options) -> RequestId:
    """Return the name of a request; a fresh one is so random that nobody else gives it."""
    return RequestId(options.request or secrets.token_hex(16))
