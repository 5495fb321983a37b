"""Processes are killed in the middle of copies to the GPU. Last: nothing works after that."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from gpu import moves, swaps
from gpu.moves import Agent, Judge
from gpu.pair import Pair, Record
from support.process import wait_until

CAUGHT_TRIES = 30
DRAINED_S = 20
ENDED_S = 30


def catch_loading(pair: Pair, groups: swaps.Groups) -> int:
    """Brings the groups back in turns until one is seen on its way: returns in the middle of its copies, with how many
    groups were tried before."""
    url = pair.rig.sidecar.url
    for turn in range(CAUGHT_TRIES):
        group = groups[turn % 2]
        swaps.bring_back(url, group)

        def seen(group: tuple[str, ...] = tuple(group)) -> bool:
            return moves.state(pair.rig, group[-1]) in ("loading", "ready")

        wait_until("the last session's copies", seen, moves.WAIT_S, poll_s=0.0005)
        if moves.state(pair.rig, group[-1]) == "loading":
            return turn
        swaps.wait_back(url, group)
        swaps.send_waiting(url, group)
    raise AssertionError(f"{CAUGHT_TRIES} groups came back and none was seen on its way")


def leased(pair: Pair) -> int:
    host = pair.rig.sidecar.get("/v1/status")["tiers"]["host"]
    return int(host["slots_leased"]) + int(host["slots_draining"])


@pytest.fixture
def agents(pair: Pair) -> list[Agent]:
    """Evicted."""
    made = [moves.two_turns(pair, f"survivor-{number}") for number in range(pair.sizes.agents)]
    moves.evict(pair)
    return made


def test_requests_outlive_the_sidecar(pair: Pair, agents: list[Agent], groups: swaps.Groups, record: Record) -> None:
    tried = catch_loading(pair, groups)
    with ThreadPoolExecutor(len(agents)) as pool:
        answers = pool.map(lambda agent: pair.rig.vllm.ask(agent.second), agents)
        pair.rig.sidecar.kill()
        got = list(answers)
    judge = Judge(pair)
    for agent, answer in zip(agents, got, strict=True):
        assert len(answer.tokens) == agent.second.max_tokens
        judge.look(agent.name, agent.tokens, answer.tokens)
    record(sidecar_killed={"answers": len(got), "cached": [one.cached_tokens for one in got], "swaps_before": tried})
    judge.check()
    # Its memory is registered anew while the engine runs, and used.
    pair.rig.sidecar.start()
    moves.wait_connected(pair.rig)
    agent = moves.two_turns(pair, "after-the-sidecar")
    moves.evict(pair)
    before = pair.rig.vllm.loaded()
    answer = pair.rig.vllm.ask(agent.second)
    assert answer.tokens == agent.right.tokens
    assert pair.rig.vllm.loaded() - before >= 0.9 * moves.whole(pair, agent.tokens)


def test_slots_come_back_when_the_engine_dies(pair: Pair, groups: swaps.Groups, record: Record) -> None:
    tried = catch_loading(pair, groups)
    during = leased(pair)
    pair.rig.vllm.signal_member("EngineCore")
    wait_until("the end of all leases", lambda: leased(pair) == 0, DRAINED_S, poll_s=0.01)
    wait_until("the engine's leave", lambda: not pair.rig.sidecar.get("/v1/status")["engines"], ENDED_S)
    record(engine_killed={"leased_before": during, "swaps_before": tried})
    assert during > 0, "nothing was leased when it died"
    for session in groups[0]:
        assert moves.state(pair.rig, session) in ("host", "dropped"), session
