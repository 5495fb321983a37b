"""The demo's arms are what they are called, on a smaller workload than `make demo` has."""

from __future__ import annotations

from demo.arms import Greenroom, Plan
from real_vllm.rigs import PATIENT, STOCK
from support.engines import Engines

PLAN = Plan(prompt_tokens=3000, agents=1)


def test_the_arms_prove_what_they_claim(engines: Engines) -> None:
    arms = Greenroom(engines.greenroom(STOCK, **PATIENT), PLAN)
    arms.first_turns()
    for arm in ("resident", "reactive", "hinted"):
        one = arms.sample(arm, 0)
        assert one.problem is None, one
        assert one.cached_tokens == PLAN.whole_prefix(), one
