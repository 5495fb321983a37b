"""A hint never changes an answer: random sessions on plain vLLM and on vLLM with Greenroom, compared token by token.

What the arena brings back is compared byte by byte with what was saved; see `auditing`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from real_vllm import audit, harness, script
from real_vllm.rigs import AUDITED, PATIENT, PLAIN
from support.engines import Engines
from support.paths import LOGS
from support.process import wait_until

TURNS = 240
LOADED_MIN = 1000
"""Blocks that must have come back; fewer would prove little."""


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of the full blocks of non-first turns' prompts came from the arena since the session's last turn."""

    blocks: int
    from_arena: int


def share_from_arena(story: list[script.Wave], log: audit.Audit) -> Share:
    """Of the turns that were not broken off. A block counts if it was loaded between the ends of the two turns."""
    loads: dict[str, list[float]] = {}
    for load in log.loads:
        loads.setdefault(load.block_hash, []).append(load.at)
    before: dict[str, float] = {}
    blocks = from_arena = 0
    for turn in (turn for wave in story for turn in wave.turns):
        seen = [one for one in log.turns.values() if f"-{turn.name}-" in f"-{one.request_id}-"]
        if not seen and turn.abort_after is not None:
            continue  # It hung up before vLLM had parsed its request.
        (request,) = seen
        assert request.end is not None
        if turn.session in before and turn.abort_after is None:
            since = before[turn.session]
            blocks += len(request.hashes)
            came = [one for one in request.hashes if any(since < at < request.end for at in loads.get(one, ()))]
            from_arena += len(came)
        before[turn.session] = request.end
    return Share(blocks, from_arena)


def test_answers_are_those_of_plain_vllm(
    engines: Engines, witness: audit.Follower, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    story = script.write(seed, TURNS, AUDITED.gpu_blocks)
    told = harness.on_plain(engines.plain(PLAIN), story)
    rig = engines.greenroom(AUDITED, **PATIENT)
    preempted = rig.vllm.preemptions()
    signals = harness.Harness(rig.sidecar)
    answers = harness.on_greenroom(rig, story, told, signals)
    preempted = rig.vllm.preemptions() - preempted
    wait_until("the end of all copies", lambda: witness.audit().running() == 0, 30)
    log = witness.audit()

    difference = harness.Difference()
    for one in (one for wave in told for one in wave):
        if one.answer is not None:
            difference.add(one.turn.name, one.answer, answers[one.turn.name])
    share = share_from_arena(story, log)
    figures = {
        "seed": seed,
        "turns": len(answers),
        "aborted": sum(turn.abort_after is not None for wave in story for turn in wave.turns),
        "preemptions": preempted,
        "tokens": difference.tokens,
        "near_ties": difference.near_ties,
        "hints": dict(sorted(signals.outcomes.items())),
        "saved_blocks": log.saved_blocks,
        "demand_blocks": log.count("demand"),
        "prefetch_blocks": log.count("prefetch"),
        "failed_jobs": log.failed_jobs,
        "share": dataclasses.asdict(share),
    }
    Path(LOGS / "answers.json").write_text(json.dumps(figures, indent=1) + "\n")
    with capsys.disabled():
        print(f"  {figures}", flush=True)

    assert not log.problems, "\n".join(log.problems[:20])
    difference.check()
    assert len(answers) >= 200
    assert preempted > 0
    assert log.count("demand") + log.count("prefetch") >= LOADED_MIN
    assert min(log.count("demand"), log.count("prefetch")) > 0
    assert share.from_arena * 2 >= share.blocks, share
