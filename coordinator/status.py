"""The cluster's status as JSON, for clients and people; `ARCHITECTURE.md` names its keys.

Knows nothing of how the values came about. Holds no prompts, tokens or keys.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from coordinator.cluster_status import ClusterStatus, WorkerStatus
from coordinator.story import Recovery
from protocol.errors import ManyhandsError
from protocol.messages import Heartbeat, Loaded, WorkerPhase
from protocol.plans import Plan
from protocol.specs import ModelSpec, Span
from protocol.version import SOFTWARE

NEVER_HEARD: Final = Heartbeat(
    sequence=0, epoch=0, phase=WorkerPhase.IDLE, progress=0, resident_bytes=0, weight_bytes=0, kv_bytes=0
)
NOT_LOADED: Final = Loaded(epoch=0, weight_bytes=0, fetched_bytes=0, resident_bytes=0, load_s=0.0)

LEAST_WHOLE: Final = 1e-3  # seconds or steps: below, a worker has nothing to tell yet, or nonsense


class RimCounts(NamedTuple):
    """What only the rim counts: bad frames, refused messages, relayed and dropped data frames."""

    violations: int
    refusals: int
    relayed: int
    dropped: int


def render_status(status: ClusterStatus, *, cluster: str, spec: ModelSpec, counts: RimCounts) -> bytes:
    """Return the status as UTF-8 JSON."""
    tree = {
        "cluster": cluster,
        "version": SOFTWARE,
        "term": status.term,
        "epoch": status.epoch,
        "phase": status.phase.value,
        "detail": status.detail,
        "model": _model(spec),
        "plan": None if status.plan is None else _plan(status.plan),
        "workers": [_worker(worker) for worker in status.workers],
        "sessions": {"running": status.sessions.running, "waiting": status.sessions.waiting},
        "kv": {"positions": status.kv.positions, "used": status.kv.used},
        "totals": {
            "prompt_tokens": status.totals.prompt_tokens,
            "completion_tokens": status.totals.completion_tokens,
            "requests": status.totals.requests,
            "errors": status.totals.errors,
        },
        "frames": counts._asdict(),
        "last_error": status.last_error,
        "refusal": None if status.refusal is None else _refusal(status.refusal),
        "events": [{"ago_s": round(status.now - one.at, 3), "text": one.text} for one in status.happenings],
        "recoveries": [_recovery(recovery, status.now) for recovery in status.recoveries],
    }
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _recovery(recovery: Recovery, now: float) -> dict[str, Any]:
    """Seconds of each part: from the loss to the plan, to its service, to the next token; None while not reached."""

    def between(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else round(end - start, 4)

    return {
        "cause": recovery.cause,
        "epoch": recovery.epoch,
        "ago_s": round(now - recovery.began_at, 3),
        "plan_s": between(recovery.began_at, recovery.planned_at),
        "load_s": between(recovery.planned_at, recovery.ready_at),
        "worker_load_s": round(recovery.worker_load_s, 4),
        "replay_s": between(recovery.ready_at, recovery.resumed_at),
        "fetched_bytes": recovery.fetched_bytes,
        "repeated": recovery.repeated.positions,
        "repeated_layers": [recovery.repeated.layers.start, recovery.repeated.layers.end],
        "repeated_rows": recovery.repeated.rows,
    }


def _refusal(error: ManyhandsError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "remedy": error.remedy,
        "node": error.node,
        "phase": error.phase,
    }


def num_parameters(spec: ModelSpec) -> int:
    """Return how many numbers the model has learned, tied embeddings counted once."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.hidden * (queries + 2 * keys) + queries * spec.hidden
    ffn = 3 * spec.hidden * spec.intermediate
    norms = 2 * spec.hidden + (2 * spec.head_dim if spec.qk_norm else 0)
    biases = (queries + 2 * keys) * spec.qkv_bias + spec.hidden * spec.o_bias
    biases += (2 * spec.intermediate + spec.hidden) * spec.mlp_bias
    vocab = spec.vocab * spec.hidden * (1 if spec.tied_embeddings else 2)
    return spec.layers * (attention + ffn + norms + biases) + vocab + spec.hidden


def _model(spec: ModelSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "family": spec.family,
        "layers": spec.layers,
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "max_positions": spec.max_positions,
        "weights": spec.weights.value,
        "activations": spec.activations.value,
        "parameters": num_parameters(spec),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "words": plan.words,
        "wire": plan.wire.value,
        "head": plan.head,
        "stages": [
            {
                "layers": _span(stage.layers),
                "hub": stage.hub_worker,
                "members": [
                    {"worker": share.worker, "groups": _span(share.groups), "ffn": _span(share.ffn)}
                    for share in stage.members
                ],
            }
            for stage in plan.stages
        ],
    }


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    beat = worker.heartbeat or NEVER_HEARD
    return {
        "name": worker.name,
        "role": worker.role.value,
        "phase": beat.phase.value,
        "device": worker.profile.device,
        "system": worker.profile.system,
        "machine": worker.profile.machine,
        "cores": worker.profile.cores,
        "memory_bytes": worker.profile.memory_bytes,
        "budget_bytes": worker.profile.budget_bytes,
        "base_bytes": worker.profile.base_bytes,
        **_memory(beat, worker.loaded or NOT_LOADED),
        "last_heard_s": round(worker.last_heard_s, 3),
        "addresses": list(worker.addresses),
        "link": worker.link,
        "loading": None if worker.loading is None else asdict(worker.loading),
        "state": worker.state,
    }


def _memory(beat: Heartbeat, loaded: Loaded) -> dict[str, Any]:
    """What a worker's memory goes to, and how its window keeps up; averages are since the plan was loaded."""
    return {
        "predicted_bytes": loaded.predicted_bytes,
        "resident_bytes": beat.resident_bytes,
        # The kernel counts the two at different moments; 0: it does not tell the peak.
        "peak_bytes": max(beat.peak_bytes, beat.resident_bytes) if beat.peak_bytes else 0,
        "weight_bytes": beat.weight_bytes or loaded.weight_bytes,  # the heartbeat may be older than the plan
        "kv_bytes": beat.kv_bytes,
        "pinned_bytes": loaded.pinned_bytes,
        "window_bytes": loaded.window_bytes,
        "steps": beat.steps,
        "streamed_bytes_per_step": round(_ratio(beat.streamed_bytes, beat.steps)),
        "disk_bytes_per_s": round(_ratio(beat.streamed_bytes, beat.streaming_s)),
        "step_s": round(_ratio(beat.computing_s, beat.steps), 6),
        "stalled_share": round(min(1.0, _ratio(beat.stalled_s, beat.computing_s)), 4),
        "sums_share": round(min(1.0, _ratio(beat.sums_s, beat.computing_s)), 4),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole >= LEAST_WHOLE else 0.0


def _span(span: Span) -> list[int]:
    return [span.start, span.end]
