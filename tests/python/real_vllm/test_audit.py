"""The audit itself: it must notice what the other tests rely on it for. Needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from real_vllm.audit import Audit, Follower, judge
from real_vllm.plans import Ended, Job, Plan, read_plan, read_report

PLAN = bytes([1, 7, 0, 2, 8, 0, 5, 1, 3, 4, 0x80, 2, 1, 5, 1, 129, 1, 250, 1, 1, 9, 2, 5, 0])
"""fence [7]; no cancel; a demand load and a prefetch; a save of no blocks."""


def test_plan_and_report_are_read_as_postcard_writes_them() -> None:
    loads = [Job(8, "demand", 5, [3], [4]), Job(256, "prefetch", 5, [129], [250])]
    assert read_plan(PLAN) == Plan([7], [], loads, [Job(9, "save", 5, [], [])])
    assert read_plan(b"") == Plan([], [], [], [])
    assert read_report(bytes([0, 2, 8, 1, 0x80, 0x80, 1, 90, 9, 0, 0, 0])) == [Ended(8, True), Ended(9, False)]
    with pytest.raises(ValueError, match="left over"):
        read_plan(PLAN + b"\0")


def record(event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "engine": "e", "at": 1.0, "rank": 0, "ranks": 1, **fields}


def saved(job: int, slots: list[int], hashes: list[str], digests: list[str], ok: bool = True) -> list[dict[str, Any]]:
    return [
        record("planned", job=job, kind="save", boot=1, slots=slots, hashes=hashes),
        record("saving", job=job, digests=digests),
        record("ended", job=job, ok=ok, digests=None),
    ]


def loaded(job: int, slots: list[int], hashes: list[str], digests: list[str]) -> list[dict[str, Any]]:
    return [
        record("planned", job=job, kind="demand", boot=1, slots=slots, hashes=hashes),
        record("ended", job=job, ok=True, digests=digests),
    ]


def prefetched(job: int, slots: list[int], hashes: list[str], digests: list[str]) -> list[dict[str, Any]]:
    return [
        record("planned", job=job, kind="prefetch", boot=1, slots=slots, hashes=None),
        record("ended", job=job, ok=True, digests=digests),
        record("published", job=job, hashes=hashes),
    ]


def judged(*groups: list[dict[str, Any]]) -> Audit:
    return judge([one for group in groups for one in group])


@pytest.mark.parametrize("load", [loaded, prefetched])
def test_same_bytes_under_the_same_hash_are_fine(load: Any) -> None:
    audit = judged(saved(1, [3, 4], ["a", "b"], ["x", "y"]), load(2, [3, 4], ["a", "b"], ["x", "y"]))
    assert not audit.problems
    assert ([one.block_hash for one in audit.loads], audit.saved_blocks, audit.running()) == (["a", "b"], 2, 0)


@pytest.mark.parametrize("load", [loaded, prefetched])
@pytest.mark.parametrize(
    ("hashes", "digests", "says"),
    [(["a"], ["y"], "where x was saved"), (["b"], ["x"], "and a was saved there")],
    ids=["bytes", "hash"],
)
def test_other_bytes_or_another_hash_are_noticed(load: Any, hashes: list[str], digests: list[str], says: str) -> None:
    (problem,) = judged(saved(1, [3], ["a"], ["x"]), load(2, [3], hashes, digests)).problems
    assert says in problem


def test_a_save_that_is_not_finished_must_not_be_read() -> None:
    whole, half = saved(1, [3], ["a"], ["x"]), saved(2, [3], ["b"], ["y"])[:2]
    load = loaded(9, [3], ["a"], ["x"])
    assert "no finished save" in judged(load).problems[0]
    assert "no finished save" in judged(whole, half, load).problems[0]
    assert "no finished save" in judged(saved(1, [3], ["a"], ["x"], ok=False), load).problems[0]
    assert judged(whole, half).running() == 1


def of_both(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One job of two ranks: what is said of it, then what each rank says, the second one last."""
    planned, *ranks = [{**first[0], "ranks": 2}, *first[1:], *({**one, "rank": 1} for one in second[1:])]
    said = [one for one in ranks if one["event"] != "published"]
    return [planned, *said, *(one for one in second if one["event"] == "published")]


@pytest.mark.parametrize("load", [loaded, prefetched])
def test_each_rank_answers_for_its_own_shard(load: Any) -> None:
    save = of_both(saved(1, [3], ["a"], ["x"]), saved(1, [3], ["a"], ["y"]))
    fine = judged(save, of_both(load(2, [3], ["a"], ["x"]), load(2, [3], ["a"], ["y"])))
    assert (fine.problems, fine.saved_blocks, len(fine.loads)) == ([], 1, 1)
    swapped = judged(save, of_both(load(2, [3], ["a"], ["y"]), load(2, [3], ["a"], ["x"])))
    assert "where x/y was saved" in swapped.problems[0]


def test_a_save_is_finished_when_its_last_rank_is() -> None:
    save = of_both(saved(1, [3], ["a"], ["x"]), saved(1, [3], ["a"], ["y"]))
    load = of_both(loaded(2, [3], ["a"], ["x"]), loaded(2, [3], ["a"], ["y"]))
    assert "no finished save" in judged(save[:-1], load).problems[0]
    failed = of_both(saved(1, [3], ["a"], ["x"]), saved(1, [3], ["a"], ["y"], ok=False))
    assert "no finished save" in judged(failed, load).problems[0]


def test_a_load_that_failed_proves_nothing() -> None:
    failed = [
        record("planned", job=2, kind="demand", boot=0, slots=[0], hashes=["a"]),
        record("ended", job=2, ok=False, digests=None),
    ]
    audit = judged(failed)
    assert (audit.problems, audit.loads, audit.failed_jobs) == ([], [], {"demand": 1})


def test_a_log_is_followed_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    follower = Follower(log)
    assert not follower.audit().spans
    lines = [json.dumps(one) + "\n" for one in saved(1, [3], ["a"], ["x"])]
    log.write_text(lines[0] + lines[1][:20])
    assert follower.audit().running() == 1
    log.write_text("".join(lines))
    assert (follower.audit().running(), follower.audit().saved_blocks) == (0, 1)


def test_what_was_running_at_a_time_is_known_afterwards() -> None:
    at = [{**one, "at": 10.0 + number} for number, one in enumerate(saved(1, [3], ["a"], ["x"]))]
    audit = judge(at)
    assert [audit.running(9.5), audit.running(10.0), audit.running(11.9), audit.running(12.0)] == [0, 1, 1, 0]


def test_the_slots_of_copies_under_way_are_known() -> None:
    half, other = saved(1, [3, 4], ["a", "b"], ["x", "y"])[:2], loaded(2, [4, 5], ["b", "c"], ["y", "z"])[:1]
    elsewhere = [{**loaded(3, [6], ["d"], ["u"])[0], "boot": 2}]
    audit = judged(half, other, elsewhere, loaded(4, [7], ["e"], ["v"]))
    assert (audit.copied(1), audit.copied(2), audit.running()) == ({3, 4, 5}, {6}, 3)
    audit.bury()
    assert audit.copied(1) == set()


def test_turns_are_found_by_the_name_their_client_gave() -> None:
    requests = [record("request", id=f"cmpl-turn{n}-0-8f", hashes=["a"]) for n in (1, 11)]
    audit = judge([*requests, {**record("finished", id="cmpl-turn11-0-8f", aborted=True), "at": 2.0}])
    assert (audit.turn("turn1").end, audit.turn("turn11").end) == (None, 2.0)
    assert (audit.turn("turn1").aborted, audit.turn("turn11").aborted) == (False, True)
