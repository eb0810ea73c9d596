"""What this device offers: the compute thread's settings from the configuration, and the profile that is told.

Knows nothing of plans.
"""

from __future__ import annotations

from protocol.errors import ConfigInvalid
from protocol.messages import DeviceProfile
from protocol.sizes import parse_bytes
from runtime.device import measure, num_threads, pick_device
from worker.config import WorkerConfig
from worker.executor import ExecutorSettings


def executor_settings(config: WorkerConfig) -> ExecutorSettings:
    """Return what the compute thread may use; raises ConfigInvalid for a device that is not here."""
    device = pick_device(config.device)
    budget_bytes = parse_bytes(config.memory, whole=measure(device).available_bytes)
    if budget_bytes <= 0:
        raise ConfigInvalid(f"memory {config.memory!r} leaves nothing to work with")
    return ExecutorSettings(
        device=device,
        num_threads=config.threads or num_threads(),
        budget_bytes=budget_bytes,
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
    )
