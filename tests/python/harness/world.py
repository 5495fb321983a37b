"""Random agents on an engine of the harness: what happens is drawn from one seed."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from harness.engine import Engine
from harness.model import VOCABULARY
from support.process import wait_until
from support.servers import Sidecar

SHARED_PROMPTS = 3
TOOLS = ("bash", "python", "browser", "AskUserQuestion")
SETTLE_STEPS = 20_000
GIVE_BACK_S = 20


@dataclass(frozen=True)
class WorldOptions:
    """How the agents behave. The numbers are those of tokens, of blocks' worth and less."""

    sessions: int = 12
    shared_tokens: int = 70
    """Of a system prompt that several sessions begin with."""
    prompt_tokens: tuple[int, int] = (1, 90)
    """A turn's new tokens."""
    answer_tokens: tuple[int, int] = (1, 12)
    long_answer_tokens: tuple[int, int] = (40, 90)
    """More than a load leaves room for: requests fall, in the middle of saves."""
    long_share: float = 0.12
    """Of the answers."""
    session_tokens_max: int = 480
    """Then the session ends and a new one takes its place."""
    at_once: tuple[int, int] = (1, 9)
    """Requests under way, running or waiting, at most: drawn anew now and then, busy times follow quiet ones."""
    tide_rounds: int = 150
    hint_share: float = 0.15
    """Of the rounds: a hint that has nothing to do with what its session does."""
    abort_share: float = 0.06
    reuse_share: float = 0.1
    """A request that ended, or is aborted at this moment, gives its id to the next one."""
    tool_share: float = 0.7
    """Of the turns that end: the agent runs a tool, says so, and comes back."""
    tool_rounds: tuple[int, int] = (1, 40)
    return_rounds: tuple[int, int] = (0, 12)
    """From the end of a tool to the next request."""
    late_share: float = 0.12
    """Of the rounds: the copies that follow are late, in builds with fault points."""
    late_copies: int = 2
    late_ms: int = 3
    failed_share: float = 0.002
    """Of the rounds: a copy fails."""
    reset_every: int = 700
    weights_every: int = 1100
    death_every: int = 1200
    """Rounds, on average, between two deaths of the sidecar; it is there again after some rounds. 0: it never dies."""
    death_rounds: tuple[int, int] = (0, 60)
    engine_death_every: int = 0
    """Rounds, on average, between two deaths of an engine whose workers are processes (from half to one and a half of
    it); a new one takes its place. In turns its workers die first, or its scheduler."""
    outlive_rounds: tuple[int, int] = (0, 30)
    """How long its workers outlive their scheduler."""


@dataclass
class Agent:
    """One session."""

    name: str
    tokens: list[int]
    request: str | None = None
    sent: int = 0
    call: str | None = None
    """A tool that runs, and the rounds at which it ends and the next request comes."""
    tool_ends: int | None = None
    returns: int | None = None


@dataclass
class Tally:
    """What has happened, so that a run that proves nothing is seen."""

    turns: int = 0
    events: Counter[str] = field(default_factory=Counter)


