"""Both vLLM versions start here without Greenroom and answer alike: the ground that every other test stands on."""

from __future__ import annotations

import math

import pytest

from real_vllm.rigs import OLD, PLAIN
from support.completions import Ask, Completion
from support.engines import Engines
from support.flood import flood, prompt
from support.servers import VllmServer

PROMPT_TOKENS = 1000
MOVED_MIN = 1e-3
"""Of a log probability: a hundred times the noise of float32."""
UNNOTICED_MAX = 0.1
"""Share of the blocks whose content may leave the 16 best tokens as they are."""


@pytest.fixture(params=[OLD, PLAIN], ids=lambda config: config.version)
def server(request: pytest.FixtureRequest, engines: Engines) -> VllmServer:
    return engines.plain(request.param)


def test_prefix_cache_hits_and_flood_evicts(server: VllmServer) -> None:
    ask = Ask(prompt("plain", PROMPT_TOKENS), max_tokens=16, session="plain", logprobs=2)
    cold = server.ask(ask)
    warm = server.ask(ask)
    flood(server)
    recomputed = server.ask(ask)
    whole = PROMPT_TOKENS // server.config.block_size * server.config.block_size
    assert (cold.cached_tokens, warm.cached_tokens, recomputed.cached_tokens) == (0, whole, 0)
    assert cold.tokens == warm.tokens == recomputed.tokens
    assert len(cold.tokens) == len(cold.top) == 16
    assert min(cold.margins()) > 1e-5


def test_answer_depends_on_every_block(server: VllmServer) -> None:
    """Tests compare tokens to find wrong KV: a model that ignores its context would let everything pass.

    One wrong block moves the probabilities of the answer, whichever it is, and nearly always its best tokens.
    """
    size = server.config.block_size
    whole = prompt("context", PROMPT_TOKENS)
    blocks = range(PROMPT_TOKENS // size)
    expected = server.ask(Ask(whole, max_tokens=16, logprobs=2))
    unmoved, unnoticed = [], []
    for block in blocks:
        wrong = whole[: block * size] + prompt(f"wrong-{block}", size) + whole[(block + 1) * size :]
        answer = server.ask(Ask(wrong, max_tokens=16, logprobs=2))
        if moved(expected, answer) < MOVED_MIN:
            unmoved.append(block)
        if answer.tokens == expected.tokens:
            unnoticed.append(block)
    assert not unmoved
    assert len(unnoticed) <= UNNOTICED_MAX * len(blocks), unnoticed


def moved(one: Completion, other: Completion) -> float:
    """Largest change of a log probability at a position, before the two answers part."""
    change = 0.0
    for left, right, here, there in zip(one.top, other.top, one.tokens, other.tokens, strict=False):
        common = left.keys() & right.keys()
        change = max([change, *(abs(left[token] - right[token]) for token in common)])
        if here != there:
            return math.inf
    return change


def test_development_endpoints(server: VllmServer) -> None:
    ask = Ask(prompt("reset", PROMPT_TOKENS))
    server.ask(ask)
    assert server.reset_prefix_cache()
    assert server.ask(ask).cached_tokens == 0
    server.pause()  # drops the prefix cache, too
    server.resume()
    assert server.ask(ask).cached_tokens == 0
    assert server.preemptions() == 0


def test_signals_find_their_process(server: VllmServer) -> None:
    assert server.process is not None
    titles = [member.title for member in server.process.members()]
    assert sum("EngineCore" in title for title in titles) == 1, titles
    assert sum("Worker" in title for title in titles) == 1, titles
