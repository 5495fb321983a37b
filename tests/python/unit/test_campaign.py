"""What a campaign does without servers: it draws acts, counts, and judges. It must notice what it is run for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from campaign import chart, soak
from campaign.acts import Acts
from campaign.hook_times import HookTimes, tail
from campaign.load import HINTS, calls
from campaign.plan import DEATH_EVERY, DEATHS, ENGINE_STOPS, NEW_ARENA, SIDECAR_ACTS, draw
from campaign.servers import Clock
from campaign.soak import Sample, judge, rise, trend, warm
from campaign.tally import OUTLIVED_AFTER, Tally, Turn, rows
from real_vllm.audit import Audit
from real_vllm.script import Signal

SURVIVED = SIDECAR_ACTS + ENGINE_STOPS


def first(count: int, seed: int) -> list[str]:
    return [str(act) for act in itertools.islice(draw(seed), count)]


def test_the_seed_alone_decides() -> None:
    assert first(60, 7) == first(60, 7)
    assert first(60, 7) != first(60, 8)


def test_every_act_has_its_turn_and_deaths_are_rare() -> None:
    acts = list(itertools.islice(draw(3), DEATH_EVERY * len(DEATHS)))
    assert {act.name for act in acts} == {*SURVIVED, *DEATHS}
    assert [act.number for act in acts if act.ends_vllm] == [DEATH_EVERY * (n + 1) for n in range(len(DEATHS))]
    survived = [act.name for act in acts if not act.ends_vllm]
    assert set(survived[: len(SURVIVED)]) == set(SURVIVED)
    assert not any(act.ends_vllm for act in itertools.islice(draw(3, death_every=0), 50))


@pytest.mark.parametrize("every", [1, 3, DEATH_EVERY])
@pytest.mark.parametrize("seed", range(20))
def test_the_first_death_leaves_an_arena_to_the_next_vllm(seed: int, every: int) -> None:
    death = next(act for act in draw(seed, death_every=every) if act.ends_vllm)
    assert death.name not in NEW_ARENA
    assert not death.reset


def written(path: Path, calls: int = 10_000, slow: int = 5, slow_us: float = 400.0, taken: bool = False) -> HookTimes:
    line = {"at": 1.0, "calls": calls, "slow": [["plan busy", slow_us, 90.0, taken]] * slow, "waits_ms": [1.5]}
    path.write_text(json.dumps(line) + "\n")
    return HookTimes(path).read()


def fine() -> Tally:
    tally = Tally(copies=3, running_ms=[10.0, 11.0, 30.0], stopped_ms=[55.0, 57.0, 70.0], stopped_waits_ms=[49.0])
    tally.acts.update(kill_sidecar=1, kill_worker=1)
    tally.inherited = 1
    tally.turns.append(Turn(1.0, 20.0, 32, 64))
    tally.told.update({200: 5, 0: 2, 503: 1, 409: 1})
    return tally


def wrong(tally: Tally, hooks: HookTimes) -> list[str]:
    return [row.name for row in rows(tally, hooks) if row.ok is False]


def test_a_good_campaign_is_well(tmp_path: Path) -> None:
    assert wrong(fine(), written(tmp_path / "hooks")) == []
    assert fine().cost_ms() == (45.0, 40.0, 46.0)


SPOILT: dict[str, Callable[[Tally], object]] = {
    "copies under way": lambda tally: setattr(tally, "copies", 0),
    "wrong answers": lambda tally: tally.difference.wrong.append("another token"),
    "near ties": lambda tally: tally.difference.near_ties.extend(["one", "two"]),
    "hung requests": lambda tally: tally.hung.append("turn1"),
    "failed requests": lambda tally: tally.failed.append("turn1"),
    "hit what was saved before": lambda tally: setattr(tally, "inherited", 0),
    "leaked slots": lambda tally: setattr(tally, "slots_over", 1),
    "by status": lambda tally: tally.told.update({500: 1}),
    "a stopped sidecar costs": lambda tally: tally.stopped_ms.__setitem__(slice(None), [61.0, 62.0, 81.0]),
    "kept waiting": lambda tally: tally.stopped_waits_ms.append(51.5),
    "with other files": lambda tally: tally.cached_of_other_weights.extend([0, 32]),
    "other problems": lambda tally: tally.problems.append("something"),
}


@pytest.mark.parametrize("named", list(SPOILT))
def test_what_is_wrong_is_noticed(named: str, tmp_path: Path) -> None:
    tally = fine()
    SPOILT[named](tally)
    (row,) = wrong(tally, written(tmp_path / "hooks"))
    assert named in row


def test_where_no_vllm_died_none_inherits(tmp_path: Path) -> None:
    tally = fine()
    tally.inherited = tally.acts["kill_worker"] = 0
    assert wrong(tally, written(tmp_path / "hooks")) == []


def test_slots_that_are_left_are_leaks(tmp_path: Path) -> None:
    tally = fine()
    tally.slots_left = 1
    assert len(wrong(tally, written(tmp_path / "hooks"))) == 1


def test_a_leak_is_not_hidden_by_what_was_not_kept() -> None:
    tally = Tally()
    assert tally.unexplained(boot=1, stored=50, used=54) == 4, "not saved yet, or leaked"
    assert tally.unexplained(boot=1, stored=54, used=54) == 0
    assert tally.unexplained(boot=1, stored=90, used=60) == 0, "30 were too late"
    assert tally.unexplained(boot=1, stored=90, used=61) == 1
    assert tally.unexplained(boot=2, stored=10, used=11) == 1
    assert tally.not_kept.total() == 30


def test_a_scheduler_must_have_died_mid_copy(tmp_path: Path) -> None:
    tally = fine()
    tally.acts["stop_worker_kill_scheduler"] = OUTLIVED_AFTER - 1
    assert wrong(tally, written(tmp_path / "hooks")) == []
    tally.acts["stop_worker_kill_scheduler"] = OUTLIVED_AFTER
    (row,) = wrong(tally, written(tmp_path / "hooks"))
    assert "mid-copy" in row
    tally.outlived = 1
    assert wrong(tally, written(tmp_path / "hooks")) == []


class StoppedEngine:
    """What `Acts` sees of a stopped engine: its copies, which there are when it is stopped again, and the sidecar."""

    def __init__(self, kept: int, copied: list[int]) -> None:
        self.audits = itertools.chain(
            [Audit()], itertools.repeat(Audit(open={("e", 1): [(5, slot) for slot in copied]}))
        )
        self.host = {"slots_leased": kept - 1, "slots_draining": 1}

    def audit(self) -> Audit:
        return next(self.audits)

    def get(self, path: str) -> Any:
        return {"boot_id": "5", "engines": [], "tiers": {"host": self.host}}


@pytest.mark.parametrize(
    ("kept", "copied", "problems", "outlived"), [(2, [3, 4], 0, 1), (1, [3, 4], 1, 1), (1, [], 0, 0)]
)
def test_slots_are_watched_that_a_stopped_worker_may_copy(
    kept: int, copied: list[int], problems: int, outlived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (act,) = [
        act for act in itertools.islice(draw(3, death_every=1), len(DEATHS)) if act.name.startswith("stop_worker")
    ]
    seen: Any = StoppedEngine(kept, copied)
    worker, core = pair = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    monkeypatch.setattr("campaign.acts.scheduler", lambda _: core.pid)
    monkeypatch.setattr("campaign.acts.MID_COPY_S", 0.2)
    monkeypatch.setattr(Acts, "_worker", lambda *_: worker.pid)
    monkeypatch.setattr(Acts, "_sidecar", seen)
    tally = Tally()
    try:
        Acts(seen, tally, seen).do(dataclasses.replace(act, seconds=0))
        assert [process.wait(10) for process in pair] == [-signal.SIGKILL] * 2
    finally:
        for process in pair:
            process.kill()
    assert (len(tally.problems), tally.outlived) == (problems, outlived)


def test_slow_hooks_are_noticed(tmp_path: Path) -> None:
    assert len(wrong(fine(), written(tmp_path / "hooks", slow=11, slow_us=1300.0))) == 1
    assert wrong(fine(), written(tmp_path / "hooks", slow=10, slow_us=1300.0)) == []
    assert wrong(fine(), written(tmp_path / "hooks", slow=50, slow_us=1300.0, taken=True)) == []
    assert len(wrong(fine(), written(tmp_path / "hooks", calls=0, slow=0))) == 1


def test_hooks_that_are_slow_after_a_kill_are_noticed_among_many_calls(tmp_path: Path) -> None:
    path = tmp_path / "hooks"
    hooks = written(path, calls=1_000_000)
    slow = {"at": 7.0, "calls": 1000, "slow": [["plan busy", 1300.0, 90.0, False]] * 2, "waits_ms": []}
    with path.open("a") as file:
        file.write(json.dumps(slow) + "\n")
    hooks.read()
    tally = fine()
    assert wrong(tally, hooks) == []
    tally.without_sidecar = [(2.0, 5.0)]
    assert len(wrong(tally, hooks)) == 1
    tally.without_sidecar = [(0.5, 3.0)]
    assert wrong(tally, hooks) == []


def test_the_longest_are_enough_for_a_tail() -> None:
    assert tail([5, 9, 7], 1000, 0.001) == 7
    assert tail([5, 9, 7], 1000, 0.003) == 0


def test_hook_times_are_followed_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "hooks"
    hooks = written(path)
    with path.open("a") as file:
        file.write('{"at": 2.0, "calls": 7')
    assert hooks.read().all().count == 10_000
    with path.open("a") as file:
        file.write(', "slow": [], "waits_ms": []}\n')
    assert (hooks.read().all().count, hooks.waits) == (10_007, [(1.0, 1.5)])


@pytest.mark.parametrize("call", [*HINTS, "retire", "tool_start", "ask_person", "tool_end"])
def test_every_signal_of_a_story_can_be_sent(call: str) -> None:
    sent = calls(Signal(call, "agent", 5), lap=2)
    assert len(sent) == (2 if call == "prefetch_twice" else 1)
    assert all("agent" in json.dumps(one) for one in sent)


def test_the_clock_is_stepped_for_one_process(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    clock.set(-86_400)
    said = subprocess.run(
        ["date", "+%s"], env={**os.environ, **clock.environment()}, capture_output=True, text=True, check=True
    )
    assert 86_300 < time.time() - int(said.stdout) < 86_500


# The soak


def samples(grows: dict[str, float], pids: dict[str, float] | None = None) -> list[Sample]:
    """An hour of it: by role, so many MiB, descriptors and threads more in each hour."""
    made = []
    for number in range(720):
        at = number * 5.0
        processes = {
            role: {
                "pid": (pids or {}).get(role, 0) * (number > 600) + 1,
                "rss_mib": 500.0,
                "anon_mib": 100 + grows.get(role, 0) * at / 3600 + (number * 37 % 11) / 10,
                "descriptors": 20 + round(grows.get(f"{role} descriptors", 0) * at / 3600) + number % 2,
                "threads": 9 + round(grows.get(f"{role} threads", 0) * at / 3600),
            }
            for role in (*soak.JUDGED, "front end")
        }
        made.append(
            Sample(at, processes, {"used": 5, "leased": number % 3, "draining": 0}, 4, {"p50": 9.0, "p95": 12.0})
        )
    return made


def spoilt(grows: dict[str, float], pids: dict[str, float] | None = None) -> list[str]:
    return [row.name for row in judge(samples(grows, pids), 1800) if row.ok is False]


def test_memory_is_judged_once_the_arena_is_full() -> None:
    made = [dataclasses.replace(one, slots={"used": min(number, 500)}) for number, one in enumerate(samples({}, None))]
    judged = warm(made, 1800)
    assert judged == [one for one in made if one.at >= 1800 and one.slots["used"] >= 490]
    assert len(judged) < len([one for one in made if one.at >= 1800])


def test_what_is_flat_is_flat() -> None:
    assert spoilt({"front end": 500.0}) == []


@pytest.mark.parametrize(
    ("series", "an_hour"),
    [("sidecar", 4.0), ("EngineCore", 30.0), ("Worker", 30.0), ("Worker descriptors", 6.0), ("sidecar threads", 6.0)],
)
def test_growth_is_noticed(series: str, an_hour: float) -> None:
    (row,) = spoilt({series: an_hour})
    assert row.startswith(series.split()[0])


def test_a_process_that_was_replaced_proves_nothing() -> None:
    (row,) = spoilt({}, pids={"Worker": 77.0})
    assert "Worker: one process" in row


def test_descriptors_that_an_act_holds_are_no_growth() -> None:
    held = [(float(at), 31.0 if at % 10 == 9 and at > 60 else 16.0) for at in range(100)]
    assert rise(held) == 0
    assert rise([(at, 16 + at // 25) for at, _ in held]) == 3


def test_a_trend_is_told_from_noise() -> None:
    line = trend([(float(at), 5 + at / 10) for at in range(100)])
    assert (round(line.growth, 6), round(line.noise, 6)) == (9.9, 0)


def test_no_process_is_killed_once_deaths_are_over() -> None:
    deaths_over = threading.Event()
    acts = soak.acts(5, deaths_over)
    before = [next(acts) for _ in range(20)]
    deaths_over.set()
    after = [next(acts) for _ in range(20)]
    assert [act.number for act in before if act.ends_vllm] == [2]
    assert {act.name for act in after} == set(soak.GENTLE)
    assert [act.number for act in (*before, *after)] == list(range(1, 41))


def test_the_picture_is_one() -> None:
    acts = [{"at": 30.0, "act": "kill <sidecar>"}]
    root = ElementTree.fromstring(chart.draw(samples({})[:50], acts, 100.0, "a & b"))
    assert len(root.findall(".//{*}polyline")) >= 20
    ElementTree.fromstring(chart.draw([], acts, 100.0, ""))


def test_own_figures_can_be_measured() -> None:
    own = soak.measure(os.getpid())
    assert own["anon_mib"] > 1
    assert own["descriptors"] >= 3
