"""What the figures were measured on: without it they say little, with it they still describe one machine only."""

import os
from pathlib import Path

import psutil
import torch
import transformers

SWITCHES = ("RAY_SERVE_", "OMP_", "KMP_", "MKL_", "LD_PRELOAD", "ONEDNN_", "DNNL_", "TORCH", "MALLOC_")
"""Beginnings of the environment variables that may change the figures."""


def describe(threads: int, dtype: str) -> dict[str, str]:
    """Return the machine and the versions, by name."""
    switches = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)]
    return {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads of each model": str(threads),
        "dtype": dtype,
        "environment": " ".join(switches) or "no variable that would change anything",
    }


def processor() -> str:
    """Return the processor's name with family, model and stepping, as Linux gives them."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    numbers = "-".join(fields.get(name, "?") for name in ("cpu family", "model", "stepping"))
    return f"{fields.get('model name', 'unknown')} ({numbers})"


def descendants() -> list[psutil.Process]:
    """Return every process that this one started, and theirs."""
    return psutil.Process().children(recursive=True)


def busy_cores(seconds: float) -> float:
    """Return how many cores this process's descendants keep busy, over so many seconds."""
    before = {process.pid: _cpu_s(process) for process in descendants()}
    psutil.cpu_percent(interval=seconds)
    return sum(_cpu_s(process) - before.get(process.pid, 0.0) for process in descendants()) / seconds


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
