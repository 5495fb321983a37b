"""First of all: KV that went to the arena and back on a GPU, with graphs, gives the very same tokens."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpu import moves, swaps
from gpu.moves import Agent, Judge
from gpu.pair import Pair, Record
from gpu.sizes import Sizes
from support.completions import Completion
from support.flood import prompt
from support.process import wait_until

CAPTURED = "Graph capturing finished"
"""In vLLM's log, when it decodes in graphs."""
SWAPS_MIN = 2
ROUNDS_MAX = 20
COMPARED_MIN = 100
"""Tokens for each stream that ends at a near tie."""


@pytest.fixture(scope="module")
def agents(pair: Pair) -> list[Agent]:
    return [moves.two_turns(pair, f"agent-{number}") for number in range(pair.sizes.agents)]


def test_both_servers_decode_in_graphs(pair: Pair) -> None:
    if pair.sizes.config.cuda is None:
        pytest.skip("tried on the CPU build, which has no graphs")
    for server in (pair.plain, pair.rig.vllm):
        assert CAPTURED in server.log.read_text(errors="replace"), f"{server.log} does not say {CAPTURED!r}"


def test_a_request_that_loads_says_the_same(pair: Pair, agents: list[Agent]) -> None:
    moves.evict(pair)
    for agent in agents:
        before = pair.rig.vllm.loaded()
        answer = pair.rig.vllm.ask(agent.second)
        expected = moves.whole(pair, agent.tokens)
        assert answer.cached_tokens == expected
        # The flood may leave a few blocks of the agent that it evicts last.
        assert pair.rig.vllm.loaded() - before >= 0.9 * expected, f"{agent.name} was not evicted"
        assert answer.tokens == agent.right.tokens, agent.name


def test_a_request_after_a_hint_says_the_same(pair: Pair, agents: list[Agent]) -> None:
    rig = pair.rig
    for agent in agents:
        # Some may come back before the tool's end: Greenroom expects it.
        count = pair.rig.vllm.brought_back() + pair.sizes.blocks_of(len(agent.tokens)) - moves.FLOOD_LEAVES
        rig.sidecar.post(f"/v1/sessions/{agent.name}/tool_start", {"tool": "bash"})
        moves.evict(pair)
        rig.sidecar.post(f"/v1/sessions/{agent.name}/tool_end", {})
        moves.wait_back(rig, agent.name)
        before = rig.vllm.loaded()
        answer = rig.vllm.ask(agent.second)
        assert answer.cached_tokens == moves.whole(pair, agent.tokens)
        assert rig.vllm.loaded() == before, f"the request of {agent.name} had to load"
        assert answer.tokens == agent.right.tokens, agent.name
        wait_counted(pair, count)


def wait_counted(pair: Pair, blocks: float) -> None:
    wait_until("the count of blocks that came back", lambda: pair.rig.vllm.brought_back() >= blocks, moves.WAIT_S)


def test_plain_vllm_says_so_too(pair: Pair, agents: list[Agent], record: Record) -> None:
    judge = Judge(pair)
    for agent in agents:
        judge.look(agent.name, agent.tokens, agent.right.tokens)
    record(judged={"tokens": judge.tokens, "near_ties": judge.near_ties, "wrong": judge.wrong})
    judge.check()


def streams(pair: Pair, name: str, count: int) -> list[Completion]:
    """Some decode streams at the same time."""
    sizes = pair.sizes
    asks = [
        moves.ask(f"{name}-{number}", prompt(f"{name}-{number}", sizes.stream_tokens), stream_answer(sizes), logprobs=2)
        for number in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(pair.rig.vllm.ask, asks))


def agreement(expected: Completion, got: Completion) -> int:
    """Tokens before the first that is another one."""
    both = zip(expected.tokens, got.tokens, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], both))


def stream_answer(sizes: Sizes) -> int:
    """So many tokens that several swaps go on meanwhile, and no more blocks than the pool has for streams."""
    return 8 * sizes.answer_tokens


def test_swaps_beside_decoding_change_nothing(pair: Pair, groups: swaps.Groups, record: Record) -> None:
    """Alone the stream runs in the same graph every time. Together their kernels depend on who came first: there a
    token may change where the two best are close, and the rest of that stream is another text."""
    for number in ("alone", "together"):
        streams(pair, number, 1 if number == "alone" else pair.sizes.streams)
    right = {"alone": streams(pair, "alone", 1), "together": streams(pair, "together", pair.sizes.streams)}
    compared = near = 0
    with swaps.Swapper(pair.rig.sidecar.url, groups) as swapper:
        swapper.start()
        for _ in range(ROUNDS_MAX):
            assert streams(pair, "alone", 1)[0].tokens == right["alone"][0].tokens
            compared += len(right["alone"][0].tokens)
            for expected, got in zip(right["together"], streams(pair, "together", pair.sizes.streams), strict=True):
                same = agreement(expected, got)
                compared += same
                if same < len(expected.tokens):
                    margin = expected.margins()[same]
                    assert margin < pair.sizes.near_tie, f"token {same} is another one, its margin is {margin:.3f}"
                    assert got.tokens[same] in expected.top[same], f"token {same} is none of the two best"
                    near += 1
            if swapper.swaps() >= SWAPS_MIN:
                break
        swapped = swapper.swaps()
        swapper.stop()
    record(streams_beside_swaps={"tokens_compared": compared, "ended_at_near_ties": near, "swaps": swapped})
    assert compared >= COMPARED_MIN * near, f"{compared} tokens before {near} near ties prove little"
    assert swapped >= SWAPS_MIN, f"{swapped} swaps beside {compared} tokens prove nothing"
