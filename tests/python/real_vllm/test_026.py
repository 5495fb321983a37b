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
    reactive, hinted = agent("reactive"), agent("hinted")
    plain, rig = engines.both(OLD, OLD, **PATIENT)
    expected = [plain.ask(Ask(ask.prompt, ask.max_tokens)).tokens for ask in (reactive, hinted)]
    first = [steps.first_turn(rig, ask) for ask in (reactive, hinted)]
    assert [answer.cached_tokens for answer in first] == [0, 0]
    assert [answer.tokens for answer in first] == expected
    whole = BLOCKS * steps.BLOCK

    steps.evict(rig, "one")
    before = rig.vllm.loaded()
    answer = rig.vllm.ask(reactive)
    assert (answer.tokens, answer.cached_tokens) == (expected[0], whole)
    assert rig.vllm.loaded() - before == whole

    rig.sidecar.post("/v1/sessions/hinted/tool_start", {"tool": "bash"})
    fetched = rig.vllm.brought_back()
    steps.evict(rig, "two")
    rig.sidecar.post("/v1/sessions/hinted/tool_end", {})
    steps.wait_back(rig, "hinted", BLOCKS)
    assert rig.vllm.brought_back() - fetched >= BLOCKS - steps.LEFT_MAX
    before = rig.vllm.loaded()
    answer = rig.vllm.ask(hinted)
    assert (answer.tokens, answer.cached_tokens) == (expected[1], whole)
    assert rig.vllm.loaded() == before
