"""The same arrivals with and without Greenroom, to count preemptions: `python -m harness.arrivals`.

Sessions can be written down beforehand: what the model answers follows from its tokens.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from harness.engine import Engine, EngineOptions
from harness.model import VOCABULARY, Truth, next_token
from harness.world import Hints
from support.servers import Sidecar

ROUNDS_MAX = 50_000
SEEDS = 20
KINDS: dict[str, dict[str, Any] | None] = {"vLLM alone": None, "loads on request only": {"prefetch": False}, "all": {}}


@dataclass(frozen=True)
class Arrival:
    """A request, and when its session's tool ended, in rounds."""

    round: int
    tool_ends: int
    request: str
    session: str
    tokens: list[int]
    answer: int


def script(seed: int, sessions: int = 12, turns: int = 5, rounds: int = 500) -> list[Arrival]:
    """Turns of some sessions over so many rounds, in the order in which they arrive."""
    rng = random.Random(seed)
    found: list[Arrival] = []
    for number in range(sessions):
        tokens: list[int] = []
        truth, at = Truth(0), rng.randrange(rounds // 2)
        for turn in range(turns):
            tokens = tokens + [rng.randrange(VOCABULARY) for _ in range(rng.randint(8, 90))]
            answer = rng.randint(1, 80)
            name = f"session-{number}"
            found.append(Arrival(at, at - rng.randint(0, 12), f"{name}/{turn}", name, tokens, answer))
            for _ in range(answer):
                tokens = [*tokens, next_token(truth.of(tokens)[-1].tobytes())]
            at += rng.randint(30, max(31, 2 * rounds // turns))
    return sorted(found, key=lambda arrival: arrival.round)


def play(engine: Engine, arrivals: list[Arrival], hints: Hints | None) -> None:
    """Lets them arrive. With hints each session says when its tool starts and when it ends."""
    coming = list(arrivals)
    ended = sorted(arrivals, key=lambda arrival: arrival.tool_ends)
    by_request = {arrival.request: arrival for arrival in arrivals}
    for now in range(ROUNDS_MAX):
        while hints is not None and ended and ended[0].tool_ends <= now:
            hints.call("POST", f"/v1/sessions/{ended.pop(0).session}/tool_end", {})
        while coming and coming[0].round <= now:
            arrival = coming.pop(0)
            engine.add(arrival.request, arrival.tokens, arrival.answer, arrival.session)
        engine.step()
        answers, engine.answers = engine.answers, []
        for answer in answers:
            arrival = by_request.pop(answer.request)
            assert len(answer.tokens) == arrival.answer, answer
            if hints is not None:
                hints.call("POST", f"/v1/sessions/{arrival.session}/tool_start", {"tool": "bash"})
        if not by_request:
            return
    raise AssertionError(f"after {ROUNDS_MAX} rounds these requests hang: {list(by_request)[:5]}")


def count(extra: dict[str, Any] | None, asynchronous: bool = False) -> Counter[str]:
    """What happens over all seeds; without Greenroom if there is no configuration for it."""
    happened: Counter[str] = Counter()
    with Sidecar("64MiB", name="arrivals") as sidecar:
        for seed in range(SEEDS):
            options = EngineOptions(greenroom=extra is not None, extra=extra or {}, asynchronous=asynchronous)
            engine = Engine(options, sidecar.socket)
            hints = None if extra is None else Hints(sidecar)
            try:
                if hints is not None:
                    engine.until_ready()
                play(engine, script(seed), hints)
                happened += Counter(engine.figures()) if hints is not None else Counter()
                happened += Counter(preemptions=engine.preemptions, steps=engine.steps)
            finally:
                if hints is not None:
                    hints.close()
                engine.close()
    return happened


def main() -> None:
    for asynchronous, (kind, extra) in itertools.product((False, True), KINDS.items()):
        found = count(extra, asynchronous)
        names = ("preemptions", "steps", "demand_blocks", "prefetch_blocks", "prefetch_used")
        scheduler = "AsyncScheduler" if asynchronous else "Scheduler"
        print(f"{scheduler:<15}{kind:<24}" + "   ".join(f"{name} {found[name]}" for name in names), flush=True)


if __name__ == "__main__":
    main()
