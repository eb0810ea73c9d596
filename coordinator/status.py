"""The cluster's status as JSON, for clients and people; `ARCHITECTURE.md` names its keys.

Knows nothing of how the values came about. Holds no prompts, tokens or keys.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from coordinator.cluster_status import ClusterStatus, WorkerStatus
from protocol.plans import Plan
from protocol.specs import ModelSpec, Span
from protocol.version import SOFTWARE


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
        "totals": {
            "prompt_tokens": status.totals.prompt_tokens,
            "completion_tokens": status.totals.completion_tokens,
            "requests": status.totals.requests,
            "errors": status.totals.errors,
        },
        "frames": counts._asdict(),
        "last_error": status.last_error,
    }
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


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
    return {
        "name": worker.name,
        "role": worker.role.value,
        "phase": worker.phase,
        "device": worker.profile.device,
        "system": worker.profile.system,
        "machine": worker.profile.machine,
        "cores": worker.profile.cores,
        "memory_bytes": worker.profile.memory_bytes,
        "budget_bytes": worker.profile.budget_bytes,
        "resident_bytes": worker.resident_bytes,
        "weight_bytes": worker.weight_bytes,
        "kv_bytes": worker.kv_bytes,
        "last_heard_s": round(worker.last_heard_s, 3),
        "addresses": list(worker.addresses),
        "link": worker.link,
        "loading": None if worker.loading is None else asdict(worker.loading),
    }


def _span(span: Span) -> list[int]:
    return [span.start, span.end]
