"""What a run ran on: commit, versions, hardware. Imports no library that is slow to import."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = {"clipkit": "clipkit-vl", "torch": "torch", "torchvision": "torchvision", "open_clip": "open_clip_torch",
            "timm": "timm", "webdataset": "webdataset", "numpy": "numpy", "safetensors": "safetensors"}


def describe_environment() -> dict[str, Any]:
    """Return a JSON-able record: clipkit's git commit (None outside a checkout), versions, hardware."""
    versions = {"python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return {"git": _git_commit(), "versions": versions, "platform": platform.platform(), "cpu": _cpu_model(),
            "cores": os.cpu_count(), "cores_usable": usable_cores(), "memory_gb": _memory_gb(), "gpus": _gpus(),
            "host": platform.node()}


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git_commit() -> dict[str, Any] | None:
    """The commit of the checkout that clipkit runs from; a site-packages inside a stranger's repository is none."""
    package = Path(__file__).resolve().parents[1]
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=package, capture_output=True,
                       check=True, timeout=10)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, capture_output=True, check=True, timeout=10)
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "."], cwd=package,
                                 capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.decode().strip(), "changed": bool(changed.stdout.strip())}


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if models:
            return models[0]
    if sys.platform == "darwin":
        try:
            asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, check=True,
                                   timeout=10)
            return asked.stdout.decode().strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": one.name, "memory_gb": round(one.total_memory / 1e9, 1)} for one in found]
