"""Random agents on vLLM's real schedulers: no wrong byte, nothing lost, whatever happens and in whatever order.

The seed is printed; ``GREENROOM_SEED=N`` replays a run, ``GREENROOM_TURNS=N`` makes it longer. What the two threads and
the sidecar do in between is the machine's to choose, so a replay meets the same events, not the same microseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run it in .venv")

from harness import faults

if not faults.available():
    # Before anything else is imported: see the head of `engine`.
    pytest.skip("needs the build with fault points: make check-harness", allow_module_level=True)

from greenroom.vllm import compat
from harness import arrivals
from harness.engine import Engine, EngineOptions, FirstKey, ReserveTaken, WrongBytes
from harness.model import VOCABULARY
from harness.world import GIVE_BACK_S, Hints, World, WorldOptions
from support.process import wait_until
from support.servers import Sidecar

TURNS = int(os.environ.get("GREENROOM_TURNS", 3000))
BROKEN_TURNS = 10_000
MUST_HAPPEN = (
    "demand_blocks",
    "prefetch_used",
    "fenced",
    "failed",
    "preemptions",
    "abort",
    "reset",
    "weights_changed",
    "id_reused",
    "sidecar_killed",
    "evicted",
    "tool_start",
    "tool_end",
    "tool_progress",
    "tool_repeated",
    "unknown_session",
    "prefetch",
    "prefetch_cancelled",
    "pin",
    "unpin",
    "demote",
    "retire",
)
STATUSES = frozenset({200, 404, 408, 409, 429, 0})
"""What the API may answer here; 0: its sidecar was dead; 408: on a busy machine a request may come too slowly."""
MEMORY = "2MiB"
"""Less than the sessions need: slots are evicted, too."""
SCHEDULERS = pytest.mark.parametrize("asynchronous", [False, True], ids=["scheduler", "async-scheduler"])


@pytest.fixture
def seed() -> int:
    """Of this run."""
    found = int(os.environ.get("GREENROOM_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"GREENROOM_SEED={found}")
    return found


@pytest.fixture
def sidecar() -> Iterator[Sidecar]:
    """One for the test."""
    with Sidecar(MEMORY, name="harness") as running:
        yield running


def accidents(turns: int, engine_death_every: int = 0) -> WorldOptions:
    """Resets and deaths as usual, or, in a short run, so often that each happens some times: a turn has two rounds."""
    usual, every = WorldOptions(), turns // 6
    return WorldOptions(
        reset_every=min(usual.reset_every, every),
        weights_every=min(usual.weights_every, every),
        death_every=min(usual.death_every, every),
        engine_death_every=engine_death_every,
    )


def live(sidecar: Sidecar, seed: int, turns: int, engine: EngineOptions, options: WorldOptions) -> Counter[str]:
    """Agents live through so many turns; then everything has to be given back. Returns what has happened."""
    digests: dict[FirstKey, bytes] = {}

    def new_engine() -> Engine:
        started = Engine(engine, sidecar.socket, digests)
        started.until_ready()
        return started

    hints = Hints(sidecar)
    world = World(new_engine, hints, seed, options)
    try:
        world.run(turns)
        world.end()
    finally:
        world.count_figures()
        print(dict(world.tally.events), f"answers of the API: {dict(hints.statuses)}")
        hints.close()
        world.close()
    assert not set(hints.statuses) - STATUSES, hints.statuses
    return world.tally.events


def check(happened: Counter[str], turns: int, also: Sequence[str] = ()) -> None:
    """What did not happen proves nothing."""
    assert not [name for name in (*MUST_HAPPEN, *also) if not happened[name]], happened
    assert happened["demand_blocks"] + happened["prefetch_used"] > turns // 2, happened


@SCHEDULERS
def test_every_block_read_has_the_bytes_of_its_first_computation(
    sidecar: Sidecar, seed: int, asynchronous: bool
) -> None:
    check(live(sidecar, seed, TURNS, EngineOptions(asynchronous=asynchronous), accidents(TURNS)), TURNS)


@SCHEDULERS
def test_two_ranks_whose_processes_are_killed(sidecar: Sidecar, seed: int, asynchronous: bool) -> None:
    engine = EngineOptions(asynchronous=asynchronous, ranks=2, processes=True)
    # A turn has two rounds: of 1,200 on, an engine dies in both ways.
    turns = max(TURNS // 4, 600)
    happened = live(sidecar, seed, turns, engine, accidents(turns, engine_death_every=400))
    check(happened, turns, ("scheduler_killed", "workers_killed"))


CROWD = 8
CROWD_TOKENS = 20 * 16 + 1
"""So many sessions of this size are more than twice the pool."""
QUIET_STEPS = 500


@SCHEDULERS
def test_sessions_that_exceed_the_pool(sidecar: Sidecar, seed: int, asynchronous: bool) -> None:
    rng = random.Random(seed)
    engine, hints = Engine(EngineOptions(asynchronous=asynchronous), sidecar.socket), Hints(sidecar)
    prompts = {f"crowd-{n}": [rng.randrange(VOCABULARY) for _ in range(CROWD_TOKENS)] for n in range(CROWD)}

    def turns(name: str, *sessions: str) -> dict[str, list[int]]:
        """These sessions send a request at once."""
        for session in sessions:
            engine.add(f"{session}-{name}", prompts[session], 1, session)
        assert engine.run(), f"{engine.alive()} hang, or {engine.figures()}"
        answers, engine.answers = engine.answers, []
        return {answer.request.removesuffix(f"-{name}"): answer.tokens for answer in answers}

    def steps_until(what: str, condition: Callable[[], bool]) -> None:
        def step() -> bool:
            engine.idle_step()
            return condition()

        wait_until(what, step, GIVE_BACK_S, poll_s=0)

    def fetched_when_quiet() -> int:
        """Fetches that are under way end; with nothing new, nothing else is to begin."""
        for _ in range(QUIET_STEPS):
            engine.idle_step()
        return engine.figures()["prefetch_blocks"]

    def is_saved(sessions: int) -> bool:
        blocks = CROWD_TOKENS // engine.options.block_tokens
        return engine.figures()["saved_blocks"] == blocks * sessions

    try:
        engine.until_ready()
        first: dict[str, list[int]] = {}
        for number, session in enumerate(prompts, 1):
            first |= turns("first", session)
            steps_until("saving", partial(is_saved, number))
            hints.call("POST", f"/v1/sessions/{session}/tool_start", {"tool": "make", "eta_ms": 600_000})
        before = fetched_when_quiet()
        answer = hints.hint("kv.prefetch", *prompts)
        steps_until("the answer", answer.done)
        outcomes = {result["outcome"] for result in answer.result()["results"]}
        assert outcomes <= {"accepted", "clipped", "deferred"}, outcomes
        assert outcomes & {"clipped", "deferred"}, outcomes

        # Who is back stays: with nothing new, nothing is moved.
        fetched = fetched_when_quiet()
        assert fetched - before <= engine.options.blocks
        assert fetched_when_quiet() == fetched, "sessions push each other out"

        assert turns("second", *prompts) == first
        assert engine.free_blocks() == engine.options.blocks - 1
    finally:
        hints.close()
        engine.close()


@contextlib.contextmanager
def reserve_off_by_one() -> Iterator[None]:
    """The connector tells the hooks of a block less than requests need."""
    survey = compat.survey

    def wrong(*args: Any) -> compat.Survey:
        found = survey(*args)
        return dataclasses.replace(found, reserve_blocks=max(0, found.reserve_blocks - 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "survey", wrong)
        yield


BROKEN: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[None]], type[Exception]]] = {
    "no fence": (partial(faults.fault, "hooks::recheck_saves::skip", "return"), WrongBytes),
    "a block of the reserve": (partial(faults.fault, "budget::admit::one_less", "return"), ReserveTaken),
    "the reserve off by one": (reserve_off_by_one, ReserveTaken),
    "published before it is copied": (partial(faults.fault, "mover::submit::report_early", "return"), WrongBytes),
    "no epoch": (partial(faults.fault, "hooks::reset::skip", "return"), WrongBytes),
}


@SCHEDULERS
def test_no_more_requests_fall_than_without_greenroom(asynchronous: bool) -> None:
    """The same arrivals, in a pool that is too small for them."""
    without, loads, everything = (arrivals.count(extra, asynchronous) for extra in arrivals.KINDS.values())
    fell = [one["preemptions"] for one in (without, loads, everything)]
    print(f"preemptions without Greenroom, with loads, with fetches too: {fell}")
    assert fell[0] > arrivals.SEEDS, "nothing falls that could fall more often"
    assert loads["demand_blocks"] > 0
    assert everything["prefetch_blocks"] > 0
    assert max(fell[1:]) <= fell[0]


@SCHEDULERS
@pytest.mark.parametrize("broken", list(BROKEN))
def test_the_harness_catches(sidecar: Sidecar, seed: int, asynchronous: bool, broken: str) -> None:
    """A test of the test: with a mistake made on purpose, some turn of the first 10,000 shows it."""
    mistake, error = BROKEN[broken]
    with mistake(), pytest.raises(error) as caught:
        live(sidecar, seed, BROKEN_TURNS, EngineOptions(asynchronous=asynchronous), WorldOptions(death_every=0))
    print(caught.value)
