"""What is done to whom, in which order: drawn from the seed alone, before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

SIDECAR_ACTS = (
    "kill_sidecar",
    "kill_sidecar_late",
    "kill_sidecar_twice",
    "stop_sidecar",
    "stop_and_kill_sidecar",
    "end_sidecar",
    "exhaust_descriptors",
    "exhaust_memory",
    "fill_log",
    "step_clock",
)
"""Methods of `Acts`: what happens to the sidecar while vLLM lives on."""

ENGINE_STOPS = ("stop_worker", "stop_scheduler", "stop_worker_kill_sidecar")
"""What vLLM survives."""

DEATHS = (
    "kill_scheduler",
    "kill_worker",
    "kill_scheduler_then_worker",
    "kill_worker_then_scheduler",
    "stop_worker_kill_scheduler",
    "kill_scheduler_and_sidecar",
    "kill_all",
)
"""What ends vLLM: each costs a start of about a minute."""

NEW_ARENA = frozenset(
    {
        "kill_sidecar",
        "kill_sidecar_late",
        "kill_sidecar_twice",
        "stop_and_kill_sidecar",
        "end_sidecar",
        "fill_log",
        "stop_worker_kill_sidecar",
        "kill_scheduler_and_sidecar",
    }
)
"""After these the sidecar is another one and knows nothing; `exhaust_memory` may go either way."""

DEATH_EVERY = 8
"""Rounds from one death of vLLM to the next: starts must not take most of the time."""

COPIES_MAX = 8
"""An act waits for so many copies of its round to have begun, at most; a round has more."""

LATE_S = 10.0
STOPS_S = (0.3, 2.0, 7.0)
"""Shorter than a lookup may wait for its answer would be no stop at all; the last outlasts every lease."""
CLOCK_STEPS_S = (-3600, 3600, 86_400 * 365, -86_400 * 365)


@dataclasses.dataclass(frozen=True)
class Act:
    """One round's."""

    number: int
    name: str
    after_copies: int
    """It is done when so many copies of its round have begun and one is running."""
    seconds: float
    """How long something stays stopped, exhausted or away."""
    rank: int
    """Which worker, modulo the number of them."""
    clock_steps: tuple[int, ...]
    reset: bool
    """Whether a new vLLM resets its cache, the external one too, before it is asked for anything."""

    @property
    def ends_vllm(self) -> bool:
        return self.name in DEATHS

    def __str__(self) -> str:
        return self.name.replace("_", " ") + (" (then reset)" if self.ends_vllm and self.reset else "")


def draw(
    seed: int, survived: Sequence[str] = SIDECAR_ACTS + ENGINE_STOPS, death_every: int = DEATH_EVERY
) -> Iterator[Act]:
    """Acts without end. Every kind comes once before any comes again, in random order.

    The first death leaves the sidecar alive and is not followed by a reset: a run, however short, shows whether a new
    vLLM finds what a dead one has saved.
    """
    rng = random.Random(f"acts/{seed}")
    others, deaths = _deck(rng, survived), _deck(rng, DEATHS)
    order = list(itertools.islice(deaths, len(DEATHS)))
    order.remove(first := next(name for name in order if name not in NEW_ARENA))
    deaths = itertools.chain([first], order, deaths)
    number = 0
    while True:
        number += 1
        dies = bool(death_every) and number % death_every == 0
        name = next(deaths) if dies else next(others)
        yield Act(
            number=number,
            name=name,
            after_copies=rng.randint(1, COPIES_MAX),
            seconds=LATE_S if name == "kill_sidecar_late" else rng.choice(STOPS_S),
            rank=rng.randrange(8),
            clock_steps=tuple(rng.sample(CLOCK_STEPS_S, len(CLOCK_STEPS_S))),
            reset=rng.random() < 0.5 and number > death_every,
        )


def _deck(rng: random.Random, names: Sequence[str]) -> Iterator[str]:
    while True:
        yield from rng.sample(names, len(names))
