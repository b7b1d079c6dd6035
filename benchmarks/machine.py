"""What a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> str:
    """Card or processor, its instruction sets, torch's version and number of threads.

    bfloat16 is fast on a processor with AMX and slow on one without, so the sets belong to every
    figure.
    """
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {threads}"
    about = _processor()
    name = about.get("model name") or platform.processor() or platform.machine()
    flags = about.get("flags", "").split()
    known = [name for name in _SETS if name in flags]
    sets = f" with {', '.join(known)}" if known else ""
    missing = "" if "amx_bf16" in known or not flags else ", without AMX"
    return f"{name}{sets}{missing}, {threads}"


def _processor() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    first = info.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
