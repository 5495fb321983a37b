"""The engines of these tests. Few configurations: each costs a start of about a minute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from support.paths import LOGS
from support.servers import Connector, VllmConfig

AUDIT_LOG = LOGS / f"audit-{os.getpid()}.jsonl"
"""What all audited engines of this test run write."""

PLAIN = VllmConfig(gpu_blocks=100, max_model_len=2048)
"""vLLM without Greenroom, whose answers are the right ones."""

AUDITED = VllmConfig(
    gpu_blocks=160,
    max_model_len=2048,
    connector=Connector("AuditingConnector", "real_vllm.auditing"),
    env=(("PYTHONPATH", str(Path(__file__).parents[1])), ("GREENROOM_AUDIT", str(AUDIT_LOG))),
)
"""vLLM with Greenroom, watched: see `auditing`."""

STOCK = VllmConfig(gpu_blocks=400)
"""vLLM with Greenroom as users have it."""

PATIENT: dict[str, Any] = {"lookup_wait_ms": 10_000}
"""A lookup that is not answered in time is a miss: where a hit is expected, a busy machine must not spoil it."""
