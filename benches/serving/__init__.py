"""Benchmarks that need a real vLLM. Here: what both sides of the switch of `switched` know."""

from __future__ import annotations

import signal
from pathlib import Path

OUT, IN = signal.SIGUSR1, signal.SIGUSR2
"""Takes the connector out of a process of vLLM's, and puts it back."""


def state_file(path: str, role: str) -> Path:
    """Where the process with this role of the connector's says what it has done: `out` or `in`."""
    return Path(f"{path}-{role.lower()}")
