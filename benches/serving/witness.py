"""Greenroom's connector with a clock: when the worker had begun each step, and with which copies.

Runs inside vLLM in the place of `GreenroomConnector` (`WITNESSED` in `hint_latency` names it) and changes nothing of
it. The time is taken before anything is decoded or written, so that the witness is not in what it measures.
"""

from __future__ import annotations

import os
import time
from typing import Any

from greenroom.vllm.connector import GreenroomConnector
from real_vllm.auditing import Witness
from real_vllm.plans import read_plan


class WitnessedConnector(GreenroomConnector):
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._witness = Witness(os.environ["GREENROOM_STEPS"], vllm_config.kv_transfer_config.engine_id)
        super().__init__(vllm_config, role, kv_cache_config)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        metadata = super().build_connector_meta(scheduler_output)
        metadata.computes = scheduler_output.total_num_scheduled_tokens > 0
        return metadata

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        super().handle_preemptions(kv_connector_metadata)
        at = time.monotonic_ns()
        plan = read_plan(kv_connector_metadata.plan)
        self._witness.say(
            "step",
            at=at,
            computes=kv_connector_metadata.computes,
            loads=[[job.kind, job.slots] for job in plan.loads],
            saves=[job.slots for job in plan.saves],
        )
