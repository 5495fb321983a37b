"""The four arms. Each sample is one agent's turn after a tool wait, and carries the proof of what it claims to be."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

from support.completions import Ask
from support.flood import FLOOD_MAX_TOKENS, flood_asks, prompt, together
from support.process import wait_until
from support.servers import Rig, VllmServer

ARMS = ("resident", "recompute", "reactive", "hinted")
"""Never evicted; Greenroom off; evicted, no hint; evicted, told that the tool runs and ends."""

FLOOD_AGENTS = 3
TOOL_RESULT_TOKENS = 24
ANSWER_TOKENS = 8
SAVED_WAIT_S = 20
READY_WAIT_S = 10
RELOADED_SHARE = 0.9
"""Share of the prefix that must have come back from the arena; the flood may leave a few blocks."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the workload, in tokens and agents."""

    prompt_tokens: int = 6000
    agents: int = 2
    plain_agents: int = 4
    seed: int = 1
    flood_answer_tokens: int = FLOOD_MAX_TOKENS
    flood_spare: int = 1
    """Blocks for each agent of the flood that they leave to others."""
    block_size: int = 32

    def full_blocks(self) -> int:
        return self.prompt_tokens // self.block_size

    def whole_prefix(self) -> int:
        """Tokens that a perfect cache has of the turn after the tool: the full blocks of the turn before."""
        return self.full_blocks() * self.block_size


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measured turn.

    `from_arena`: tokens that the request itself had to load, as vLLM counts them. `brought_back`: tokens that were
    loaded ahead of it since the turn before. What came from the arena, either way, had lost its place on the GPU.
    """

    arm: str
    round: int
    ttft_ms: float
    cached_tokens: int
    from_arena: int = 0
    brought_back: int = 0
    ready_ms: float | None = None
    problem: str | None = None


class Greenroom:
    """The arms that run on vLLM with Greenroom, on one server."""

    def __init__(self, rig: Rig, plan: Plan) -> None:
        self._rig = rig
        self._plan = plan

    def first_turns(self) -> None:
        """Every agent's first turn: all of it is computed, and saved."""
        for arm in ("resident", "reactive", "hinted"):
            for agent in range(self._plan.agents):
                self._turn(f"{arm}-{agent}")
        self._flood()

    def sample(self, arm: str, round_: int) -> Sample:
        """One sample of `resident`, `reactive` or `hinted`."""
        agent = f"{arm}-{round_ % self._plan.agents}"
        self._turn(agent)
        brought_back, ready_ms = self._rig.vllm.brought_back(), None
        if arm == "hinted":
            ready_ms = self._tool_wait(agent, round_)
        elif arm == "reactive":
            self._flood()
        loaded = self._rig.vllm.loaded()
        answer = self._rig.vllm.ask(next_turn(agent, round_, self._plan))
        sample = Sample(
            arm=arm,
            round=round_,
            ttft_ms=answer.ttft_s * 1e3,
            cached_tokens=answer.cached_tokens,
            from_arena=self._rig.vllm.loaded() - loaded,
            brought_back=(self._rig.vllm.brought_back() - brought_back) * self._plan.block_size,
            ready_ms=ready_ms,
        )
        return dataclasses.replace(sample, problem=problem(sample, self._plan))

    def _turn(self, agent: str) -> None:
        """A turn that ends with a tool call. Returns when all full blocks of its prompt are in the arena."""
        self._rig.vllm.ask(turn(agent, prompt(agent, self._plan.prompt_tokens, self._plan.seed)))

        def saved() -> bool:
            session = self._rig.sidecar.session(agent)
            return session is not None and session["blocks"]["host"] >= self._plan.full_blocks()

        wait_until(f"saving {agent}", saved, SAVED_WAIT_S)

    def _tool_wait(self, agent: str, round_: int) -> float:
        """The tool runs while others take the pool. Milliseconds from its end to the KV's return."""
        events = f"/v1/sessions/{agent}"
        call = {"call_id": f"call-{round_}"}
        self._rig.sidecar.post(f"{events}/tool_start", {"tool": "bash", **call})
        self._flood()
        start = time.perf_counter()
        self._rig.sidecar.post(f"{events}/tool_end", call)

        def ready() -> bool:
            session = self._rig.sidecar.session(agent)
            return session is not None and session["state"] == "ready"

        # If it never gets ready, the request has to load and the sample is counted as invalid.
        with contextlib.suppress(TimeoutError):
            wait_until(f"{agent} back on the GPU", ready, READY_WAIT_S, poll_s=0.002)
        return (time.perf_counter() - start) * 1e3

    def _flood(self) -> None:
        """Other agents run turns that together need the whole pool."""
        plan = self._plan
        asks = flood_asks(self._rig.vllm, FLOOD_AGENTS, "flood", plan.seed, plan.flood_answer_tokens, plan.flood_spare)
        together(self._rig.vllm, asks)


class Plain:
    """The arm without Greenroom: stock vLLM, whose pool holds two of its agents and not four."""

    def __init__(self, server: VllmServer, plan: Plan) -> None:
        self._server = server
        self._plan = plan
        self._next = 0

    def first_turns(self) -> None:
        for agent in range(self._plan.plain_agents):
            self._server.ask(Ask(prompt(f"plain-{agent}", self._plan.prompt_tokens, self._plan.seed), ANSWER_TOKENS))

    def sample(self, round_: int) -> Sample:
        """The turn of the agent that waited longest: the other agents' turns took its blocks."""
        agent = f"plain-{self._next % self._plan.plain_agents}"
        self._next += 1
        answer = self._server.ask(next_turn(agent, round_, self._plan))
        sample = Sample("recompute", round_, answer.ttft_s * 1e3, answer.cached_tokens)
        return dataclasses.replace(sample, problem=problem(sample, self._plan))


def next_turn(agent: str, round_: int, plan: Plan) -> Ask:
    """The prompt of the turn before, then a tool result that no one has seen."""
    before = prompt(agent, plan.prompt_tokens, plan.seed)
    result = prompt(f"{agent}-result-{round_}", TOOL_RESULT_TOKENS, plan.seed)
    return turn(agent, [*before, *result])


def turn(agent: str, tokens: Sequence[int]) -> Ask:
    """One of the session's, named in a way that every supported release understands."""
    return Ask(tokens, ANSWER_TOKENS, session=agent, extra={"kv_transfer_params": {"session_id": agent}})


def problem(sample: Sample, plan: Plan) -> str | None:
    """Why the sample is not what its arm says; None if it is."""
    whole = plan.whole_prefix()
    if sample.arm == "recompute":
        return None if sample.cached_tokens == 0 else f"{sample.cached_tokens} tokens were cached, not 0"
    if sample.cached_tokens != whole:
        return f"{sample.cached_tokens} tokens were cached, not {whole}"
    enough = RELOADED_SHARE * whole
    if sample.arm == "reactive":
        loaded = sample.from_arena
        return None if loaded >= enough else f"the request loaded {loaded} of {whole} tokens: it was not evicted"
    if sample.from_arena:
        return f"the request still had to load {sample.from_arena} tokens"
    if sample.arm == "hinted" and sample.brought_back < enough:
        return f"{sample.brought_back} of {whole} tokens were brought back: it was not evicted"
    return None
