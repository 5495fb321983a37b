"""LoRA: the same prompt has other KV under each adapter, and each gets its own back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from real_vllm import steps
from real_vllm.audit import Follower
from real_vllm.rigs import ADAPTERS, AUDITED_LORA, PATIENT, PLAIN_LORA
from support.completions import MODEL_NAME, Ask, Completion
from support.engines import Engines
from support.flood import prompt, together
from support.make_model import PRESETS, make_adapter
from support.process import wait_until
from support.servers import Rig

NAMES = (MODEL_NAME, *ADAPTERS)
BLOCKS = 20
WHOLE = BLOCKS * steps.BLOCK


@pytest.fixture(scope="module")
def adapters() -> None:
    """They are there before an engine looks for them."""
    for seed, folder in enumerate(ADAPTERS.values(), start=2):
        make_adapter(folder, PRESETS[AUDITED_LORA.model], seed)


@pytest.fixture
def rig(adapters: None, engines: Engines, witness: Follower) -> Iterator[Rig]:
    _, made = engines.both(PLAIN_LORA, AUDITED_LORA, **PATIENT)
    yield made
    assert not witness.audit().problems


def under_each(name: str, models: Iterable[str] = NAMES) -> list[Ask]:
    """One prompt under the model itself and under its adapters, each in a session of its own."""
    tokens = prompt(name, steps.tokens_of(BLOCKS))
    return [Ask(tokens, session=f"{name}-{model}", model=model) for model in models]


def right(engines: Engines, asks: list[Ask]) -> list[list[int]]:
    """What vLLM with the same adapters answers without Greenroom: to each something else."""
    plain = engines.plain(PLAIN_LORA)
    answers = [plain.ask(Ask(ask.prompt, ask.max_tokens, model=ask.model)).tokens for ask in asks]
    assert all(one != other for one in answers for other in answers if one is not other), answers
    return answers


def first_turn(rig: Rig, ask: Ask) -> Completion:
    """Then the session waits for a person: nothing of it is held on the GPU, and nothing brought back on suspicion."""
    answer = steps.first_turn(rig, ask)
    rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_start", {"tool": "AskUserQuestion"})
    return answer


def slots_used(rig: Rig) -> int:
    return int(rig.sidecar.get("/v1/status")["tiers"]["host"]["slots_used"])


def test_each_adapter_gets_its_own_back(rig: Rig, engines: Engines) -> None:
    asks = under_each("apart")
    expected = right(engines, asks)
    steps.wait_connected(rig.sidecar)
    before = slots_used(rig)
    first = [first_turn(rig, ask) for ask in asks]
    assert [answer.cached_tokens for answer in first] == [0] * len(NAMES)
    assert [answer.tokens for answer in first] == expected
    assert slots_used(rig) - before == BLOCKS * len(NAMES)

    steps.evict(rig, "apart-flood")
    for ask, tokens in zip(asks, expected, strict=True):
        loaded = rig.vllm.loaded()
        answer = rig.vllm.ask(ask)
        assert (answer.tokens, answer.cached_tokens) == (tokens, WHOLE)
        assert rig.vllm.loaded() - loaded == WHOLE


def test_adapters_that_come_at_once_are_kept_apart(rig: Rig, engines: Engines) -> None:
    # Not the model itself: in a batch with adapters vLLM's CPU build computes it with the last of them (index -1).
    asks = under_each("at-once", ADAPTERS)
    expected = right(engines, asks)
    first = together(rig.vllm, asks)
    assert [(answer.tokens, answer.cached_tokens) for answer in first] == [(tokens, 0) for tokens in expected]
    for ask in asks:
        steps.wait_saved(rig, str(ask.session), BLOCKS)
    steps.evict(rig, "at-once-flood")
    before = rig.vllm.loaded()
    again = together(rig.vllm, asks)
    assert [(answer.tokens, answer.cached_tokens) for answer in again] == [(tokens, WHOLE) for tokens in expected]
    assert rig.vllm.loaded() - before >= (WHOLE - steps.LEFT_MAX * steps.BLOCK) * len(asks)


def test_a_hint_brings_back_what_its_session_ran_under(rig: Rig, engines: Engines, witness: Follower) -> None:
    asks = dict(zip(NAMES, under_each("hinted-adapter"), strict=True))
    expected = dict(zip(NAMES, right(engines, list(asks.values())), strict=True))
    for ask in asks.values():
        first_turn(rig, ask)
    steps.evict(rig, "hinted-adapter-flood")
    fetched = witness.audit().count("prefetch")
    rig.sidecar.post(f"/v1/sessions/{asks['a'].session}/tool_end", {})
    wait_until("the fetch", lambda: witness.audit().count("prefetch") - fetched == BLOCKS, steps.READY_S)
    # What is back on the GPU answers to its own adapter only: the others have to load.
    for model, loads in {"b": WHOLE, MODEL_NAME: WHOLE, "a": 0}.items():
        before = rig.vllm.loaded()
        answer = rig.vllm.ask(asks[model])
        assert (answer.tokens, answer.cached_tokens) == (expected[model], WHOLE)
        assert rig.vllm.loaded() - before == loads
