"""Random agents on vLLM's real schedulers: no wrong byte, nothing lost, whatever happens and in whatever order.

The seed is printed; ``GREENROOM_SEED=N`` replays a run, ``GREENROOM_TURNS=N`` makes it longer. What the two threads and
the sidecar do in between is the machine's to choose, so a replay meets the same events, not the same microseconds.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run it in .venv")

from harness import faults

if not faults.available():
    # Before anything else is imported: see the head of `engine`.
    pytest.skip("needs the build with fault points: make check-harness", allow_module_level=True)

from harness.engine import Engine, EngineOptions, ReserveTaken, WrongBytes
from harness.world import Hints, World, WorldOptions
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
)
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


def live(sidecar: Sidecar, seed: int, turns: int, asynchronous: bool, world: WorldOptions) -> Counter[str]:
    """Agents live through so many turns; then everything has to be given back. Returns what has happened."""
    engine = Engine(EngineOptions(asynchronous=asynchronous), sidecar.socket)
    hints = Hints(sidecar)
    try:
        engine.until_ready()
        agents = World(engine, hints, seed, world)
        try:
            agents.run(turns)
            agents.end()
        finally:
            happened = agents.tally.events + Counter(engine.figures()) + Counter(preemptions=engine.preemptions)
            print(dict(happened), f"answers of the API: {dict(hints.statuses)}")
        return happened
    finally:
        hints.close()
        engine.close()


@SCHEDULERS
def test_every_block_read_has_the_bytes_of_its_first_computation(
    sidecar: Sidecar, seed: int, asynchronous: bool
) -> None:
    happened = live(sidecar, seed, TURNS, asynchronous, WorldOptions())
    # What did not happen proves nothing.
    assert not [name for name in MUST_HAPPEN if not happened[name]], happened
    assert happened["demand_blocks"] + happened["prefetch_used"] > TURNS, happened


BROKEN: dict[str, tuple[str, type[Exception]]] = {
    "no fence": ("hooks::recheck_saves::skip", WrongBytes),
    "a block of the reserve": ("budget::admit::one_less", ReserveTaken),
    "published before it is copied": ("mover::submit::report_early", WrongBytes),
    "no epoch": ("hooks::reset::skip", WrongBytes),
}


@SCHEDULERS
@pytest.mark.parametrize("broken", list(BROKEN))
def test_the_harness_catches(sidecar: Sidecar, seed: int, asynchronous: bool, broken: str) -> None:
    """A test of the test: with a mistake made on purpose, some turn of the first 10,000 shows it."""
    point, error = BROKEN[broken]
    with faults.fault(point, "return"), pytest.raises(error) as caught:
        live(sidecar, seed, BROKEN_TURNS, asynchronous, WorldOptions(death_every=0))
    print(caught.value)