class Hints:
    """The sidecar's API. A refused call counts and is no error."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self._port = sidecar.port
        self._connection = self._connect()
        # A hint is answered when the engine has taken a step, and this thread takes the steps.
        self._later = ThreadPoolExecutor(1)
        self.statuses: Counter[int] = Counter()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Waits for the answer, and returns it; None where there is none."""
        return self._call(self._connection, method, path, body)

    def hint(self, action: str, *sessions: str) -> Future[Any]:
        """A hint for each. The answer comes while the engine takes steps."""
        actions = [
            {
                "action_id": session,
                "action_type": action,
                "action_version": "1.0",
                "payload": {"target": {"session_id": session}},
            }
            for session in sessions
        ]
        body = {"protocol_version": "1.0", "message_id": "m", "actions": actions}
        return self._later.submit(self._post_alone, "/v1/hints", body)

    def _post_alone(self, path: str, body: Any) -> Any:
        connection = self._connect()
        try:
            return self._call(connection, "POST", path, body)
        finally:
            connection.close()

    def _call(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> Any:
        status, found = 0, None
        try:
            connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            status = answer.status
            found = json.loads(content) if content else None
        except (OSError, http.client.HTTPException):
            connection.close()
        self.statuses[status] += 1
        return found

    def close(self) -> None:
        self._later.shutdown()
        self._connection.close()


class World:
    """Agents, their hints and their accidents."""

    def __init__(self, new_engine: Callable[[], Engine], hints: Hints, seed: int, options: WorldOptions) -> None:
        self.engine = new_engine()
        self.options = options
        self._new_engine = new_engine
        self._orphaned: list[tuple[Engine, int]] = []
        """Engines without a scheduler, and the round in which their workers die."""
        self.tally = Tally()
        self._hints = hints
        self._rng = random.Random(seed)
        self._shared = [self._words(options.shared_tokens) for _ in range(SHARED_PROMPTS)]
        self._born = 0
        self._requests = 0
        self._free_ids: list[str] = []
        self._rounds = 0
        self._at_once = 0
        self._sidecar_returns: int | None = None
        self._workers_die_first = self._rng.random() < 0.5
        self._plan_engine_death()
        self._agents = [self._new_agent() for _ in range(options.sessions)]
        self._by_request: dict[str, Agent] = {}
        self._kinds: dict[str, Callable[[], None]] = {
            "tool_start": self._tool_start,
            "tool_end": self._tool_end,
            "tool_progress": self._tool_progress,
            "tool_repeated": self._tool_repeated,
            "unknown_session": self._unknown_session,
            "prefetch": self._prefetch,
            "prefetch_cancelled": self._prefetch_cancelled,
            "pin": self._pin,
            "unpin": self._unpin,
            "demote": self._demote,
            "retire": self._retire,
        }

    def _answer_tokens(self) -> int:
        is_long = self._rng.random() < self.options.long_share
        return self._rng.randint(*(self.options.long_answer_tokens if is_long else self.options.answer_tokens))

    def _words(self, count: int) -> list[int]:
        return [self._rng.randrange(VOCABULARY) for _ in range(count)]

    def _new_agent(self) -> Agent:
        self._born += 1
        start = self._rng.choice([[], *self._shared])
        return Agent(f"agent-{self._born}", list(start))

    # Rounds

    def round(self) -> None:
        """What is due, perhaps a request, perhaps a hint, perhaps an accident; then a step."""
        rng, options = self._rng, self.options
        if self._rounds % options.tide_rounds == 0:
            self._at_once = rng.randint(*options.at_once)
        self._rounds += 1
        self._tools()
        if len(self._by_request) < self._at_once and rng.random() < 0.5:
            self._turn()
        if rng.random() < options.hint_share:
            kind = rng.choice(list(self._kinds))
            self.tally.events[kind] += 1
            self._kinds[kind]()
        if self._by_request and rng.random() < options.abort_share:
            self._abort(rng.choice(list(self._by_request)))
        self._copy_faults()
        if options.death_every:
            self._deaths(self._hints.sidecar)
        if options.engine_death_every and self._rounds >= self._engine_dies_at:
            self._engine_dies()
        self._bury(self._rounds)
        if rng.randrange(options.reset_every) == 0:
            self._reset(weights=False)
        if rng.randrange(options.weights_every) == 0:
            self._reset(weights=True)
        self.engine.step()
        self._take_answers()

    def run(self, turns: int, drain_every: int = 16) -> Tally:
        """Rounds until so many turns have ended, with a look at the pool after each."""
        while self.tally.turns < turns:
            self.round()
            if self._rounds % drain_every == 0:
                self.engine.drain()
                self._take_answers()
            self.engine.check_pool()
        return self.tally

    def end(self) -> None:
        """Lets every request end; then nothing may be left."""
        if self._sidecar_returns is not None:
            self._bring_back()
        if not self.engine.run():
            status = self._hints.sidecar.get("/v1/status")
            raise AssertionError(f"no rest: requests {self.engine.alive()}, {self.engine.figures()}, sidecar {status}")
        self._take_answers()
        assert not self._by_request, f"requests that never ended: {list(self._by_request)}"
        self.engine.check_pool()
        self._bury(None)
        free, total = self.engine.free_blocks(), self.engine.options.blocks - 1
        assert free == total, f"{total - free} GPU blocks are still referenced by nobody"
        sidecar = self._hints.sidecar

        def all_given_back() -> bool:
            self.engine.idle_step()
            host = sidecar.get("/v1/status")["tiers"]["host"]
            return bool(host["slots_leased"] == host["slots_draining"] == 0)

        wait_until("the slots that copies used", all_given_back, GIVE_BACK_S, poll_s=0.01)
        self._count_evictions()

    # Requests

    def _turn(self) -> None:
        due = [agent for agent in self._agents if agent.returns is not None and agent.returns <= self._rounds]
        idle = due or [agent for agent in self._agents if agent.request is None and agent.returns is None]
        if not idle:
            return
        agent = self._rng.choice(idle)
        agent.returns = None
        if len(agent.tokens) > self.options.session_tokens_max:
            self._agents.remove(agent)
            agent = self._new_agent()
            self._agents.append(agent)
        agent.tokens += self._words(self._rng.randint(*self.options.prompt_tokens))
        self._send(agent)

    def _send(self, agent: Agent) -> None:
        if self._free_ids and self._rng.random() < self.options.reuse_share and self.engine.is_free(self._free_ids[-1]):
            request = self._free_ids.pop()
            self.tally.events["id_reused"] += 1
        else:
            self._requests += 1
            request = f"request-{self._requests}"
        agent.request, agent.sent, agent.tool_ends, agent.returns = request, len(agent.tokens), None, None
        self._by_request[request] = agent
        self.engine.add(request, agent.tokens, self._answer_tokens(), agent.name)

    def _abort(self, request: str) -> None:
        agent = self._by_request[request]
        self.engine.abort(request)
        self.tally.events["abort"] += 1
        self._take_answers()
        if self._rng.random() < self.options.reuse_share:
            # At once: the worker has not heard yet that the first is gone.
            self.tally.events["id_reused_at_once"] += 1
            self._free_ids.append(request)
            agent.tokens += self._words(1)
            self._send(agent)

    def _take_answers(self) -> None:
        answers, self.engine.answers = self.engine.answers, []
        for answer in answers:
            agent = self._by_request.pop(answer.request)
            agent.request = None
            agent.tokens = agent.tokens[: agent.sent] + answer.tokens
            self._free_ids = [*self._free_ids[-20:], answer.request]
            if self._rng.random() < self.options.tool_share:
                self._start_tool(agent)
            self.tally.turns += 1
            self.tally.events[f"ended_{answer.reason}"] += 1

    def _reset(self, weights: bool) -> None:
        # vLLM refuses while copies hold blocks: as its users do, ask again.
        for _ in range(SETTLE_STEPS):
            if self.engine.reset(weights=weights):
                self.tally.events["weights_changed" if weights else "reset"] += 1
                return
            self.engine.step()
            self._take_answers()
        raise AssertionError("the engine never lets itself be reset")

    # Accidents

    def _copy_faults(self) -> None:
        rng, options = self._rng, self.options
        if rng.random() < options.late_share:
            self.tally.events["late_copies"] += 1
            self.engine.set_fault("host::copy::delay", f"{options.late_copies}*sleep({options.late_ms})")
        if rng.random() < options.failed_share:
            self.tally.events["failed_copy"] += 1
            self.engine.set_fault("host::copy::fail", "1*return")

    def _deaths(self, sidecar: Sidecar) -> None:
        if self._sidecar_returns is not None:
            if self._sidecar_returns <= self._rounds:
                self._bring_back()
        elif self._rng.randrange(self.options.death_every) == 0:
            self.tally.events["sidecar_killed"] += 1
            self._count_evictions()
            sidecar.kill()
            self._sidecar_returns = self._rounds + self._rng.randint(*self.options.death_rounds)

    def _count_evictions(self) -> None:
        """A sidecar that dies takes its count along."""
        self.tally.events["evicted"] += int(self._hints.sidecar.metrics().sum("greenroom_evicted_blocks_total"))

    def _bring_back(self) -> None:
        self._sidecar_returns = None
        self._hints.sidecar.start()

    def _plan_engine_death(self) -> None:
        every = self.options.engine_death_every
        self._engine_dies_at = self._rounds + self._rng.randint(every // 2, every * 3 // 2)

    def _engine_dies(self) -> None:
        """With all its requests, which come again; the worker processes before the scheduler, or after it."""
        if self._sidecar_returns is not None:
            # The next engine would wait for it.
            self._bring_back()
        dead = self.engine
        self.tally.events["batches_lost"] += dead.batches_out()
        self.count_figures()
        self._plan_engine_death()
        self._workers_die_first = not self._workers_die_first
        if self._workers_die_first:
            self.tally.events["workers_killed"] += 1
            dead.kill_workers()
            dead.kill_scheduler()
            dead.pool.close()
        else:
            self.tally.events["scheduler_killed"] += 1
            dead.kill_scheduler()
            self._orphaned.append((dead, self._rounds + self._rng.randint(*self.options.outlive_rounds)))
        self.engine = self._new_engine()
        lost, self._by_request, self._free_ids = list(self._by_request.values()), {}, []
        for agent in lost:
            self._send(agent)

    def _bury(self, now: int | None) -> None:
        """The workers whose time has come; without a time, all."""
        for dead, dies in list(self._orphaned):
            if now is None or dies <= now:
                self._orphaned.remove((dead, dies))
                dead.kill_workers()
                dead.pool.close()

    def count_figures(self) -> None:
        """Adds what the engine's hooks have counted to the tally. Once, at its end."""
        counted = Counter(self.engine.figures()) + Counter(preemptions=self.engine.preemptions)
        del counted["ready"], counted["waiting"]
        self.tally.events += counted

    def close(self) -> None:
        """Ends every engine."""
        self._bury(None)
        self.engine.close()

    # Hints

    def _start_tool(self, agent: Agent) -> None:
        rng, options = self._rng, self.options
        agent.tool_ends = self._rounds + rng.randint(*options.tool_rounds)
        agent.returns = agent.tool_ends + rng.randint(*options.return_rounds)
        self._tool_start(agent)

    def _tools(self) -> None:
        """Tools that end now."""
        for agent in self._agents:
            if agent.tool_ends is not None and agent.tool_ends <= self._rounds:
                agent.tool_ends = None
                self._tool_end(agent)

    def _tool(self, agent: Agent, event: str, body: dict[str, Any]) -> None:
        self._hints.call("POST", f"/v1/sessions/{agent.name}/{event}", body)

    def _tool_start(self, agent: Agent | None = None) -> None:
        agent = agent or self._rng.choice(self._agents)
        agent.call = f"call-{self._rng.randrange(1 << 30)}"
        eta = {"eta_ms": self._rng.randrange(1, 400)} if self._rng.random() < 0.7 else {}
        self._tool(agent, "tool_start", {"tool": self._rng.choice(TOOLS), "call_id": agent.call, **eta})

    def _tool_end(self, agent: Agent | None = None) -> None:
        agent = agent or self._rng.choice(self._agents)
        self._tool(agent, "tool_end", {"call_id": agent.call} if agent.call else {})
        agent.call = None

    def _tool_progress(self) -> None:
        agent = self._rng.choice(self._agents)
        self._tool(agent, "tool_progress", {"eta_ms": self._rng.randrange(1, 400)})

    def _tool_repeated(self) -> None:
        agent = self._rng.choice(self._agents)
        for _ in range(2):
            self._tool(agent, "tool_end", {})

    def _unknown_session(self) -> None:
        self._tool(Agent("nobody", []), "tool_end", {})

    def _prefetch(self) -> None:
        self._hints.hint("kv.prefetch", self._rng.choice(self._agents).name)

    def _prefetch_cancelled(self) -> None:
        """Its tool runs again after all."""
        agent = self._rng.choice(self._agents)
        self._hints.hint("kv.prefetch", agent.name)
        self._tool_start(agent)

    def _pin(self) -> None:
        self._hints.hint("kv.pin", self._rng.choice(self._agents).name)

    def _unpin(self) -> None:
        self._hints.hint("kv.unpin", self._rng.choice(self._agents).name)

    def _demote(self) -> None:
        self._hints.hint("kv.demote", self._rng.choice(self._agents).name)

    def _retire(self) -> None:
        agent = self._rng.choice(self._agents)
        self._hints.call("DELETE", f"/v1/sessions/{agent.name}")
