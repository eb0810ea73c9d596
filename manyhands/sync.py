"""The synchronous client: `AsyncClient` in a thread with an event loop of its own.

Knows nothing else: every decision is the asynchronous client's.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from manyhands.client import AsyncClient, AsyncGenerationStream
from manyhands.connection import Status
from manyhands.options import Messages, OptionFields, Prompt
from manyhands.results import Generation, Piece
from protocol.errors import CoordinatorLost
from protocol.security import Link

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread; `call` runs a coroutine there and waits for it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="manyhands client", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns or raise what it raises; an interrupt here cancels it there."""
        if not self._thread.is_alive():
            work.close()
            raise CoordinatorLost("this client is closed", remedy="make a new Client")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run the coroutine, stop the loop and end the thread."""
        if threading.current_thread() is self._thread:  # the garbage collector came by here: nothing may block
            self._loop.create_task(last).add_done_callback(lambda _: self._loop.stop())
            return
        try:
            self.call(last)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()


class GenerationStream:
    """The pieces of a running answer: `for piece in stream`; closing or dropping it stops the work on the workers."""

    def __init__(self, loop: LoopThread, stream: AsyncGenerationStream) -> None:
        self._loop = loop
        self._stream = stream

    @property
    def result(self) -> Generation:
        """The finished answer; raises RequestInvalid before the stream has ended."""
        return self._stream.result

    @property
    def waits_for(self) -> str:
        """What this request waits for: as the coordinator says, or for a connection; empty while tokens flow."""
        return self._stream.waits_for

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        try:
            return self._loop.call(self._next())
        except StopAsyncIteration:
            raise StopIteration from None

    async def _next(self) -> Piece:
        return await anext(self._stream)

    def close(self) -> None:
        """Stop the work, if any is left; safe to call twice."""
        self._loop.call(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """A client of one cluster for code without an event loop; see `AsyncClient` for what each method does.

    It may be shared by threads. Use it as `with Client() as client`.
    """

    def __init__(self, link: str | Link | None = None, timeout_s: float = 10.0, reconnect_s: float = 60.0) -> None:
        self._client = AsyncClient(link, timeout_s, reconnect_s)
        self._loop = LoopThread()
        # Also when the client is dropped or the interpreter ends: no thread and no request is left behind.
        self._end = weakref.finalize(self, lambda loop, client: loop.close(client.close()), self._loop, self._client)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[OptionFields]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[OptionFields]
    ) -> GenerationStream: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[OptionFields]
    ) -> Generation | GenerationStream:
        """Continue a text or a list of token ids; `Options` lists the keyword arguments."""
        if not stream:
            return self._loop.call(self._client.generate(prompt, **options))
        return GenerationStream(self._loop, self._loop.call(self._client.generate(prompt, stream=True, **options)))

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Unpack[OptionFields]
    ) -> Generation: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[OptionFields]
    ) -> GenerationStream: ...

    def chat(
        self, messages: Messages, *, stream: bool = False, **options: Unpack[OptionFields]
    ) -> Generation | GenerationStream:
        """Answer a conversation of {"role", "content"} messages."""
        if not stream:
            return self._loop.call(self._client.chat(messages, **options))
        return GenerationStream(self._loop, self._loop.call(self._client.chat(messages, stream=True, **options)))

    def status(self) -> Status:
        """Return what the cluster looks like."""
        return self._loop.call(self._client.status())

    def invite(self, trusted: bool = False) -> str:
        """Return a fresh join link for one worker."""
        return self._loop.call(self._client.invite(trusted))

    def drain(self, worker: str) -> None:
        """Let a worker hand over what it does and leave."""
        self._loop.call(self._client.drain(worker))

    def close(self) -> None:
        """Stop what is running and hang up for good; safe to call twice."""
        self._end()

    def __enter__(self) -> Self:
        self._loop.call(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
