"""What was measured on: the device, its cores, and the packages that were compared."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    return {package: found for package in packages if (found := version(package)) is not None}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{platform.machine()}, {os.cpu_count()} cores, {line.partition(':')[2].strip()}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def device() -> str:
    """The GPU where there is one, else the processor."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
