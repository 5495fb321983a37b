"""Some rounds of `make faults`: processes die, stop and starve in the middle of copies, and nothing comes of it."""

from __future__ import annotations

import itertools

import pytest

from campaign.hook_times import HookTimes
from campaign.plan import DEATHS, ENGINE_STOPS, SIDECAR_ACTS, draw
from campaign.runner import Failed, prepare
from campaign.servers import SITE
from campaign.tally import Tally, rows, table, wrongs
from real_vllm.audit import Follower
from support.engines import Engines

DEATHS_HERE = 2
"""Each costs a start of vLLM."""
ROUNDS = len(SIDECAR_ACTS + ENGINE_STOPS) + DEATHS_HERE
"""Everything that vLLM survives, and these."""
DEATH_EVERY = ROUNDS // DEATHS_HERE
"""Rounds from one death of vLLM to the next."""
KILLS = {*DEATHS, *(act for act in SIDECAR_ACTS if act.startswith("kill"))}


def test_deaths_and_shortages_cost_no_answer(
    engines: Engines, witness: Follower, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if not SITE.exists():
        pytest.skip("needs the build with fault points: make faults-wheel")

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"  {line}", flush=True)

    tally = Tally()
    try:
        acts = itertools.islice(draw(seed, death_every=DEATH_EVERY), ROUNDS)
        prepare(engines, witness, tally, say, seed).run(acts)
    except Failed:
        pass  # It has said why.
    made = rows(tally, HookTimes().read())
    say("\n  ".join(table(made).splitlines()))
    assert not wrongs(tally)
    assert tally.acts.total() == ROUNDS
    assert {*SIDECAR_ACTS, *ENGINE_STOPS} < {*tally.acts}
    alone = [act for act in KILLS if tally.mid_copy[act] < tally.acts[act]]
    assert len(alone) <= 1, f"copies were to be under way at {alone}"
    assert not [row for row in made if row.ok is False and not row.timed]
