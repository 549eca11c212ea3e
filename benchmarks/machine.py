"""What figures depend on: machine and versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "sentence-transformers", "ray", "numpy")


def own_peak() -> float:
    """The most bytes that this process ever had in memory. (Linux's ru_maxrss would begin with those of the process that started it.)"""
    found = [line.split()[1] for line in _lines("/proc/self/status") if line.startswith("VmHWM")]
    return 1024.0 * int(found[0]) if found else float(psutil.Process().memory_info().rss)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores that this process may use, memory in GB, arithmetic, GPU."""
    import torch

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    bf16 = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512" if torch.cpu._is_avx512_bf16_supported() else "none"
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "bfloat16": bf16,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines() if os.path.exists(path) else []


def versions() -> dict[str, str]:
    """Versions of Python, of this project (its commit, with a + where the code is not that of the commit) and of what computes."""
    commit = _git("rev-parse", "--short", "HEAD") or "?"
    changed = "+" if _git("status", "--porcelain", "--", "xdist", "jobs", "recipes", "benchmarks/*.py") else ""
    return {"python": platform.python_version(), "xdist": commit + changed} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
