"""Cores and memory inside control groups of both versions, from files the tests write."""

from __future__ import annotations

import os

import psutil
import pytest
import torch

from protocol.errors import ConfigInvalid
from runtime.device import cpu_quota, host_memory, measure, num_threads, pick_device

QUOTAS = {
    "v2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    "v2, parent is tighter": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        },
        0.5,
    ),
    "v2, namespaced container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
    "v2, path of the host": ({"proc/self/cgroup": "0::/x/y\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
    "v2, unlimited": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
    "v1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
        },
        3.0,
    ),
    "v1, unlimited": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "no control groups": ({}, None),
    "garbage": ({"proc/self/cgroup": "what\n0::/\n", "sys/fs/cgroup/cpu.max": "a b c"}, None),
    "zero period": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 0"}, None),
}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("case", QUOTAS)
def test_cpu_quota(tmp_path, case):
    files, wanted = QUOTAS[case]
    write(tmp_path, files)
    assert cpu_quota(tmp_path) == wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert num_threads(tmp_path) == (cores if wanted is None else max(1, min(cores, int(wanted))))


MIB = 2**20
MEMORIES = {
    "v2": (
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": str(64 * MIB),
            "sys/fs/cgroup/a/memory.current": str(40 * MIB),
            "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {10 * MIB}\n",
        },
        (64 * MIB, 34 * MIB),
    ),
    "v1": (
        {
            "proc/self/cgroup": "3:memory:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(64 * MIB),
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(60 * MIB),
            "sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 3\ntotal_inactive_file {2 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
        (64 * MIB, 6 * MIB),
    ),
    "over its limit": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(10 * MIB),
            "sys/fs/cgroup/memory.current": str(11 * MIB),
        },
        (10 * MIB, 0),
    ),
}


@pytest.mark.parametrize("case", MEMORIES)
def test_memory_is_cut_to_the_control_group(tmp_path, case):
    files, wanted = MEMORIES[case]
    write(tmp_path, files)
    assert host_memory(tmp_path) == wanted


def test_memory_without_a_limit_is_the_hosts(tmp_path):
    total, available = host_memory(tmp_path)
    assert total == psutil.virtual_memory().total
    assert 0 < available <= total


def test_measure_fills_every_field():
    facts = measure(torch.device("cpu"))
    assert facts.cores >= 1
    assert 0 < facts.available_bytes <= facts.memory_bytes
    assert facts.device == "cpu"
    assert facts.torch == torch.__version__


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:1", "cuda:99", "auto:1"])
def test_devices_that_are_not_here_are_refused(name):
    with pytest.raises(ConfigInvalid, match="device"):
        pick_device(name)


def test_cpu_is_always_here():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
