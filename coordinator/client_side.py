"""What clients say: hello, requests, going on with them, cancellations, questions about the cluster, invitations.

Knows nothing of workers. Errors are raised for the caller to tell, or told here when they come later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from coordinator.actor import Actor
from coordinator.admission import agree_version
from coordinator.events import LeaveAsked
from coordinator.prompts import read_prompt
from coordinator.tickets import Ticket, digest_of
from coordinator.tokens import TextCodec
from coordinator.worker_side import Spawn
from protocol.errors import InvariantBroken, ManyhandsError
from protocol.messages import (
    Cancel,
    ClientHello,
    Drain,
    Draining,
    Generate,
    Invitation,
    InviteRequest,
    Resume,
    StatusReport,
    StatusRequest,
    Welcome,
)
from protocol.transport import Envelope
from protocol.version import SOFTWARE


class ClientSide:
    """Takes messages of clients. Prompts are read in `prompt_pool`; `status` renders the report."""

    def __init__(
        self,
        *,
        actor: Actor,
        codec: TextCodec | None,
        prompt_pool: Executor,
        status: Callable[[], bytes],
        invite: Callable[[bool], str],
        spawn: Spawn,
    ) -> None:
        self._actor = actor
        self._codec = codec
        self._prompt_pool = prompt_pool
        self._status = status
        self._invite = invite
        self._spawn = spawn

    def take(self, envelope: Envelope, message: object, payload: memoryview, welcome: Welcome) -> None:
        """Act on a client's message; raises RequestInvalid, TokenizerMissing, Overloaded, VersionMismatch."""
        client, actor = envelope.routing_id, self._actor
        actor.desk.heard(client, actor.clock())
        match message:
            case ClientHello():
                agree_version(message, node="the client", own_software=SOFTWARE)
                actor.say(client, welcome)
            case Generate():
                self._generate(client, message, payload)
            case Resume():
                actor.act(actor.desk.resume(client, message, actor.clock()))
            case Cancel():
                actor.act(actor.desk.cancel(client, message, actor.clock()))
            case StatusRequest():
                actor.say(client, StatusReport(), self._status())
            case Drain():  # one that is not here has left already
                actor.run(LeaveAsked(worker=message.worker))
                actor.say(client, Draining(worker=message.worker))
            case InviteRequest():  # the only client key is the one in this machine's state folder
                actor.say(client, Invitation(link=self._invite(message.trusted)))
            case _:
                raise InvariantBroken(f"the table lets clients send {type(message).__name__}, but nobody takes it")

    def _generate(self, client: bytes, order: Generate, payload: memoryview) -> None:
        desk, now, digest = self._actor.desk, self._actor.clock(), digest_of(order, payload)
        acts = desk.repeated(client, order, digest, now)
        if acts is not None:
            self._actor.act(acts)
            return
        ticket = desk.open(client, order, digest, now)
        self._spawn(self._read_prompt(ticket, bytes(payload)))

    async def _read_prompt(self, ticket: Ticket, payload: bytes) -> None:
        loop, desk = asyncio.get_running_loop(), self._actor.desk
        try:
            # Computation only; the client hears `Waiting` meanwhile and may cancel, so no deadline here.
            prompt = await loop.run_in_executor(
                self._prompt_pool, read_prompt, self._codec, ticket.order.prompt_kind, payload
            )
        except ManyhandsError as error:
            self._actor.act(desk.refuse(ticket, error))
        else:
            self._actor.act(desk.submit(ticket, prompt, self._actor.clock()))
