"""Tensor parallelism: a slot holds the shards of both ranks, and each rank gets its own back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from real_vllm import steps
from real_vllm.audit import Follower
from real_vllm.rigs import AUDITED_TWO_RANKS, PATIENT, PLAIN_TWO_RANKS, RANKS
from support.completions import Ask
from support.engines import Engines
from support.flood import together
from support.make_model import kv_bytes_per_token
from support.process import wait_until
from support.servers import Rig, model_folder

BLOCKS = 20
WHOLE = BLOCKS * steps.BLOCK


@pytest.fixture
def rig(engines: Engines, witness: Follower) -> Iterator[Rig]:
    _, made = engines.both(PLAIN_TWO_RANKS, AUDITED_TWO_RANKS, **PATIENT)
    yield made
    assert not witness.audit().problems


def right(engines: Engines, *asks: Ask) -> list[list[int]]:
    """What two ranks answer without Greenroom."""
    plain = engines.plain(PLAIN_TWO_RANKS)
    return [plain.ask(Ask(ask.prompt, ask.max_tokens)).tokens for ask in asks]


def ask_person(rig: Rig, ask: Ask) -> None:
    """The session waits for a person: nothing of it is held on the GPU, and nothing brought back on suspicion."""
    rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_start", {"tool": "AskUserQuestion"})


def test_a_slot_has_room_for_both_ranks(rig: Rig) -> None:
    steps.wait_connected(rig.sidecar, RANKS)
    (engine,) = rig.sidecar.get("/v1/status")["engines"]
    assert (engine["workers"], engine["ranks"]) == (RANKS, RANKS)
    assert engine["slot_bytes"] == kv_bytes_per_token(model_folder(AUDITED_TWO_RANKS.model)) * steps.BLOCK


def test_both_ranks_save_and_reload(rig: Rig, engines: Engines, witness: Follower) -> None:
    reactive, hinted = steps.agent("two-reactive", BLOCKS), steps.agent("two-hinted", BLOCKS)
    expected = right(engines, reactive, hinted)
    for ask, tokens in zip((reactive, hinted), expected, strict=True):
        saved = witness.audit().saved_blocks
        answer = steps.first_turn(rig, ask)
        assert (answer.tokens, answer.cached_tokens) == (tokens, 0)
        # What the sidecar calls saved, both ranks had reported: the witness counts no other.
        assert witness.audit().saved_blocks - saved == BLOCKS
        ask_person(rig, ask)

    steps.evict(rig, "two-one")
    demanded, before = witness.audit().count("demand"), rig.vllm.loaded()
    answer = rig.vllm.ask(reactive)
    assert (answer.tokens, answer.cached_tokens) == (expected[0], WHOLE)
    assert rig.vllm.loaded() - before == WHOLE
    assert witness.audit().count("demand") - demanded == BLOCKS

    steps.evict(rig, "two-two")
    fetched = witness.audit().count("prefetch")
    rig.sidecar.post(f"/v1/sessions/{hinted.session}/tool_end", {})
    wait_until("the fetch", lambda: witness.audit().count("prefetch") - fetched == BLOCKS, steps.READY_S)
    before = rig.vllm.loaded()
    answer = rig.vllm.ask(hinted)
    assert (answer.tokens, answer.cached_tokens) == (expected[1], WHOLE)
    assert rig.vllm.loaded() == before


def test_more_than_fits_comes_back_at_once(rig: Rig, engines: Engines) -> None:
    asks = [steps.agent(f"two-crowd-{number}", BLOCKS) for number in range(8)]
    assert len(asks) * (BLOCKS + 1) > AUDITED_TWO_RANKS.gpu_blocks
    expected = right(engines, *asks)
    for ask in asks:
        steps.first_turn(rig, ask)
    steps.evict(rig, "two-crowd-flood")
    answers = together(rig.vllm, asks)
    assert [answer.tokens for answer in answers] == expected
    assert [answer.cached_tokens for answer in answers] == [WHOLE] * len(asks)
