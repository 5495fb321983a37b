"""A hint never changes an answer: random sessions on plain vLLM and on vLLM with Greenroom, compared token by token.

What the arena brings back is compared byte by byte with what was saved; see `auditing`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
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
PREEMPTIONS_MIN = 1
EACH_WAY_MIN = 0.1
"""Share of the blocks that turns had from the arena: so many were there before their request, so many were not."""
MUST_HAPPEN = (
    "abort",
    "tool_start 200",
    "tool_end 200",
    # Of a session that nobody knows.
    "tool_end 404",
    "ask_person",
    "prefetch_twice",
    "retire",
    "kv.prefetch accepted",
    "kv.prefetch missing",
    "kv.demote accepted",
    "kv.pin accepted",
    "kv.unpin accepted",
)


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of the full blocks of non-first turns' prompts came from the arena since the session's last turn."""

    blocks: int
    from_arena: int
    prefetched: int
    """How many of those were brought back last by a prefetch."""


def share_from_arena(story: list[script.Wave], log: audit.Audit) -> Share:
    """Of the turns that were not broken off. A block counts if it was loaded between the ends of the two turns."""
    loads: dict[str, list[audit.Loaded]] = {}
    for load in log.loads:
        loads.setdefault(load.block_hash, []).append(load)
    before: dict[str, float] = {}
    blocks = from_arena = prefetched = 0
    for turn in (turn for wave in story for turn in wave.turns):
        seen = [one for one in log.turns.values() if f"-{turn.name}-" in f"-{one.request_id}-"]
        if not seen and turn.abort_after is not None:
            continue  # It hung up before vLLM had parsed its request.
        (request,) = seen
        assert request.end is not None
        if turn.session in before and turn.abort_after is None:
            since = before[turn.session]
            blocks += len(request.hashes)
            for one in request.hashes:
                came = [load.kind for load in loads.get(one, ()) if since < load.at < request.end]
                from_arena += bool(came)
                prefetched += came[-1:] == ["prefetch"]
        before[turn.session] = request.end
    return Share(blocks, from_arena, prefetched)


def test_answers_are_those_of_plain_vllm(
    engines: Engines, witness: audit.Follower, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    story = script.write(seed, TURNS, AUDITED.gpu_blocks)
    plain, rig = engines.both(PLAIN, AUDITED, **PATIENT)
    told = harness.on_plain(plain, story)
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
    happened = signals.happened + Counter(abort=sum(turn.aborted for turn in log.turns.values()))
    figures = {
        "seed": seed,
        "turns": len(answers),
        "preemptions": preempted,
        "tokens": difference.tokens,
        "near_ties": difference.near_ties,
        "happened": dict(sorted(happened.items())),
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
    assert preempted >= PREEMPTIONS_MIN, f"{preempted} preemptions: the squeezes did not overflow the pool"
    assert not [name for name in MUST_HAPPEN if not happened[name]], happened
    assert log.count("demand") + log.count("prefetch") >= LOADED_MIN
    assert share.from_arena * 2 >= share.blocks, share
    assert min(share.prefetched, share.from_arena - share.prefetched) >= EACH_WAY_MIN * share.from_arena, share
