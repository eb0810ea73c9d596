"""What this device offers: the compute thread's settings from the configuration, and the profile that is told.

Knows nothing of plans.
"""

from __future__ import annotations

import logging
from typing import Final

import torch

from protocol.errors import ConfigInvalid
from protocol.messages import DeviceProfile
from protocol.sizes import parse_bytes
from runtime.allocator import give_back, keep_steady
from runtime.device import measure, num_threads, pick_device
from runtime.kernels import load_or_measure
from worker.config import WorkerConfig
from worker.forming import ExecutorSettings
from worker.loading import resident_bytes

MOST_OF_MEMORY: Final = 0.95  # a process at the very limit of its control group is killed by one page too many
_log = logging.getLogger(__name__)


def executor_settings(config: WorkerConfig) -> ExecutorSettings:
    """Return what the compute thread may use; raises ConfigInvalid for a device that is not here."""
    keep_steady()
    device = pick_device(config.device)
    facts = measure(device)
    budget_bytes = parse_bytes(config.memory, whole=facts.available_bytes)
    most_bytes = int(facts.memory_bytes * MOST_OF_MEMORY)
    if budget_bytes > most_bytes:
        _log.warning(
            "memory %s is more than this process may take here (%d bytes in all, a control group's limit counted); "
            "working with %d bytes",
            config.memory,
            facts.memory_bytes,
            most_bytes,
        )
        budget_bytes = most_bytes
    if budget_bytes <= 0:
        raise ConfigInvalid(f"memory {config.memory!r} leaves nothing to work with")
    threads = config.threads or num_threads()
    torch.set_num_threads(threads)
    kernels = load_or_measure(device, config.cache_folder / "kernels.json")
    give_back()
    return ExecutorSettings(
        device=device,
        num_threads=threads,
        budget_bytes=budget_bytes,
        # What torch takes on the side of a GPU is not the GPU's memory, which the budget is then about.
        base_bytes=resident_bytes() if device.type == "cpu" else 0,
        kernels=kernels,
        step_timeout_s=config.step_timeout_s,
        link_timeout_s=config.link_timeout_s,
    )


def profile_of(settings: ExecutorSettings) -> DeviceProfile:
    """Return what the coordinator is told of this device, measured now."""
    facts = measure(settings.device)
    return DeviceProfile(
        system=facts.system,
        machine=facts.machine,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        available_bytes=facts.available_bytes,
        budget_bytes=settings.budget_bytes,
        device=facts.device[:64],
        torch=facts.torch,
        base_bytes=settings.base_bytes,
    )
