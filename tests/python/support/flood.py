"""Prompts that no one else has, and other agents that take the KV pool."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from support.completions import Ask, Completion
from support.make_model import PRESETS, SPECIAL_TOKENS
from support.servers import VllmServer

LOWEST_TOKEN = len(SPECIAL_TOKENS)
HIGHEST_TOKEN = PRESETS["tiny"].vocab - 1
FLOOD_MAX_TOKENS = 16
"""Long enough that all requests of a flood run, and hold their blocks, at the same time."""
FLOODS_MAX = 5
CANARY_BLOCKS = 2


def prompt(name: str, tokens: int, seed: int = 0) -> list[int]:
    """`tokens` random token ids that depend on `name` and `seed` only."""
    rng = random.Random(f"{seed}/{name}")
    return [rng.randint(LOWEST_TOKEN, HIGHEST_TOKEN) for _ in range(tokens)]


def blocks_of(tokens: int, block_size: int = 32) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // block_size)


def together(server: VllmServer, asks: Sequence[Ask], timeout_s: float = 300) -> list[Completion]:
    """Sends all at once and waits for all of them."""
    with ThreadPoolExecutor(max(len(asks), 1)) as pool:
        return list(pool.map(lambda ask: server.ask(ask, timeout_s), asks))


def flood_asks(
    server: VllmServer, agents: int, name: str, seed: int = 0, max_tokens: int = FLOOD_MAX_TOKENS, spare: int = 1
) -> list[Ask]:
    """Turns of `agents` agents that together need the whole pool but for a few blocks, `spare` for each.

    Agents that were here before load their turns. The last of them may only do so if there are blocks left for all of
    them to grow: where answers are longer than a block, it takes more than one each.
    """
    blocks = (server.config.gpu_blocks - 1 - agents * spare) // agents
    tokens = blocks * server.config.block_size - max_tokens
    names = [f"{name}-{agent}" for agent in range(agents)]
    return [Ask(prompt(each, tokens, seed), max_tokens, session=each) for each in names]


def flood(
    server: VllmServer,
    agents: int = 2,
    name: str = "flood",
    seed: int = 0,
    max_tokens: int = FLOOD_MAX_TOKENS,
    spare: int = 1,
) -> None:
    """Other agents run turns at the same time, then a short one: whatever else was in the pool is evicted.

    They come in one request, so that they hold the pool at one moment, on however busy a machine: what a session holds
    without a reference would else outlive them. That others' blocks are gone a canary shows, whose turn is the last
    before theirs: when it comes again, the GPU has nothing of it.
    """
    canary = Ask(prompt(f"{name}-canary", CANARY_BLOCKS * server.config.block_size + 1, seed), 1)
    for attempt in range(FLOODS_MAX):
        server.ask(canary)
        asks = flood_asks(server, agents, f"{name}-{attempt}", seed, max_tokens << attempt, spare)
        server.ask_at_once([ask.prompt for ask in asks], max_tokens << attempt)
        blocks = 2 * (agents * spare + 1)
        sweep = prompt(f"{name}-{attempt}-sweep", blocks * server.config.block_size, seed)
        server.ask(Ask(sweep, 1, session=f"{name}-sweep"))
        before = server.found_on_gpu()
        server.ask(canary)
        if server.found_on_gpu() == before:
            return
    raise AssertionError(f"{FLOODS_MAX} floods did not evict what had come just before them")
