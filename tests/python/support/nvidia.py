"""The GPU, as `nvidia-smi` tells: nobody here imports CUDA."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path

CONTROL_DEVICE = Path("/dev/nvidiactl")
TIMEOUT_S = 30


def is_present() -> bool:
    """Whether NVIDIA's driver is loaded and this process may see it."""
    return CONTROL_DEVICE.exists()


def ask(query: str) -> list[list[str]]:
    """The rows that `nvidia-smi` prints for this query, cell by cell; none if it does not answer."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]


def description() -> str:
    """Model and driver of the first device."""
    rows = ask("--query-gpu=name,driver_version")
    return f"{rows[0][0]}, driver {rows[0][1]}" if rows else "unknown"


def memory_mib(pids: Collection[int]) -> int | None:
    """Device memory of these processes together; None if `nvidia-smi` does not tell, as in some containers."""
    rows = ask("--query-compute-apps=pid,used_memory")
    used = [memory for pid, memory in rows if pid.isdigit() and int(pid) in pids]
    return sum(map(int, used)) if used and all(memory.isdigit() for memory in used) else None
