"""Some rounds of `make faults`: processes die, stop and starve in the middle of copies, and nothing comes of it."""

from __future__ import annotations

import itertools

import pytest

from campaign.plan import DEATHS, SIDECAR_ACTS, draw
from campaign.runner import Failed, prepare
from campaign.servers import SITE
from campaign.tally import Tally, rows, table, wrongs
from real_vllm.audit import Follower
from support.engines import Engines

DEATH_EVERY = 6
"""Rounds from one death of vLLM to the next."""
ROUNDS = 2 * DEATH_EVERY
"""Everything that can happen to the sidecar, and two deaths of vLLM."""
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
    campaign = prepare(engines, witness, tally, say, seed)
    try:
        for act in itertools.islice(draw(seed, SIDECAR_ACTS, DEATH_EVERY), ROUNDS):
            campaign.round(act)
        campaign.measure_stopped()
        campaign.change_weights()
        campaign.last()
    except Failed:
        pass  # It has said why.
    made = rows(tally, campaign.hooks)
    say("\n  ".join(table(made).splitlines()))
    assert not wrongs(tally)
    assert tally.acts.total() == ROUNDS
    assert {*SIDECAR_ACTS} < {*tally.acts}
    alone = [act for act in KILLS if tally.mid_copy[act] < tally.acts[act]]
    assert len(alone) <= 1, f"copies were to be under way at {alone}"
    assert not [row for row in made if row.ok is False and not row.timed]
