"""The compute thread's way to its neighbours and to the coordinator: one poll over all data sockets.

Knows nothing of tensors or of what a message means. It proves who sent a message from the key of the connection,
drops frames of other epochs, and says at once when a neighbour's connection breaks.

Only `wake`, `admit` and `address` may be used from other threads.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol import flat
from protocol.errors import CoordinatorLost, ManyhandsError, PeerLost, ProtocolViolation
from protocol.frames import Buffer, encode
from protocol.ids import WorkerId
from protocol.messages import Activation, KvRows, LinkHello, LinkMode, LinkOrder, LinkWelcome
from protocol.security import KeyPair
from worker.coordinator_line import CoordinatorLine, StepFrames, read_line
from worker.doors import Doors, Unread
from worker.listener import Heard, Listener, heard
from worker.peer import Peer
from worker.sending import Lent, lend, receive_now, send_now, send_within
from worker.waker import Waker
from worker.watch import Watch
from worker.wire import Arrival, open_from, pack_data

MAX_STASHED: Final = 1024
TICK_S: Final = 0.02  # while links are being made
COORDINATOR: Final = WorkerId("")
_log = logging.getLogger(__name__)


class Links:
    """All data sockets of one worker. Made anywhere, then used by one thread only."""

    def __init__(self, keys: KeyPair, listen: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Bind the listener, e.g. to "tcp://0.0.0.0:*"; raises ConfigInvalid when that is not possible."""
        self._keys = keys
        self._clock = clock
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._listener = Listener(self._context, keys, listen)
        self.address = self._listener.address
        self._waker = Waker()
        self._line = CoordinatorLine(self._context, keys)
        self._peers: dict[WorkerId, Peer] = {}
        self._by_key: dict[bytes, Peer] = {}
        self._arrivals: deque[Arrival] = deque()
        self._watch = Watch(self._waker)
        self._takers: dict[object, Callable[[], None]] = {}
        self._doors = Doors(self._listener.socket, self._line, {}, self._watch.touched)
        self._is_linking = self._is_woken = False
        self.epoch = 0
        self.num_dropped = 0
        self._refresh()

    # ------------------------------------------------------------ from any thread

    def wake(self) -> None:
        """End a `receive` that waits."""
        self._waker.wake()

    def admit(self, keys: Iterable[bytes]) -> None:
        """Let these keys, and no others, open connections to the listener."""
        self._listener.admit(keys)

    # ------------------------------------------------------------ making links

    def attach(self, own: WorkerId, address: str, server_key: bytes, nonce: str = "") -> None:
        """Connect the data connection to the coordinator; an unchanged one is kept."""
        self._line.attach(own, address, server_key, nonce)
        self._refresh()

    def begin(self, epoch: int, orders: Sequence[LinkOrder]) -> None:
        """Drop all links and start making those of a new epoch; `receive` makes them, `unlinked` tells how far."""
        self._drop_peers()
        self.epoch = epoch
        self._peers = {order.peer.worker: Peer(order) for order in orders}
        self._by_key = {peer.key: peer for peer in self._peers.values()}
        self._is_linking = bool(self._peers)
        self._tend()

    def forget(self, worker: WorkerId) -> None:
        """Drop the link to one neighbour, if there is one."""
        peer = self._peers.pop(worker, None)
        if peer is not None:
            del self._by_key[peer.key]
            peer.close()
            self._is_linking = any(not other.is_linked for other in self._peers.values())
            self._refresh()

    def end(self) -> None:
        """Drop all links; frames that still arrive are dropped too."""
        self.begin(0, ())

    @property
    def unlinked(self) -> tuple[WorkerId, ...]:
        """Neighbours that have not answered yet; the coordinator (empty name) while it can't be written to."""
        missing = [peer.worker for peer in self._peers.values() if not peer.is_linked]
        if not self._line.is_up:
            missing.append(COORDINATOR)
        self._touch_line()
        return tuple(missing)

    # ------------------------------------------------------------ frames

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer | None = None) -> None:
        """Send the same bytes to neighbours, in order. A large payload must stay unchanged for good.

        Raises PeerLost or CoordinatorLost when a connection is gone or does not take it within 5 s.
        """
        frames, ways = pack_data(message, payload), self._doors.ways
        for target in targets:
            if target not in ways:
                raise PeerLost(f"{target} is not linked", node=target, phase="send")
            socket, before = ways[target]
            try:
                send_within(socket, [*before, *frames])
            except zmq.ZMQError as error:
                raise self._unsent(target, error) from error
            self._watch.touched.add(socket)

    def offer(self, target: WorkerId, message: object, payload: Buffer) -> Lent | None:
        """Lend a message to a neighbour's link if that takes it at once; None when not now, or not any more."""
        way = self._doors.ways.get(target)
        if way is None:
            return None
        socket, before = way
        self._watch.touched.add(socket)
        return lend(socket, [*before, *pack_data(message, payload)])

    def send_up(self, message: object, payload: Buffer | None = None) -> None:
        """Send to the coordinator; raises CoordinatorLost."""
        self._line.send(encode(message, payload))
        self._touch_line()

    def doors(self) -> Doors | None:
        """Return the sockets of neighbours as they are now; None while something else must be heard or done first.

        What a lane through them leaves unread belongs to `read`.
        """
        return None if self._arrivals or self._is_linking else self._doors

    def read(self, unread: Unread) -> None:
        """Take in a message that was received already: `receive` returns it. Raises what `receive` does."""
        if unread.door is self._listener.socket:
            self._hear(heard(unread.frames))
        else:
            peer = next(one for one in self._peers.values() if one.dealer is unread.door)
            self._take_frames(peer, [frame.buffer for frame in unread.frames])

    def receive(self, timeout_s: float) -> Arrival | None:
        """Return the next message of this epoch; None after `timeout_s` or when woken.

        Raises PeerLost (naming it) or CoordinatorLost when a connection breaks, ProtocolViolation for what may not
        be sent.
        """
        if self._arrivals:
            return self._arrivals.popleft()
        deadline = self._clock() + timeout_s
        left_s = timeout_s
        while True:
            if self._is_linking:
                self._tend()
                left_s = min(left_s, TICK_S)
            for item in self._watch.readable(left_s):
                self._takers[item]()
            if self._arrivals:
                return self._arrivals.popleft()
            left_s = deadline - self._clock()
            if self._is_woken or left_s <= 0:
                self._is_woken = False
                return None

    def close(self) -> None:
        """Close every socket and the gate."""
        self._drop_peers()
        self._listener.close()
        self._line.close()
        self._watch.close()
        self._waker.close()
        self._context.term()

    # ------------------------------------------------------------ inside

    def _unsent(self, target: WorkerId, error: zmq.ZMQError) -> ManyhandsError:
        if self._peers[target].mode is LinkMode.RELAY:
            return CoordinatorLost(f"the data connection is gone: {error.strerror}", phase="send")
        return PeerLost(f"{target} can't be sent to: {error.strerror}", node=target, phase="send")

    def _hear(self, one: Heard) -> None:
        peer = self._by_key.get(one.key)
        received = open_from(peer.worker if peer is not None else None, one.frames)
        if received is None:
            self.num_dropped += 1
        elif isinstance(received.message, LinkHello):
            self._answer_hello(peer, received.message, one)
        elif peer is None or peer.route != one.route:  # only a neighbour that dials us has a route, once it said hello
            self.num_dropped += 1
        else:
            self._take_from_peer(peer, received.message, received.payload)

    def _answer_hello(self, peer: Peer | None, hello: LinkHello, one: Heard) -> None:
        is_probe = hello.epoch == 0
        is_ours = peer is not None and peer.mode is LinkMode.LISTEN and hello.epoch == self.epoch
        if (peer is not None and hello.worker != peer.worker) or not (is_probe or is_ours):
            self.num_dropped += 1  # a newer epoch: it says hello again, and we shall know it by then
            return
        if peer is not None and is_ours and not is_probe:
            self._take_listener_events()  # descriptors come again: hear first what became of this one's last owner
            peer.route, peer.descriptor = one.route, one.descriptor
            self._mark(peer, is_linked=True)
        frames = encode(LinkWelcome(worker=self._line.own, epoch=hello.epoch))
        try:
            self._listener.send(one.route, frames)
        except zmq.ZMQError as error:  # it asked and went; when it is a neighbour, the break shows on its own
            _log.info("no way back to %s: %s", hello.worker, error.strerror)

    def _take_from_dealer(self, peer: Peer, dealer: zmq.Socket[bytes]) -> None:
        self._take_frames(peer, [frame.buffer for frame in receive_now(dealer)])

    def _take_dealer_event(self, peer: Peer, monitor: zmq.Socket[bytes]) -> None:
        recv_monitor_message(monitor)
        self._broken(peer)

    def _take_frames(self, peer: Peer, frames: Sequence[Buffer]) -> None:
        received = open_from(peer.worker, frames)
        if received is not None:
            self._take_from_peer(peer, received.message, received.payload)

    def _take_wake(self) -> None:
        self._waker.clear()
        self._is_woken = True

    def _take_from_coordinator(self, line: zmq.Socket[bytes]) -> None:
        found = read_line([frame.buffer for frame in receive_now(line)])
        if isinstance(found, StepFrames):
            self._stash(Arrival(COORDINATOR, found.step, found.payload), found.step.epoch)
            return
        peer = self._peers.get(found.source)
        if peer is None or peer.mode is not LinkMode.RELAY or found.target != self._line.own:
            self.num_dropped += 1
            return
        self._take_frames(peer, found.frames)

    def _take_from_peer(self, peer: Peer, message: Any, payload: memoryview) -> None:
        if isinstance(message, bytes):
            self._stash(Arrival(peer.worker, message, payload), flat.epoch_of(message))
        elif isinstance(message, Activation | KvRows):
            self._stash(Arrival(peer.worker, message, payload), message.epoch)
        elif isinstance(message, LinkWelcome):
            if message.epoch == self.epoch and message.worker == peer.worker:
                self._mark(peer, is_linked=True)
        elif isinstance(message, LinkHello):  # relayed; a direct one goes to the listener
            if message.epoch == self.epoch and peer.mode is LinkMode.RELAY:
                self._relay(peer.worker, encode(LinkWelcome(worker=self._line.own, epoch=self.epoch)))
        else:
            name = type(message).__name__
            raise ProtocolViolation(f"{peer.worker} may not send {name}", node=peer.worker, phase="receive")

    def _stash(self, arrival: Arrival, epoch: int) -> None:
        if epoch != self.epoch:
            self.num_dropped += 1
        elif len(self._arrivals) >= MAX_STASHED:
            raise ProtocolViolation(f"{len(self._arrivals)} messages wait to be computed", node=arrival.sender)
        else:
            self._arrivals.append(arrival)

    def _take_listener_events(self) -> None:
        self._watch.touched.add(self._listener.monitor)
        for descriptor in self._listener.ended():
            for peer in self._peers.values():
                if peer.mode is LinkMode.LISTEN and peer.is_linked and peer.descriptor == descriptor:
                    self._broken(peer)

    def _broken(self, peer: Peer) -> None:
        if peer.is_linked:
            self._mark(peer, is_linked=False)
            raise PeerLost(f"the connection to {peer.worker} broke", node=peer.worker, phase="link")

    def _relay(self, target: WorkerId, frames: Sequence[Buffer]) -> None:
        self._line.relay(target, frames)
        self._touch_line()

    def _touch_line(self) -> None:
        if self._line.socket is not None:
            self._watch.touched.add(self._line.socket)

    def _mark(self, peer: Peer, *, is_linked: bool) -> None:
        peer.is_linked = is_linked
        self._is_linking = any(not other.is_linked for other in self._peers.values())
        self._doors = Doors(self._listener.socket, self._line, self._peers, self._watch.touched)

    def _tend(self) -> None:
        """Dial and greet neighbours that have not answered yet."""
        now = self._clock()
        for peer in self._peers.values():
            if peer.must_dial(now):
                peer.dial(self._context, self._keys, f"{self._line.own}/{self.epoch}", now)
                self._refresh()
            if peer.must_greet(now):
                self._greet(peer, now)

    def _greet(self, peer: Peer, now: float) -> None:
        frames: list[Buffer] = encode(LinkHello(worker=self._line.own, epoch=self.epoch))
        try:
            if peer.dealer is not None:
                self._watch.touched.add(peer.dealer)
                send_now(peer.dealer, frames)
            elif self._line.is_up:
                self._relay(peer.worker, frames)
            else:
                return
        except zmq.Again:  # not connected yet
            return
        peer.greeted(now)

    def _drop_peers(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers, self._by_key = {}, {}
        self.num_dropped += len(self._arrivals)
        self._arrivals.clear()
        self._refresh()

    def _refresh(self) -> None:
        takers: dict[Any, Callable[[], None]] = {
            self._listener.socket: lambda: self._hear(self._listener.receive()),
            self._listener.monitor: self._take_listener_events,
            **self._line.takers(self._take_from_coordinator),
        }
        for peer in self._peers.values():
            if peer.dealer is not None:
                takers[peer.dealer] = partial(self._take_from_dealer, peer, peer.dealer)
            if peer.monitor is not None:
                takers[peer.monitor] = partial(self._take_dealer_event, peer, peer.monitor)
        self._watch.watch(takers)
        self._takers = {**takers, self._waker: self._take_wake}
        self._doors = Doors(self._listener.socket, self._line, self._peers, self._watch.touched)
