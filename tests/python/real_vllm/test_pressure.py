"""More waiting sessions than the pool holds; who shares KV with whom; how a request says whose it is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from real_vllm import steps
from real_vllm.audit import Follower
from real_vllm.harness import hints
from real_vllm.rigs import AUDITED, PATIENT
from support.completions import MODEL_NAME, Ask
from support.engines import Engines
from support.flood import prompt
from support.process import wait_until
from support.rest import call, raw
from support.servers import Rig

SESSIONS = 12
BLOCKS = 30
"""Blocks of each session: together more than twice the pool."""
SMALL = "2MiB"
"""An arena that others fill with less than half of the pool."""


@pytest.fixture
def rig(engines: Engines, witness: Follower) -> Iterator[Rig]:
    yield engines.greenroom(AUDITED, **PATIENT)
    assert not witness.audit().problems


@pytest.fixture
def crowd(rig: Rig) -> Iterator[list[Ask]]:
    """Waiting sessions that exceed the pool by far; each has had its first turn and is in the arena."""
    assert 2 * AUDITED.gpu_blocks < SESSIONS * BLOCKS
    asks = [steps.agent(f"crowd-{number}", BLOCKS) for number in range(SESSIONS)]
    for ask in asks:
        steps.first_turn(rig, ask)
        rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_start", {"tool": "make", "eta_ms": 600_000})
    yield asks
    for ask in asks:
        raw("DELETE", f"{rig.sidecar.url}/v1/sessions/{ask.session}")


def test_hints_for_more_than_fits_are_answered_truly(
    rig: Rig, crowd: list[Ask], engines: Engines, witness: Follower
) -> None:
    def wait_settled() -> None:
        """Who is back stays: sessions that push each other out never get there."""
        steps.wait_quiet("the end of copies", lambda: len(witness.audit().spans))

    wait_settled()
    before = witness.audit().count("prefetch")
    results = hints(rig.sidecar, "all-at-once", *[("kv.prefetch", str(ask.session)) for ask in crowd])
    outcomes = [result["outcome"] for result in results]
    assert set(outcomes) <= {"accepted", "clipped", "deferred"}, outcomes
    assert {"clipped", "deferred"} & set(outcomes), outcomes
    wait_settled()
    fetched = witness.audit().count("prefetch") - before
    assert fetched <= AUDITED.gpu_blocks, "what had just been fetched was fetched again"
    # All of them come at once, and none waits for ever.
    with ThreadPoolExecutor(SESSIONS) as pool:
        answers = list(pool.map(lambda ask: rig.vllm.ask(ask, 120), crowd))
    assert [answer.tokens for answer in answers] == steps.right(engines, *crowd)
    whole = BLOCKS * steps.BLOCK
    assert [answer.cached_tokens for answer in answers] == [whole] * SESSIONS


def test_a_session_that_is_due_is_served(rig: Rig, crowd: list[Ask]) -> None:
    for ask in (crowd[0], crowd[SESSIONS // 2]):
        steps.evict(rig, f"before-{ask.session}")
        rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_end", {})
        steps.wait_back(rig, str(ask.session), BLOCKS)
        before = rig.vllm.loaded()
        answer = rig.vllm.ask(ask)
        assert (answer.cached_tokens, rig.vllm.loaded() - before) == (BLOCKS * steps.BLOCK, 0)


def test_a_salt_keeps_prompts_apart(rig: Rig) -> None:
    tokens = prompt("salted", steps.tokens_of(10))

    def ask(salt: str | None) -> int:
        extra: dict[str, Any] = {} if salt is None else {"cache_salt": salt}
        return rig.vllm.ask(Ask(tokens, session=f"salt-{salt}", extra=extra)).cached_tokens

    assert ask("ours") == 0
    steps.wait_saved(rig, "salt-ours", 10)
    steps.evict(rig, "salts")
    assert ask("theirs") == 0
    assert ask(None) == 0
    steps.evict(rig, "more-salts")
    assert ask("ours") == 10 * steps.BLOCK


def test_a_prompt_that_is_wholly_in_the_arena_still_computes(rig: Rig, engines: Engines) -> None:
    ask = Ask(prompt("whole", 20 * steps.BLOCK), session="whole")
    steps.first_turn(rig, ask)
    steps.evict(rig, "whole-flood")
    before = rig.vllm.loaded()
    answer = rig.vllm.ask(ask)
    # The last token must be computed, and vLLM computes its whole block.
    assert (answer.cached_tokens, rig.vllm.loaded() - before) == (19 * steps.BLOCK, 19 * steps.BLOCK)
    assert [answer.tokens] == steps.right(engines, ask)


@pytest.mark.parametrize(
    ("session", "more"),
    [
        ("by-params", {"extra": {"kv_transfer_params": {"session_id": "by-params"}}}),
        ("by-header", {"session": "by-header"}),
        ("by-body", {"extra": {"session_id": "by-body"}}),
        ("by-both", {"session": "not-this", "extra": {"kv_transfer_params": {"session_id": "by-both"}}}),
        ("job7", {"request_id": "batchagent:job7:turn:3"}),
    ],
)
def test_a_request_says_whose_it_is(rig: Rig, session: str, more: dict[str, Any]) -> None:
    rig.vllm.ask(Ask(prompt(session, 100), max_tokens=2, **more))
    known = rig.sidecar.session(session)
    assert known is not None
    assert known["turns"] == 1
    assert rig.sidecar.session("not-this") is None


def test_a_message_by_anthropics_route_says_whose_it_is(rig: Rig) -> None:
    body = {"model": MODEL_NAME, "max_tokens": 2, "messages": [{"role": "user", "content": "bash, please"}]}
    call("POST", f"{rig.vllm.url}/v1/messages", body, {"X-Session-ID": "by-message"})
    known = rig.sidecar.session("by-message")
    assert known is not None
    assert known["turns"] == 1


def test_a_request_that_says_nothing_joins_the_longest_prefix(rig: Rig) -> None:
    def turns() -> dict[str, int]:
        return {one["id"]: one["turns"] for one in rig.sidecar.get("/v1/sessions")["sessions"]}

    before = turns()
    start = prompt("nameless", 6 * steps.BLOCK)
    rig.vllm.ask(Ask(start, max_tokens=2))
    rig.vllm.ask(Ask(start[: 4 * steps.BLOCK] + prompt("another way", 70), max_tokens=2))
    rig.vllm.ask(Ask([*start, *prompt("goes on", 50)], max_tokens=2))
    new = {name: count - before.get(name, 0) for name, count in turns().items() if count != before.get(name, 0)}
    assert sorted(new.values()) == [1, 2], new


def test_hints_that_come_with_a_request_are_acted_on(rig: Rig) -> None:
    waiting = steps.agent("hinted-by-another", 10)
    steps.first_turn(rig, waiting)
    steps.evict(rig, "hinted-flood")
    fetched = rig.vllm.brought_back()
    action = {
        "action_id": "1",
        "action_type": "kv.prefetch",
        "action_version": "1.0",
        "payload": {"target": {"session_id": waiting.session}},
    }
    envelope = {"protocol_version": "1.0", "message_id": "with-a-request", "actions": [action]}
    extra = {"kv_transfer_params": {"session_id": "the-other", "kv_hints": envelope}}
    rig.vllm.ask(Ask(prompt("the-other", 50), max_tokens=2, extra=extra))
    steps.wait_back(rig, str(waiting.session), 10)
    assert rig.vllm.brought_back() - fetched >= 10 - steps.LEFT_MAX
    before = rig.vllm.loaded()
    assert rig.vllm.ask(waiting).cached_tokens == 10 * steps.BLOCK
    assert rig.vllm.loaded() == before


def test_batchagent_prefetches_its_job(rig: Rig) -> None:
    ask = Ask(prompt("job8", steps.tokens_of(10)), request_id="batchagent:job8:turn:1")
    rig.vllm.ask(ask)
    steps.wait_saved(rig, "job8", 10)
    steps.evict(rig, "batchagent-flood")
    fetched = rig.vllm.brought_back()
    hint = {"job_id": "job8", "kv_key": "key8", "eta_seconds": 0}
    answer = rig.sidecar.post("/internal/prefetch", {"hints": [hint], "kv_keys": ["unknown"]})
    assert answer["missing"] == ["unknown"]
    assert len(answer["prefetched"]["key8"]) > 0
    steps.wait_back(rig, "job8", 10)
    assert rig.vllm.brought_back() - fetched >= 10 - steps.LEFT_MAX


def test_a_retired_session_is_freed_everywhere(rig: Rig) -> None:
    ask = steps.agent("retired", 10)
    steps.first_turn(rig, ask)
    steps.evict(rig, "retired-flood")
    status, _ = raw("DELETE", f"{rig.sidecar.url}/v1/sessions/retired")
    assert status == 200
    assert rig.sidecar.session("retired") is None
    assert rig.vllm.ask(ask).cached_tokens == 0


@pytest.fixture
def small(rig: Rig) -> Iterator[Rig]:
    """The same engine with a small arena."""
    memory = rig.sidecar.memory
    rig.sidecar.restart(SMALL)
    steps.wait_connected(rig.sidecar)
    yield rig
    rig.sidecar.restart(memory)
    steps.wait_connected(rig.sidecar)


def test_pinned_blocks_are_still_there(small: Rig) -> None:
    rig = small

    def wait_evicted(session: str) -> None:
        """Others have taken the pool, and their blocks this session's place in the arena."""
        steps.evict(rig, f"instead-of-{session}")
        wait_until(f"eviction of {session}", lambda: steps.blocks_on(rig.sidecar, session, "host") == 0, steps.SAVED_S)

    # The pinned one is the older of the two: it would have to go first.
    ask, other = steps.agent("pinned", 10), steps.agent("not-pinned", 10)
    steps.first_turn(rig, ask)
    (result,) = hints(rig.sidecar, "pin-it", ("kv.pin", "pinned"))
    assert (result["outcome"], result["blocks"]) == ("accepted", 10)
    steps.first_turn(rig, other)
    wait_evicted("not-pinned")
    known = rig.sidecar.session("pinned")
    assert known is not None
    assert (known["blocks"]["host"], known["blocks"]["pinned"]) == (10, 10)
    before = rig.vllm.loaded()
    assert rig.vllm.ask(other).cached_tokens == 0
    assert rig.vllm.ask(ask).cached_tokens == 10 * steps.BLOCK
    assert rig.vllm.loaded() - before == 10 * steps.BLOCK

    (result,) = hints(rig.sidecar, "unpin-it", ("kv.unpin", "pinned"))
    assert result["outcome"] == "accepted"
    wait_until("no pins", lambda: rig.sidecar.get("/v1/status")["tiers"]["host"]["slots_pinned"] == 0, 5)
    wait_evicted("pinned")
