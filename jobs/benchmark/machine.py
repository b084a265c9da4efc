"""What a benchmark was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

LIBRARIES = ("torch", "transformers", "deepspeed", "ray", "faiss-cpu")
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2")
"""Of a processor, those that matter here."""


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def described() -> dict[str, Any]:
    """The processor, the memory, the date and the versions."""
    capable = torch.cpu.get_capabilities()
    return {
        "processor": _processor(),
        "cores": threads(),
        "instructions": [name for name in INSTRUCTIONS if capable.get(name)],
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def told(about: dict[str, Any]) -> str:
    """One line about a machine."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['processor']}, {about['cores']} cores ({', '.join(about['instructions'])}), "
        f"{about['memory_gb']} GB, {about['date']}; Python {about['python']}, {versions}"
    )


def _processor() -> str:
    """Its name, as the kernel has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
