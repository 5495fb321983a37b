"""A quantised KV cache: its blocks are smaller, and bytes like any others."""

from __future__ import annotations

import dataclasses

import pytest

from real_vllm import steps
from real_vllm.audit import Follower
from real_vllm.rigs import AUDITED, PATIENT, PLAIN
from support.engines import Engines
from support.make_model import kv_bytes_per_token, processor_has
from support.servers import model_folder

FP8 = ("--kv-cache-dtype", "fp8")
PLAIN_FP8 = dataclasses.replace(PLAIN, args=FP8)
AUDITED_FP8 = dataclasses.replace(AUDITED, args=FP8)
BLOCKS = 20


@pytest.mark.skipif(
    not processor_has("avx512f", "amx_tile"), reason="vLLM's CPU build has an fp8 KV cache with AVX-512 or AMX only"
)
def test_quantised_kv_comes_back(engines: Engines, witness: Follower) -> None:
    plain, rig = engines.both(PLAIN_FP8, AUDITED_FP8, **PATIENT)
    steps.wait_connected(rig.sidecar)
    (engine,) = rig.sidecar.get("/v1/status")["engines"]
    assert engine["slot_bytes"] * 4 == kv_bytes_per_token(model_folder(PLAIN_FP8.model)) * steps.BLOCK, "of float32"
    steps.both_ways_back(plain, rig, steps.agent("reactive-fp8", BLOCKS), steps.agent("hinted-fp8", BLOCKS))
    assert not witness.audit().problems
