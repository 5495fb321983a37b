"""The sidecar is killed in the middle of copies, then vLLM: a cache miss at worst, and everything is found again."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from real_vllm import steps
from real_vllm.audit import Follower
from real_vllm.harness import Difference
from real_vllm.rigs import AUDITED, PATIENT, PLAIN
from support.completions import Ask, Completion
from support.engines import Engines
from support.flood import prompt
from support.process import wait_until
from support.rest import HttpError
from support.servers import Rig

ROUNDS = 12
AGENTS = 8
BLOCKS = 30
"""Blocks of each agent: together more than the pool, so that every round saves and loads."""
IN_FLIGHT_MIN = 3
"""Rounds in which copies were running when the sidecar was killed; with fewer the test proves little."""
KILL_AT_MAX = 8
"""The sidecar dies when so many of the round's copy jobs have begun, at most; a round has about as many."""
REQUEST_S = 120
DRAINED_S = 30
STOPPED_S = 10


def asks_of(round_: int, seed: int) -> list[Ask]:
    """Every agent comes back with its prompt and a tool result that is new in each round."""
    asks = []
    for agent in range(AGENTS):
        name = f"mortal-{agent}"
        tokens = [*prompt(name, BLOCKS * steps.BLOCK, seed), *prompt(f"{name}-{round_}", 40, seed)]
        asks.append(Ask(tokens, max_tokens=12, session=name, logprobs=2))
    return asks


def test_a_killed_sidecar_costs_no_answer_and_is_found_again(
    engines: Engines, witness: Follower, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    rounds = [asks_of(round_, seed) for round_ in range(ROUNDS)]
    plain = engines.plain(PLAIN)
    expected = [[plain.ask(ask) for ask in asks] for asks in rounds]
    rig = engines.greenroom(AUDITED, **PATIENT)
    for ask in rounds[0]:
        steps.first_turn(rig, ask)
    difference, deaths = Difference(), []
    for round_, asks in enumerate(rounds):
        for ask in asks:
            rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_start", {"tool": "bash"})
        steps.wait_connected(rig.sidecar)
        answers, death = kill_in_the_middle(rig, asks, witness, rng.randint(1, KILL_AT_MAX))
        deaths.append(death)
        for right, got in zip(expected[round_], answers, strict=True):
            difference.add(f"round {round_}", right, got)
    in_flight = sum(witness.audit().running(death) > 0 for death in deaths)
    with capsys.disabled():
        print(f"  copies were running at {in_flight} of {ROUNDS} deaths; {difference.near_ties}", flush=True)
    difference.check()
    assert in_flight >= IN_FLIGHT_MIN
    assert not witness.audit().problems

    steps.wait_connected(rig.sidecar)
    ask = rounds[0][0]
    steps.evict(rig, "after-the-deaths")
    rig.vllm.ask(ask)
    steps.wait_saved(rig, str(ask.session), BLOCKS)
    steps.evict(rig, "resumed")
    answer = rig.vllm.ask(ask)
    assert answer.cached_tokens >= BLOCKS * steps.BLOCK
    assert answer.tokens == expected[0][0].tokens
    wait_until("the return of draining slots", lambda: draining(rig) == 0, DRAINED_S)


def kill_in_the_middle(rig: Rig, asks: list[Ask], witness: Follower, job: int) -> tuple[list[Completion], float]:
    """All agents come back at once; the sidecar dies when that many copies have begun. Answers; when it died."""
    with ThreadPoolExecutor(len(asks)) as pool:
        begun = len(witness.audit().spans)
        answers = [pool.submit(rig.vllm.ask, one, REQUEST_S) for one in asks]

        def now() -> bool:
            return len(witness.audit().spans) >= begun + job or all(answer.done() for answer in answers)

        wait_until("copies", now, REQUEST_S, poll_s=0.0005)
        death = time.monotonic()
        rig.sidecar.kill()
        rig.sidecar.start()
        return [answer.result(REQUEST_S) for answer in answers], death


def draining(rig: Rig) -> int:
    return int(rig.sidecar.get("/v1/status")["tiers"]["host"]["slots_draining"])


def test_a_new_vllm_hits_what_the_sidecar_kept(engines: Engines, witness: Follower, seed: int) -> None:
    ask = steps.agent("heir", 30, seed)
    (expected,) = steps.right(engines, ask)
    rig = engines.greenroom(AUDITED, **PATIENT)
    steps.wait_connected(rig.sidecar)
    steps.first_turn(rig, ask)
    others = asks_of(ROUNDS, seed)
    with ThreadPoolExecutor(len(others)) as pool:
        # Died in the middle of these, whose clients lose their connection.
        for one in others:
            pool.submit(lost, rig, one)
        kill_while_it_copies(rig, witness)
    wait_until("the engine's leave", lambda: not rig.sidecar.get("/v1/status")["engines"], DRAINED_S)
    wait_until("the return of draining slots", lambda: draining(rig) == 0, DRAINED_S)
    status = rig.sidecar.get("/v1/status")
    assert status["tiers"]["host"]["slots_leased"] == 0
    assert status["tiers"]["host"]["slots_used"] >= 30

    rig.vllm.start()
    answer = rig.vllm.ask(ask)
    assert answer.cached_tokens == 30 * steps.BLOCK
    assert answer.tokens == expected
    assert not witness.audit().problems


def kill_while_it_copies(rig: Rig, witness: Follower) -> None:
    """Stopped first: it is killed only if a copy was then running, which ends within milliseconds otherwise."""
    process = rig.vllm.process
    assert process is not None
    dead = set(witness.audit().open)

    def is_caught() -> bool:
        if not witness.audit().open - dead:
            return False
        process.signal_group(signal.SIGSTOP)
        wait_until("vLLM's standstill", lambda: all(one.stopped for one in process.members()), STOPPED_S)
        if witness.audit().open - dead:
            return True
        process.signal_group(signal.SIGCONT)
        return False

    wait_until("copies in flight", is_caught, REQUEST_S, poll_s=0)
    rig.vllm.kill()
    assert witness.audit().open - dead, "no copy was running when vLLM died"


def lost(rig: Rig, ask: Ask) -> None:
    with contextlib.suppress(OSError, HttpError):
        rig.vllm.ask(ask, REQUEST_S)
