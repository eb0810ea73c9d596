"""What a worker tells of itself: at first who it is, at every beat how it is, and while it loads, how far it has come.

Knows nothing of connections or leases.
"""

from __future__ import annotations

from protocol.ids import WorkerId
from protocol.messages import (
    OLDEST_VERSION,
    VERSION,
    Addresses,
    DeviceProfile,
    Heartbeat,
    Hello,
    LoadProgress,
)
from protocol.version import SOFTWARE
from worker.executor import Executor
from worker.loading import peak_bytes, resident_bytes
from worker.state import TOLD_AS, Phase, WorkerState


def hello_of(
    worker: WorkerId,
    state: WorkerState,
    profile: DeviceProfile,
    *,
    data_addresses: Addresses,
    tile_addresses: Addresses,
) -> Hello:
    """Return the first message of a connection."""
    return Hello(
        oldest_version=OLDEST_VERSION,
        version=VERSION,
        software=SOFTWARE,
        worker=worker,
        profile=profile,
        data_addresses=data_addresses,
        tile_addresses=tile_addresses,
        epoch=state.held_epoch,
        phase=TOLD_AS[state.phase],
    )


def heartbeat_of(state: WorkerState, executor: Executor, sequence: int, paused: str) -> Heartbeat:
    """Return the heartbeat of this moment; `paused`: why its owner does not want it to compute now."""
    streamed, work = executor.streamed(), executor.work
    return Heartbeat(
        sequence=sequence % 2**31,
        epoch=state.epoch,
        phase=TOLD_AS[state.phase],
        progress=executor.progress,
        resident_bytes=resident_bytes(),
        weight_bytes=executor.weight_bytes,
        kv_bytes=executor.kv_bytes,
        peak_bytes=peak_bytes(),
        streamed_bytes=streamed.read_bytes,
        streaming_s=streamed.read_s,
        stalled_s=streamed.stalled_s,
        computing_s=work.computing_s,
        steps=work.steps,
        paused=paused,
        sums_s=executor.sums_s,
    )


def load_progress_of(state: WorkerState, executor: Executor) -> LoadProgress | None:
    """Return how far loading is, None when nothing is being loaded; fetching tells of itself."""
    if state.phase is not Phase.LOADING:
        return None
    done, total = executor.load_progress
    return LoadProgress(epoch=state.epoch, phase="load", done_bytes=done, total_bytes=max(done, total))
