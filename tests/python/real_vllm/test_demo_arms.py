"""The demo's arms are what they are called, on a smaller workload than `make demo` has."""

from __future__ import annotations

from demo.arms import Greenroom, Plan, Sample
from real_vllm.rigs import PATIENT, STOCK
from support.engines import Engines

PLAN = Plan(prompt_tokens=3000, agents=1, flood_answer_tokens=256)
"""The small model makes a token so soon that other agents with short answers would miss each other."""
ROUNDS_MAX = 5
"""On a busy machine the other agents' requests may miss each other: the demo, too, takes another sample then."""


def sample(arms: Greenroom, arm: str) -> Sample:
    """The first one in which other agents took the pool."""
    for number in range(ROUNDS_MAX):
        one = arms.sample(arm, number)
        if one.flooded:
            return one
    raise AssertionError(f"{ROUNDS_MAX} floods did not fill the pool at any one moment")


def test_the_arms_prove_what_they_claim(engines: Engines) -> None:
    arms = Greenroom(engines.greenroom(STOCK, **PATIENT), PLAN)
    arms.first_turns()
    for one in (arms.sample("resident", 0), sample(arms, "reactive"), sample(arms, "hinted")):
        assert one.problem is None, one
        assert one.cached_tokens == PLAN.whole_prefix(), one
