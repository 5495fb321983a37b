"""Runs inside vLLM: the auditing connector in a build with fault points, its hooks timed from outside.

The sidecar counts hook times too, but what an engine would report while its sidecar is dead or stopped is lost: these
lines are written by the engine itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from resource import RUSAGE_THREAD, getrusage
from typing import Any

import greenroom._native as native
from real_vllm.auditing import AuditingConnector

TIMED = ("turn_started", "match_prefix", "swap_in", "plan", "copies_done", "turn_ended", "reset")
SLOW_US = 50.0
"""Calls that take as long are written down one by one; the others are counted."""
WRITE_EVERY_S = 0.5


class CampaignConnector(AuditingConnector):
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        set_fault: Any = getattr(native, "fault", None)
        assert set_fault is not None, f"{native.__file__} was built without fault points: make faults-wheel"
        point, _, actions = os.environ["GREENROOM_FAULT"].partition("=")
        set_fault(point, actions)
        super().__init__(vllm_config, role, kv_cache_config)
        side: Any = self._scheduler_side
        if side is not None:
            side._hooks = TimedHooks(side._hooks, os.environ["GREENROOM_HOOK_TIMES"])


class TimedHooks:
    """The native hooks, timed call by call."""

    def __init__(self, hooks: Any, path: str) -> None:
        self._hooks = hooks
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._written = time.monotonic()
        self._calls = 0
        self._slow: list[tuple[str, float, float, bool]] = []
        """Hook, wall and processor time in microseconds, whether other processes took the processor meanwhile."""
        self._waits: list[float] = []
        self._pending: dict[str, tuple[float, float]] = {}
        """Request → when it was first and last told to ask again."""
        for name in TIMED:
            setattr(self, name, self._timed(name, getattr(hooks, name)))

    def __getattr__(self, name: str) -> Any:
        """Whatever is not timed."""
        return getattr(self._hooks, name)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            at, taken = time.monotonic(), getrusage(RUSAGE_THREAD).ru_nivcsw
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            answer = call(*args)
            cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
            self._calls += 1
            if wall >= SLOW_US * 1e3:
                taken = getrusage(RUSAGE_THREAD).ru_nivcsw - taken
                self._slow.append((f"plan {args[3]}" if name == "plan" else name, wall / 1e3, cpu / 1e3, taken > 0))
            self._follow(name, args[0] if args else "", answer is None, at)
            return answer

        return timed

    def _follow(self, name: str, request: Any, none: bool, at: float) -> None:
        """How long the sidecar kept requests waiting, and when to write. `at`: before the call."""
        if name == "match_prefix" and none:
            self._pending[request] = (self._pending.get(request, (at, at))[0], at)
        elif name in ("match_prefix", "turn_ended") and request in self._pending:
            # What came after the last time is the engine's own step.
            first, last = self._pending.pop(request)
            self._waits.append((last - first) * 1e3)
        if at - self._written >= WRITE_EVERY_S:
            self._write(at)

    def _write(self, now: float) -> None:
        line = {"at": now, "calls": self._calls, "slow": self._slow, "waits_ms": self._waits}
        os.write(self._file, (json.dumps(line) + "\n").encode())
        self._written, self._calls, self._slow, self._waits = now, 0, [], []
