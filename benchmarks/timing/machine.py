"""Facts about the machine, the device, the versions and the commit of a run."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fused_la
from benchmarks.timing.clocks import cache_flush, copy_bandwidth, free_memory
from benchmarks.timing.providers import PROVIDERS

PACKAGES = ("triton", "numpy", "pytest-benchmark", "matplotlib")


def first_line(*command: str) -> str:
    """The first line that a command prints, "" if it cannot run or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def device_facts(device: str) -> dict[str, Any]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        size = min(2**30, free_memory(device) // 8)
        facts = {
            "name": properties.name,
            "copy_gb_per_s": copy_bandwidth(device, size, cache_flush(properties.L2_cache_size)),
            "cache_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
        torch.cuda.empty_cache()
        return facts
    return {
        "name": cpu_name(),
        "copy_gb_per_s": copy_bandwidth(device, 2**28),
        "cache_bytes": 0,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of packages; None for a package that is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "fused_la": fused_la.__version__,
        "torch": torch.__version__,
    }
    peers = [provider.distribution for provider in PROVIDERS.values() if provider.distribution]
    for name in dict.fromkeys((*PACKAGES, *peers)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """The commit of the checkout, with "+" if tracked files have changed; "unknown" outside a checkout."""
    found = first_line("git", "rev-parse", "HEAD")
    return (found + ("+" if first_line("git", "status", "--porcelain", "--untracked-files=no") else "")) or "unknown"


def command() -> str:
    return " ".join(["python -m benchmarks", *sys.argv[1:]])
