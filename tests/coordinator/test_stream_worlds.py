"""A stream through seeded trouble: lost connections, killed coordinators, power cuts; each token seen once and right.

The desk, the token log and the client's side are the real ones. The core is a few lines that know every answer; what is
under way when a connection breaks is lost from some point on.
"""

from __future__ import annotations

import random
import tempfile
from collections import deque
from pathlib import Path

import pytest

from coordinator.desk import Act, Desk
from coordinator.events import Effect, RequestArrived, RequestCancelled, SessionEnded, TokensCommitted, token_bytes
from coordinator.takeover import take_over
from coordinator.tickets import Say, digest_of
from coordinator.token_log import Begun, Ended, Forgotten, Grown, TokenLog
from coordinator.tokens import TextCodec
from manyhands.conversation import RequestLog
from manyhands.options import Options, completion_order
from manyhands.results import Generation, Piece
from protocol.errors import ManyhandsError
from protocol.frames import decode
from protocol.ids import RequestId, SessionId
from protocol.messages import FinishReason, Generate, Resume, Timings, Usage
from tests.coordinator.byte_model import EOS, codec

NAME, MODEL = RequestId("r"), b"m" * 32
RAW = "aé€ and 😀 more, then the END of it, and what nobody sees".encode()
NUM_SEEDS = 40
NOTHING = Timings(queued_s=0.0, first_token_s=0.0, total_s=0.0)


@pytest.fixture(scope="module")
def text_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return codec(tmp_path_factory.mktemp("tokenizer"))


class World:
    """One client and one request; the coordinator may die and come back."""

    def __init__(self, text_codec: TextCodec, folder: Path, dice: random.Random, stops: tuple[str, ...]) -> None:
        self._codec, self._folder, self._dice = text_codec, folder, dice
        self._order = completion_order(NAME, [1, 2], Options(max_tokens=len(RAW), stop=stops))
        self._client = RequestLog(self._order)
        self._connection = 0
        self._on_the_way: deque[object] = deque()
        self._session: SessionId | None = None  # open in the core
        self._num_computed = 0
        self._starts = 0
        self.text, self.tokens = "", list[int]()
        self.end: Generation | ManyhandsError | None = None
        self._start()
        self.dial()

    def _start(self) -> None:
        self._starts += 1
        self._log = TokenLog.open(self._folder / "tokens.db", MODEL, reserve_bytes=0)
        self._desk = Desk(
            self._codec, eos=[EOS], client_silence_s=15.0, client_return_s=60.0, first_session=1000 * self._starts
        )
        taken = take_over(self._log.entries(), self._desk, model=MODEL, now=0.0, unix_now=0.0)
        for session in taken.sessions:
            self._session, self._num_computed = session.session, session.num_answer
        self._do(taken.acts)

    def _handle(self, effects: list[Effect]) -> None:
        assert not self._log.write(self._desk.records(effects), 0.0)
        for effect in effects:
            if isinstance(effect, TokensCommitted):
                self._do(self._desk.committed(effect, 0.0))
            elif isinstance(effect, SessionEnded):
                self._session = None
                self._do(self._desk.ended(effect, 0.0))

    def _do(self, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case Say(client, message):
                    if client == self._who:
                        self._on_the_way.append(message)
                case RequestArrived():
                    self._session, self._num_computed = act.session, 0
                case RequestCancelled() if act.session == self._session:
                    self._handle([self._ended(act.reason)])
                case Begun() | Grown() | Ended() | Forgotten():
                    assert not self._log.write([act], 0.0)

    def _ended(self, reason: FinishReason) -> SessionEnded:
        assert self._session is not None
        usage = Usage(prompt_tokens=2, completion_tokens=self._num_computed)
        return SessionEnded(session=self._session, reason=reason, usage=usage, timings=NOTHING)

    @property
    def _who(self) -> bytes:
        return b"client-%d" % self._connection

    # ------------------------------------------------------------ what happens

    def compute(self) -> None:
        """One step: a token or a few, all or nothing of it."""
        if self._session is None:
            return
        tokens = tuple(RAW[self._num_computed : self._num_computed + self._dice.choice((1, 1, 1, 4))])
        effects: list[Effect] = [TokensCommitted(session=self._session, index=self._num_computed, tokens=tokens)]
        self._num_computed += len(tokens)
        if self._num_computed == len(RAW):
            effects.append(self._ended(FinishReason.LENGTH))
        self._handle(effects)

    def deliver(self) -> None:
        """What is under way arrives, up to some point."""
        for _ in range(self._dice.randint(1, 5)):
            if not self._on_the_way or self.end is not None:
                return
            update = self._client.receive(self._on_the_way.popleft())
            if isinstance(update, Piece):
                self.text += update.text
                self.tokens += update.token_ids
            elif isinstance(update, Generation | ManyhandsError):
                self.end = update

    def dial(self) -> None:
        """The connection breaks, what is under way is lost, and the client comes by another one."""
        self._on_the_way.clear()
        if self._dice.random() < 0.5:
            self._desk.client_gone(self._who, 0.0)
        self._connection += 1
        frames = self._client.say_again()
        message, payload = decode(frames)
        match message:
            case Generate():
                digest = digest_of(message, payload)
                acts = self._desk.repeated(self._who, message, digest, 0.0)
                if acts is None:
                    ticket = self._desk.open(self._who, message, digest, 0.0)
                    acts = self._desk.submit(ticket, token_bytes([1, 2]), 0.0)
                self._do(acts)
            case Resume():
                self._do(self._desk.resume(self._who, message, 0.0))

    def crash(self) -> None:
        """The coordinator is killed and comes back; the client notices."""
        self._log.close()
        self._session = None
        self._start()
        self.dial()

    def cut_power(self) -> None:
        """As `crash`, and the log has lost the last steps of a stream that goes on; the client has not."""
        if self._session is not None and self._num_computed:
            with self._log._database.transaction() as db:
                (last,) = db.execute("SELECT max(number) FROM tokens").fetchone()
                db.execute("DELETE FROM tokens WHERE number > ?", (last - self._dice.randint(1, 5),))
        self.crash()

    def live(self) -> None:
        """Let things happen until the stream has ended; the trouble stops in the end."""
        calm, rough = (self.compute, self.deliver), (self.dial, self.crash, self.cut_power)
        for turn in range(5000):
            if self.end is not None:
                break
            self._dice.choice(rough if turn < 400 and self._dice.random() < 0.15 else calm)()
        self._log.close()


@pytest.mark.parametrize("stops", [(), ("END",)])
def test_each_token_is_seen_once_and_right(text_codec: TextCodec, stops: tuple[str, ...]) -> None:
    whole = RAW[: RAW.index(b"END") + 3] if stops else RAW
    for seed in range(NUM_SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            world = World(text_codec, Path(folder), random.Random(seed), stops)
            world.live()
        assert isinstance(world.end, Generation), f"seed {seed}: {world.end}"
        assert bytes(world.tokens) == bytes(world.end.token_ids) == whole, f"seed {seed}"
        assert world.text == world.end.text == whole.decode().removesuffix("END"), f"seed {seed}"
        assert world.end.finish_reason is (FinishReason.STOP if stops else FinishReason.LENGTH), f"seed {seed}"
