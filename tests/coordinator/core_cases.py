"""Small values that the tests of the coordinator's core share: a model, workers, and what they say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from coordinator.events import (
    Effect,
    LoadProgressed,
    PeersReached,
    RequestArrived,
    SendControl,
    SendStep,
    StepFinished,
    TilesStocked,
    WorkerFaulted,
    WorkerHeard,
    WorkerJoined,
    WorkerLoaded,
    token_bytes,
)
from protocol.batches import Sampling
from protocol.ids import SessionId, WorkerId
from protocol.messages import (
    OLDEST_VERSION,
    VERSION,
    DeviceProfile,
    ErrorReport,
    Fault,
    Heartbeat,
    HeldKv,
    Hello,
    Loaded,
    LoadProgress,
    Reached,
    Role,
    SampledToken,
    Step,
    StepDone,
    Stocked,
    WorkerPhase,
)
from protocol.specs import ActivationFormat, ModelSpec, RopeSpec, WeightFormat

GB = 10**9
T = TypeVar("T")


def make_spec(
    *, layers: int = 4, kv_heads: int = 2, ffn_tiles: int = 8, max_positions: int = 512, vocab: int = 1000
) -> ModelSpec:
    return ModelSpec(
        name="small",
        family="llama",
        hidden=64,
        layers=layers,
        heads=2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=16,
        intermediate=32 * ffn_tiles,
        vocab=vocab,
        max_positions=max_positions,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10_000.0),
        ffn_tiles=ffn_tiles,
        weights=WeightFormat.FLOAT32,
        activations=ActivationFormat.FLOAT32,
    )


def profile(budget_bytes: int = GB) -> DeviceProfile:
    return DeviceProfile(
        system="Linux",
        machine="aarch64",
        cores=4,
        memory_bytes=2 * budget_bytes,
        available_bytes=budget_bytes,
        budget_bytes=budget_bytes,
        device="cpu",
        torch="2.13",
    )


def joined(name: str, *, budget_bytes: int = GB, phase: WorkerPhase = WorkerPhase.IDLE, epoch: int = 0) -> WorkerJoined:
    """A worker's hello; names that begin with "head" are trusted."""
    hello = Hello(
        oldest_version=OLDEST_VERSION,
        version=VERSION,
        software="test",
        worker=WorkerId(name),
        profile=profile(budget_bytes),
        data_addresses=(f"tcp://{name}:1",),
        epoch=epoch,
        phase=phase,
    )
    role = Role.HEAD if name.startswith("head") else Role.WORKER
    return WorkerJoined(worker=WorkerId(name), role=role, public_key=name.encode().ljust(40, b"k"), hello=hello)


def heartbeat(name: str, sequence: int = 0, *, progress: int = 0, epoch: int = 0, paused: str = "") -> WorkerHeard:
    beat = Heartbeat(
        sequence=sequence,
        epoch=epoch,
        phase=WorkerPhase.READY,
        progress=progress,
        resident_bytes=30,
        weight_bytes=20,
        kv_bytes=10,
        paused=paused,
    )
    return WorkerHeard(worker=WorkerId(name), heartbeat=beat)


def reached(name: str, probe: int, *peers: str) -> PeersReached:
    answer = Reached(probe=probe, workers=tuple(WorkerId(peer) for peer in peers))
    return PeersReached(worker=WorkerId(name), reached=answer)


def progressed(name: str, epoch: int, done_bytes: int, *, phase: str = "fetch") -> LoadProgressed:
    progress = LoadProgress(epoch=epoch, phase=phase, done_bytes=done_bytes, total_bytes=1000)
    return LoadProgressed(worker=WorkerId(name), progress=progress)


def loaded(name: str, epoch: int, held: Iterable[HeldKv] = ()) -> WorkerLoaded:
    message = Loaded(
        epoch=epoch, weight_bytes=1, fetched_bytes=1, resident_bytes=1, load_s=0.1, held=tuple(held), knows_layers=True
    )
    return WorkerLoaded(worker=WorkerId(name), loaded=message)


def stocked(name: str, order: int) -> TilesStocked:
    return TilesStocked(worker=WorkerId(name), stocked=Stocked(order=order, done_bytes=1, total_bytes=1, is_over=True))


def faulted(name: str, epoch: int, *, lost: str = "", code: str = "step-failed") -> WorkerFaulted:
    report = ErrorReport(code=code, text="it broke")
    return WorkerFaulted(worker=WorkerId(name), fault=Fault(epoch=epoch, error=report, lost=lost))


def arrived(
    session: int, prompt: Iterable[int] = (1, 2, 3), *, max_tokens: int = 4, stop_tokens: Iterable[int] = ()
) -> RequestArrived:
    return RequestArrived(
        session=SessionId(session),
        prompt=token_bytes(prompt),
        max_tokens=max_tokens,
        sampling=Sampling(),
        stop_tokens=frozenset(stop_tokens),
    )


def done(step: Step, *tokens: int) -> StepDone:
    """The head's answer to a step: these tokens for its sampled rows, in their order."""
    sampled = [part.session for part in step.rows if part.sample]
    pairs = zip(sampled, tokens, strict=True)
    return StepDone(
        epoch=step.epoch,
        step=step.step,
        tokens=tuple(SampledToken(session=session, token=token, logprob=-1.0) for session, token in pairs),
        step_s=0.01,
    )


def finished(name: str, step: Step, *tokens: int) -> StepFinished:
    return StepFinished(worker=WorkerId(name), done=done(step, *tokens))


def of(kind: type[T], effects: Iterable[Effect]) -> list[T]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(kind: type[T], effects: Iterable[Effect]) -> dict[str, T]:
    """Control messages of one kind, by the worker they go to."""
    controls = of(SendControl, effects)
    return {control.worker: control.message for control in controls if isinstance(control.message, kind)}


def steps(effects: Iterable[Effect]) -> list[Step]:
    return [effect.step for effect in of(SendStep, effects)]
