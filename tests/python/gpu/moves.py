"""What these tests do to sessions: a turn that is saved, a pool taken by others, an answer judged by plain vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gpu.pair import Pair
from gpu.sizes import Sizes
from support.completions import Ask, Completion
from support.flood import flood, prompt
from support.process import wait_until
from support.servers import Rig, VllmServer

FLOOD_AGENTS, FLOOD_SPARE = 3, 3
FLOOD_LEAVES = FLOOD_AGENTS * (FLOOD_SPARE + 1)
"""Blocks of the pool, at most."""
TOOL_RESULT_TOKENS = 40
WAIT_S = 30


def ask(name: str, tokens: Sequence[int], answer: int, logprobs: int | None = None) -> Ask:
    """A turn of a session, named in a way that every supported release understands."""
    extra = {"kv_transfer_params": {"session_id": name}}
    return Ask(tokens, answer, session=name, logprobs=logprobs, extra=extra)


def state(rig: Rig, name: str) -> str:
    known = rig.sidecar.session(name)
    return "unknown" if known is None else str(known["state"])


def wait_saved(rig: Rig, name: str, blocks: int) -> None:
    def saved() -> bool:
        known = rig.sidecar.session(name)
        return known is not None and int(known["blocks"]["host"]) >= blocks

    wait_until(f"saving {name}", saved, WAIT_S)


def wait_back(rig: Rig, name: str) -> None:
    wait_until(f"{name} back on the GPU", lambda: state(rig, name) == "ready", WAIT_S)


def wait_connected(rig: Rig) -> None:
    def connected() -> bool:
        engines = rig.sidecar.get("/v1/status")["engines"]
        return len(engines) == 1 and engines[0]["workers"] == 1

    wait_until("the engine's connection", connected, WAIT_S)


def evict(pair: Pair) -> None:
    """Other agents take the whole pool, always the same ones: the arena keeps them once."""
    take_pool(pair.rig.vllm, pair.sizes)


def take_pool(server: VllmServer, sizes: Sizes) -> None:
    """Some agents' requests take all of a server's pool at one moment, but for a few blocks."""
    flood(server, FLOOD_AGENTS, "others", max_tokens=sizes.flood_answer_tokens, spare=FLOOD_SPARE)


@dataclasses.dataclass(frozen=True)
class Agent:
    """A session whose second turn is known: `right` is the answer with KV that never left the GPU."""

    second: Ask
    right: Completion

    @property
    def name(self) -> str:
        return str(self.second.session)

    @property
    def tokens(self) -> Sequence[int]:
        return self.second.prompt


def two_turns(pair: Pair, name: str) -> Agent:
    """An agent's two turns, alone on the server, the second one twice: all of its prompt is on the GPU then."""
    rig, sizes = pair.rig, pair.sizes
    first = prompt(name, sizes.agent_tokens)
    answer = rig.vllm.ask(ask(name, first, sizes.answer_tokens))
    tokens = [*first, *answer.tokens, *prompt(f"{name}-result", TOOL_RESULT_TOKENS)]
    second = ask(name, tokens, sizes.answer_tokens)
    rig.vllm.ask(second)
    wait_saved(rig, name, sizes.blocks_of(len(tokens)))
    before = rig.vllm.loaded()
    right = rig.vllm.ask(second)
    assert right.cached_tokens == whole(pair, tokens)
    assert rig.vllm.loaded() == before, "its KV was to be on the GPU"
    return Agent(second, right)


def whole(pair: Pair, tokens: Sequence[int]) -> int:
    """Tokens of this prompt that a perfect cache has: at least one is computed."""
    size = pair.sizes.config.block_size
    return (len(tokens) - 1) // size * size


@dataclasses.dataclass
class Judge:
    """Plain vLLM's judgement of answers, position by position: what it says itself after the same text.

    Its kernels have other shapes, since it computes what was loaded here. So where its two best tokens are close,
    either is right.
    """

    pair: Pair
    tokens: int = 0
    near_ties: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)

    def look(self, name: str, tokens: Sequence[int], answer: Sequence[int]) -> None:
        limit = self.pair.sizes.near_tie
        for position, got in enumerate(answer):
            text = [*tokens, *answer[:position]]
            own = self.pair.plain.ask(Ask(text, 1, logprobs=2))
            self.tokens += 1
            near = own.margins()[0] < limit
            self.near_ties += near
            if own.tokens[0] != got and (not near or got not in own.top[0]):
                margin = own.margins()[0]
                self.wrong.append(f"{name}, token {position}: {got} instead of {own.tokens[0]}, margin {margin:.3f}")

    def check(self) -> None:
        assert not self.wrong, "\n".join(self.wrong)
        assert self.tokens > 0
        assert self.near_ties <= self.tokens / 2, f"{self.near_ties} of {self.tokens} tokens prove nothing"
