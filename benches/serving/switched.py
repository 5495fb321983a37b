"""Runs inside vLLM: Greenroom's connector, which one signal takes out of the engine and another puts back.

Out means out: until it is put back, vLLM's scheduler, executor and worker have no connector, like those of a server for
which none was configured, and call nothing of Greenroom's. `throughput` says why it wants both in one process.

Signals are handled on the main thread, which is the scheduler's and the worker's own. Both must be at rest: a step that
began with a connector must not end without one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from vllm.distributed.kv_transfer import kv_transfer_state

from greenroom.vllm.connector import GreenroomConnector
from serving import IN, OUT, state_file

_WORKER_PLACE: tuple[Any, str] = (kv_transfer_state, "_KV_CONNECTOR_AGENT")


class SwitchedConnector(GreenroomConnector):
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._file = state_file(os.environ["GREENROOM_SWITCH"], role.name)
        self._places = list(_scheduler_places()) if role.name == "SCHEDULER" else [_WORKER_PLACE]
        self._taken: list[Any] | None = None
        signal.signal(OUT, self._take_out)
        signal.signal(IN, self._put_back)

    def _take_out(self, *_: object) -> None:
        if self._taken is None:
            self._taken = [getattr(owner, name) for owner, name in self._places]
            for owner, name in self._places:
                setattr(owner, name, None)
        self._file.write_text("out")

    def _put_back(self, *_: object) -> None:
        if self._taken is not None:
            for (owner, name), value in zip(self._places, self._taken, strict=True):
                setattr(owner, name, value)
            self._taken = None
        self._file.write_text("in")


def _scheduler_places() -> Iterator[tuple[Any, str]]:
    """Whatever of vLLM's differs by whether there is a connector; its owners are in the frames of this call."""
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.engine.core import EngineCore

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, SchedulerInterface):
            yield owner, "connector"
            yield owner, "_kv_fetch_stages"
        elif isinstance(owner, EngineCore):
            yield owner.model_executor, "kv_output_aggregator"
            return
        frame = frame.f_back
    raise RuntimeError("the engine was not found in the frames of its connector's construction")
