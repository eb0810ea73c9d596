"""Computes prompts of one layer in the memory that the contract counts for them, and prints what came on top.

Run by test_allocator in a process of its own, whose heap is in one piece.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor

from protocol.batches import SessionRows
from protocol.contract import SLACK_BYTES, workspace_bytes
from protocol.ids import SessionId
from protocol.specs import ActivationFormat, ModelSpec, RopeSpec, Span, WeightFormat
from runtime.allocator import give_back, hold, keep_steady
from runtime.decoder import StageModel, rms_norm
from runtime.fused import allocate_block
from runtime.kernels import measure
from runtime.kv import KvCache
from runtime.matrices import arrange
from runtime.shares import StageShare, vocab_ops
from runtime.tensors import dtype_of
from runtime.windowed import AnyBlock, BlockOrder, PinnedBlocks
from worker.loading import peak_bytes

ROWS, POSITIONS = 256, 2048
CPU = torch.device("cpu")


def alone(_: int, partial_TD: Tensor | None) -> Tensor:
    assert partial_TD is not None
    return partial_TD


def zeros(order: BlockOrder, op: int, *, is_pinned: bool) -> AnyBlock:
    tensors = allocate_block(order.spec, order.share, op, order.device)
    for tensor in tensors.values():
        tensor.zero_()
    arrange(tensors, order.kernels)
    return order.make(op, tensors, is_pinned=is_pinned)


@torch.inference_mode()
def main(weights: str, activations: str, is_pinned: bool) -> None:
    keep_steady()
    torch.set_num_threads(1)
    spec = ModelSpec(
        name="m", family="llama", hidden=512, layers=1, heads=8, kv_heads=4, head_dim=64, intermediate=4096, vocab=2048,
        max_positions=POSITIONS, norm_eps=1e-5, rope=RopeSpec(theta=1e4), ffn_tiles=4, weights=WeightFormat(weights),
        activations=ActivationFormat(activations),
    )  # fmt: skip
    share = StageShare(layers=Span(0, 1), groups=Span(0, spec.kv_heads), ffn=Span(0, spec.ffn_tiles))
    order = BlockOrder(spec=spec, share=share, is_head=True, kernels=measure(CPU), device=CPU)
    blocks = PinnedBlocks({op: zeros(order, op, is_pinned=is_pinned) for op in order.ops})
    kv = KvCache(spec, layers=share.layers, groups=share.groups, positions=POSITIONS, device=CPU)
    norm_D = torch.ones(spec.hidden, dtype=dtype_of(spec.activations))
    stage = StageModel(spec, share=share, blocks=blocks, norms={0: norm_D, 1: norm_D}, kv=kv, device=CPU)

    def step(start: int, count: int) -> None:
        rows = (SessionRows(session=SessionId(1), start=start, count=count, capacity=POSITIONS),)
        hidden_TD = stage.forward(torch.ones(count, spec.hidden, dtype=norm_D.dtype), rows, alone)
        for op in vocab_ops(spec):
            blocks.acquire_vocab(op).logits(rms_norm(hidden_TD[-1:], norm_D, spec.norm_eps))

    def prompt() -> None:
        for start in range(0, POSITIONS, ROWS):
            step(start, ROWS)

    prompt()  # what libraries load by first use
    give_back()
    hold(
        workspace_bytes(
            spec, ffn_tiles=spec.ffn_tiles, is_head=True, rows=ROWS, samples=1, positions=spec.max_positions
        )
        - SLACK_BYTES
    )
    held = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        prompt()
    print(json.dumps(peak_bytes() - held))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "pinned")
