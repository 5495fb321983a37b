"""The native module logs to vLLM's standard error, on threads that vLLM knows nothing of."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

CONNECTS = """
import sys
from greenroom._native import SchedulerHooks
from greenroom.vllm.settings import EngineConfig
hooks = SchedulerHooks(EngineConfig(sys.argv[1], "engine", 4096, 1, 16, 100, 50, 0.3, True))
sys.stdin.read()
"""
ANSWER_S = 20.0


def test_a_full_disk_under_the_log_does_not_end_the_link(tmp_path: Path) -> None:
    """It says once that there is no sidecar, cannot, and tries again all the same."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener, open("/dev/full", "w") as full:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(ANSWER_S)
        command = [sys.executable, "-c", CONNECTS, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=full) as engine:
            try:
                for _ in range(2):
                    connection, _ = listener.accept()
                    connection.close()
            finally:
                engine.kill()
