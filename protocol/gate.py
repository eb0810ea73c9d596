"""The gate: a thread that answers ZeroMQ's question whether a connecting peer may come in (ZAP, RFC 27).

Knows nothing of roles or messages: it asks `admits` with the peer's public key. Everything that is not CURVE with an
admitted key is refused; while no gate stands, sockets made by `protocol.transport` refuse everybody.

pyzmq's own authenticators let NULL peers pass and die silently when a callback raises, so this is our own.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import zmq
from zmq.utils import z85

from protocol.errors import InvariantBroken

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"  # fixed by RFC 27
CLOSE_DEADLINE_S: Final = 5.0
_log = logging.getLogger(__name__)


class Gate:
    """Admits peers of every ROUTER of one ZeroMQ context by their CURVE public key (z85, 40 bytes).

    `admits` is called in the gate's thread, so it must be safe there and quick; when it raises, the peer is refused
    and the error logged. A key that is no longer admitted keeps its live connection: drop it by `Envelope.public_key`.
    """

    def __init__(self, context: zmq.Context[Any], admits: Callable[[bytes], bool]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(shadow=context.underlying)  # plain, even if async
        self._admits = admits
        self._thread: threading.Thread | None = None
        self._stop: socket.socket | None = None

    def start(self) -> None:
        """Open the gate; call it before binding. Raises InvariantBroken when this context has one already."""
        if self._thread is not None:
            raise InvariantBroken("this gate is open already", phase="gate")
        questions = self._context.socket(zmq.REP)
        questions.linger = 0
        try:
            questions.bind(ZAP_ENDPOINT)
        except zmq.ZMQError as error:
            questions.close()
            raise InvariantBroken(f"this ZeroMQ context has a gate already: {error}", phase="gate") from error
        # Not a ZeroMQ socket: one held outside the thread would keep the context from ever terminating.
        self._stop, stopped = socket.socketpair()
        # A socket may move to another thread across a full fence, which starting the thread is.
        self._thread = threading.Thread(target=self._run, args=(questions, stopped), name="gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the gate and wait for its thread; harmless when it is closed. Raises InvariantBroken if it hangs."""
        thread, self._thread = self._thread, None
        stop, self._stop = self._stop, None
        if thread is None or stop is None:
            return
        stop.close()  # the thread's end becomes readable
        thread.join(CLOSE_DEADLINE_S)
        if thread.is_alive():
            raise InvariantBroken(f"the gate did not close within {CLOSE_DEADLINE_S} s", phase="gate")

    def __enter__(self) -> Gate:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, questions: zmq.Socket[bytes], stopped: socket.socket) -> None:
        with contextlib.closing(questions), stopped:
            try:
                self._answer_all(questions, stopped)
            except zmq.ContextTerminated:
                _log.debug("gate: closed with its context")
            except zmq.ZMQError:
                _log.critical("gate: broke, so everybody is refused from now on; restart this process", exc_info=True)

    def _answer_all(self, questions: zmq.Socket[bytes], stopped: socket.socket) -> None:
        poller = zmq.Poller()
        poller.register(questions, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if stopped.fileno() in ready:
                questions.unbind(ZAP_ENDPOINT)  # closing alone gives the name back later, too late for the next gate
                return
            questions.send_multipart(self._answer(questions.recv_multipart()))

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """Answer one ZAP request: version, request id, domain, address, routing id, mechanism, credentials..."""
        if len(question) < 6 or question[0] != b"1.0":
            _log.error("gate: a question that is not ZAP 1.0 (%d frames)", len(question))
            return [b"1.0", question[1] if len(question) > 1 else b"", b"500", b"not ZAP 1.0", b"", b""]
        request, address, mechanism = question[1], question[3].decode("ascii", "replace"), question[5]
        key = z85.encode(question[6]) if mechanism == b"CURVE" and len(question) == 7 else b""
        if key and self._is_admitted(key):
            return [b"1.0", request, b"200", b"OK", key, b""]
        who = key.decode("ascii") if key else f"a peer without CURVE ({mechanism.decode('ascii', 'replace')!r:.20})"
        _log.info("gate: refused %s from %s", who, address)
        return [b"1.0", request, b"400", b"refused", b"", b""]

    def _is_admitted(self, key: bytes) -> bool:
        try:
            return self._admits(key) is True
        except Exception:  # noqa: BLE001  an error in the caller's rule must not open the gate, nor close it for ever
            _log.exception("gate: the rule that admits keys failed; the peer is refused")
            return False
