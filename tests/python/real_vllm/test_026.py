"""vLLM 0.26.0, the oldest release that Greenroom supports: saves, evicts, reloads with and without a hint."""

from __future__ import annotations

from typing import Any

from real_vllm import steps
from real_vllm.rigs import OLD, PATIENT
from support.completions import Ask
from support.engines import Engines
from support.flood import prompt

BLOCKS = 20


def agent(name: str) -> Ask:
    """This release knows no session id of its own."""
    extra: dict[str, Any] = {"kv_transfer_params": {"session_id": name}}
    return Ask(prompt(name, steps.tokens_of(BLOCKS)), session=name, extra=extra)


def test_the_oldest_release_saves_and_reloads(engines: Engines) -> None:
    steps.both_ways_back(*engines.both(OLD, OLD, **PATIENT), agent("reactive"), agent("hinted"))
