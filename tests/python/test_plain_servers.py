"""Both vLLM versions start here without Greenroom and answer alike: the ground that every other test stands on."""

from __future__ import annotations

import pytest

from support.completions import Ask
from support.engines import Engines
from support.flood import flood, prompt
from support.servers import VllmConfig, VllmServer

PROMPT_TOKENS = 1000


@pytest.fixture(params=["0.32", "0.26"])
def server(request: pytest.FixtureRequest, engines: Engines) -> VllmServer:
    return engines.plain(VllmConfig(version=request.param, gpu_blocks=100, max_model_len=2048))


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
    """Tests compare tokens to find wrong KV: a model that ignores its context would let everything pass."""
    size = server.config.block_size
    whole = prompt("context", PROMPT_TOKENS)
    expected = server.ask(Ask(whole, max_tokens=16)).tokens
    unnoticed = []
    for block in range(PROMPT_TOKENS // size):
        wrong = whole[: block * size] + prompt(f"wrong-{block}", size) + whole[(block + 1) * size :]
        if server.ask(Ask(wrong, max_tokens=16)).tokens == expected:
            unnoticed.append(block)
    assert not unnoticed


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
