"""Chooses the kernel for a matrix on this device: proves each one against the plain way, times it, remembers.

Knows nothing of layers or tiles. What is chosen never changes the weights' arithmetic: the int8 kernels give the same
bits, and so do packed and plain bfloat16; int4 has one kernel for few rows and one for many, alike within rounding.

A choice is measured in a second when a worker starts for the first time, and kept in a file. Between two runs of a
trial the caches are filled with something else: a model's weights are never in them, and kernels that find their matrix
in a cache compare otherwise than kernels that wait for memory.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol.durable_file import write_whole
from protocol.errors import StorageFailed, StorageFull
from runtime.int4 import Int4Packed, Int4Unpacked, can_pack_int4, pack_int4, unpack_int4
from runtime.linear import Linear
from runtime.packed import can_pack_bfloat16, can_view_packed
from runtime.quantised import DequantisedLinear, Int4Weight, Int8Dynamic, Int8Integer, Int8Weight, relative_error

TRIAL_ROWS, TRIAL_COLS, TRIAL_GROUP = 2048, 2048, 32
TRIAL_VERSION = 2  # raise when a trial or a field of `Kernels` changes: what was remembered is then measured again
MANY = (4, 8, 16, 32, 64)
REPEATS = 7
CACHE_BYTES = 64 << 20  # more than processors of the kind that lends a hand have in a core's reach
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What this device does best. The defaults are right everywhere, and slow."""

    packs_bfloat16: bool = False  # oneDNN's reordered matrix
    views_bfloat16: bool = False  # the same in place, in a slot too
    packs_int8: bool = False  # fbgemm's prepacked matrix
    packs_int4: bool = False  # torch's int4 product
    int4_few_rows: int = 0  # up to here torch's int4 product is faster than making floats first


def measure(device: torch.device) -> Kernels:
    """Try the kernels of a device; takes a second."""
    if device.type != "cpu":
        return Kernels()
    with torch.inference_mode():
        packs_int4 = _is_right(_int4_is_right)
        return Kernels(
            packs_bfloat16=can_pack_bfloat16(),
            views_bfloat16=can_view_packed(),
            packs_int8=_is_right(_int8_is_right) and _int8_is_faster(),
            packs_int4=packs_int4,
            int4_few_rows=_int4_few_rows() if packs_int4 else 0,
        )


def load_or_measure(device: torch.device, path: Path) -> Kernels:
    """Return what `path` remembers of this device and this torch, else measure and remember."""
    key = f"{torch.__version__} {device.type} {platform.machine()} {torch.get_num_threads()} {_capability()}"
    try:
        known = json.loads(path.read_text())
        if known["key"] == key:
            return Kernels(**known["kernels"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s can't be used (%s); measuring the kernels again", path, error)
    kernels = measure(device)
    _remember(path, {"key": key, "kernels": asdict(kernels)})
    return kernels


def _remember(path: Path, value: object) -> None:
    """Written whole or not at all; where that is not possible the next start measures again."""
    try:
        write_whole(path, json.dumps(value).encode(), is_synced=False)
    except (StorageFull, StorageFailed) as error:
        _log.warning("%s; the next start measures the kernels again", error.message)


def _capability() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()} trial {TRIAL_VERSION}"


def _is_right(trial: Callable[[], bool]) -> bool:
    """A kernel that this build of torch lacks raises; then it is simply not chosen."""
    try:
        return trial()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        _log.info("no kernel: %s", error)
        return False


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _int8(rows: int = TRIAL_ROWS) -> Int8Weight:
    value = torch.randint(-127, 128, (rows, TRIAL_COLS), dtype=torch.int8, generator=_generator())
    return Int8Weight(value, torch.rand(rows, generator=_generator()) * 0.01 + 0.001)


def _int4(rows: int = TRIAL_ROWS) -> Int4Weight:
    shape = (rows, TRIAL_COLS // TRIAL_GROUP)
    packed = torch.randint(0, 256, (rows, TRIAL_COLS // 2), dtype=torch.uint8, generator=_generator())
    scale = (torch.rand(shape, generator=_generator()) * 0.01 + 0.001).bfloat16()
    return Int4Weight(packed, scale, (torch.randn(shape, generator=_generator()) * 0.01).bfloat16())


def _inputs(rows: int) -> Tensor:
    return torch.randn(rows, TRIAL_COLS, generator=_generator())


def _int8_is_right() -> bool:
    """fbgemm must give the very bits of the integer products; it does not where 8-bit sums saturate."""
    weight, x = _int8(272), _inputs(64)
    # Full-scale values of one sign are what saturates.
    weight.value_OI[0], x[0] = 127, x[0].abs() + 1
    return torch.equal(Int8Dynamic(weight, None).apply(x), Int8Integer(weight, None).apply(x))


def _int8_is_faster() -> bool:
    """Over one row and a small batch: alone they are close, in a batch `Int8Integer` is several times slower."""
    weight, x = _int8(), _inputs(8).bfloat16()
    both = Int8Dynamic(weight, None), Int8Integer(weight, None)
    alone, together = _seconds(both, x[:1]), _seconds(both, x)
    return alone[0] + together[0] < alone[1] + together[1]


def _int4_is_right() -> bool:
    weight, x = _int4(272), _inputs(3).bfloat16()
    if not can_pack_int4(272, TRIAL_COLS, TRIAL_GROUP):
        return False
    packed, scales_and_zeros = pack_int4(weight)
    nibble = torch.stack((weight.packed & 15, weight.packed >> 4), dim=-1).view(272, -1)
    if not torch.equal(unpack_int4(packed), nibble.t()):
        return False
    wanted = DequantisedLinear(weight, None).apply(x.float())
    return relative_error(Int4Packed(packed, scales_and_zeros, TRIAL_GROUP, None).apply(x), wanted) < 0.02


def _int4_few_rows() -> int:
    weight = _int4()
    packed = pack_int4(weight)
    few, many = Int4Packed(*packed, TRIAL_GROUP, None), Int4Unpacked(*packed, TRIAL_GROUP, None)
    best = 1
    for rows in MANY:
        x = _inputs(rows).bfloat16()
        few_s, many_s = _seconds((few, many), x)
        if few_s > many_s:
            break
        best = rows
    return best


def _seconds(linears: Sequence[Linear], x_TI: Tensor) -> list[float]:
    """The best of a few runs of each from memory, in turn: what else the device is doing only makes a run slower."""
    best, other = [float("inf")] * len(linears), torch.zeros(CACHE_BYTES, dtype=torch.uint8)
    for _ in range(REPEATS):
        for number, linear in enumerate(linears):
            other.add_(1)
            began = time.perf_counter()
            linear.apply(x_TI)
            best[number] = min(best[number], time.perf_counter() - began)
    return best
