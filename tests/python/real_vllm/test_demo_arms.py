"""The demo's arms are what they are called, on a smaller workload than `make demo` has."""

from __future__ import annotations

from demo.arms import Greenroom, Plan, Sample
from real_vllm.rigs import PATIENT, STOCK
from support.engines import Engines

PLAN = Plan(prompt_tokens=3000, agents=1, flood_answer_tokens=256)
"""The small model makes a token so soon that other agents with short answers would miss each other."""
TRIES = 5
"""On a busy machine they may miss each other all the same: the demo, too, takes another sample then."""


def sample(arms: Greenroom, arm: str) -> Sample:
    """The first one of a session whose KV other agents had taken the place of."""
    for number in range(TRIES):
        one = arms.sample(arm, number)
        if one.problem is None or "not evicted" not in one.problem:
            return one
    raise AssertionError(f"{TRIES} floods did not evict the session: {one}")


def test_the_arms_prove_what_they_claim(engines: Engines) -> None:
    arms = Greenroom(engines.greenroom(STOCK, **PATIENT), PLAN)
    arms.first_turns()
    for arm in ("resident", "reactive", "hinted"):
        one = sample(arms, arm)
        assert one.problem is None, one
        assert one.cached_tokens == PLAN.whole_prefix(), one
