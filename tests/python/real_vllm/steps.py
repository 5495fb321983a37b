"""What several tests do: a turn that is saved, a pool that is taken by others, an agent whose KV comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from real_vllm.rigs import PLAIN
from support.completions import Ask, Completion
from support.engines import Engines
from support.flood import flood, prompt
from support.process import wait_until
from support.servers import Rig, Sidecar, VllmServer

BLOCK = 32
SAVED_S = 30
READY_S = 30
CONNECTED_S = 30
LEFT_MAX = 3
"""Blocks that a flood spares, and that a session that is held may keep."""
QUIET_S = 1.0
QUIET_WAIT_S = 60


def tokens_of(blocks: int) -> int:
    """So many blocks and a little more: the last token is never at a block's end."""
    return blocks * BLOCK + 5


def agent(name: str, blocks: int, seed: int = 0, **more: Any) -> Ask:
    """A turn of a session that nobody else shares a block with."""
    return Ask(prompt(name, tokens_of(blocks), seed), session=name, **more)


def right(engines: Engines, *asks: Ask) -> list[list[int]]:
    """What plain vLLM answers to these prompts."""
    plain = engines.plain(PLAIN)
    return [plain.ask(Ask(ask.prompt, ask.max_tokens)).tokens for ask in asks]


def blocks_on(sidecar: Sidecar, session: str, tier: str) -> int:
    """Leading blocks of the session there: `gpu`, as far as its engine has told, or `host`."""
    known = sidecar.session(session)
    return 0 if known is None else int(known["blocks"][tier])


def wait_saved(rig: Rig, session: str, blocks: int) -> None:
    wait_until(f"saving {session}", lambda: blocks_on(rig.sidecar, session, "host") >= blocks, SAVED_S)


def wait_back(rig: Rig, session: str, blocks: int) -> None:
    def back() -> bool:
        known = rig.sidecar.session(session)
        return known is not None and known["state"] == "ready" and known["blocks"]["gpu"] >= blocks

    wait_until(f"{session} back on the GPU", back, READY_S)


def wait_quiet(what: str, figure: Callable[[], float]) -> None:
    """Returns when this figure has not moved for a while."""
    last = (figure(), time.monotonic())

    def quiet() -> bool:
        nonlocal last
        now = (figure(), time.monotonic())
        if now[0] != last[0]:
            last = now
        return now[1] - last[1] > QUIET_S

    wait_until(what, quiet, QUIET_WAIT_S)


def wait_connected(sidecar: Sidecar, workers: int = 1) -> None:
    """An engine is there, and all of its workers have the arena."""

    def connected() -> bool:
        engines = sidecar.get("/v1/status")["engines"]
        return len(engines) == 1 and engines[0]["workers"] == workers

    wait_until("the engine's connection", connected, CONNECTED_S)


def first_turn(rig: Rig, ask: Ask) -> Completion:
    """A turn whose full blocks are in the arena when this returns."""
    answer = rig.vllm.ask(ask)
    assert ask.session is not None
    wait_saved(rig, ask.session, len(ask.prompt) // BLOCK)
    return answer


def evict(rig: Rig, name: str) -> None:
    """Others take the whole pool."""
    flood(rig.vllm, 3, name)


def both_ways_back(plain: VllmServer, rig: Rig, reactive: Ask, hinted: Ask) -> None:
    """KV of two sessions is saved and evicted; one's is back with its request, the other's before it."""
    expected = [plain.ask(Ask(ask.prompt, ask.max_tokens)).tokens for ask in (reactive, hinted)]
    first = [first_turn(rig, ask) for ask in (reactive, hinted)]
    assert [answer.cached_tokens for answer in first] == [0, 0]
    assert [answer.tokens for answer in first] == expected

    blocks = len(reactive.prompt) // BLOCK
    evict(rig, "one")
    before = rig.vllm.loaded()
    answer = rig.vllm.ask(reactive)
    assert (answer.tokens, answer.cached_tokens) == (expected[0], blocks * BLOCK)
    assert rig.vllm.loaded() - before == blocks * BLOCK

    blocks = len(hinted.prompt) // BLOCK
    rig.sidecar.post(f"/v1/sessions/{hinted.session}/tool_start", {"tool": "bash"})
    fetched = rig.vllm.brought_back()
    evict(rig, "two")
    rig.sidecar.post(f"/v1/sessions/{hinted.session}/tool_end", {})
    wait_back(rig, str(hinted.session), blocks)
    assert rig.vllm.brought_back() - fetched >= blocks - LEFT_MAX
    before = rig.vllm.loaded()
    answer = rig.vllm.ask(hinted)
    assert (answer.tokens, answer.cached_tokens) == (expected[1], blocks * BLOCK)
    assert rig.vllm.loaded() == before
