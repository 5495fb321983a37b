"""The engines of these tests. Few configurations: each costs a start of about a minute."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from support.paths import LOGS, MODELS
from support.servers import Connector, VllmConfig

AUDIT_LOG = LOGS / f"audit-{os.getpid()}.jsonl"
"""What all audited engines of this test run write."""

PLAIN = VllmConfig(gpu_blocks=100, max_model_len=2048)
"""vLLM without Greenroom, whose answers are the right ones."""

OLD = dataclasses.replace(PLAIN, version="0.26")
"""The oldest release that Greenroom supports."""

AUDITED = VllmConfig(
    gpu_blocks=160,
    max_model_len=2048,
    connector=Connector("AuditingConnector", "real_vllm.auditing"),
    env=(("PYTHONPATH", str(Path(__file__).parents[1])), ("GREENROOM_AUDIT", str(AUDIT_LOG))),
)
"""vLLM with Greenroom, watched: see `auditing`."""

STOCK = VllmConfig(gpu_blocks=400)
"""vLLM with Greenroom as users have it."""

ADAPTERS = {name: MODELS / f"adapter-{name}" for name in ("a", "b")}
"""The adapters of these engines, by the names under which they are asked; they must be made before one is started."""

LORA = (
    "--enable-lora",
    # One step computes for all of them.
    *("--max-loras", str(len(ADAPTERS))),
    *("--lora-modules", *(f"{name}={folder}" for name, folder in ADAPTERS.items())),
)
PLAIN_LORA = dataclasses.replace(PLAIN, args=LORA)
AUDITED_LORA = dataclasses.replace(AUDITED, args=LORA)

RANKS = 2
TWO_RANKS = ("--tensor-parallel-size", str(RANKS))
ONE_THREAD = (("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("OMP_NUM_THREADS", "1"))
"""By itself vLLM's CPU build gives each rank a NUMA node of its own, and does not start where there are fewer."""
PLAIN_TWO_RANKS = dataclasses.replace(PLAIN, args=TWO_RANKS, env=ONE_THREAD)
AUDITED_TWO_RANKS = dataclasses.replace(AUDITED, args=TWO_RANKS, env=AUDITED.env + ONE_THREAD)

PATIENT: dict[str, Any] = {"lookup_wait_ms": 10_000}
"""A lookup that is not answered in time is a miss: where a hit is expected, a busy machine must not spoil it."""
