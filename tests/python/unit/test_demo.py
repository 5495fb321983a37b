"""The demo's arithmetic and its judgement of samples; the servers are not needed for that."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest

from demo import report
from demo.__main__ import GPU, configuration
from demo.arms import ARMS, Plan, Sample, problem
from demo.stats import compare, percentile

PLAN = Plan()
WHOLE = PLAN.whole_prefix()
GOOD = {
    "resident": Sample("resident", 0, 50.0, WHOLE),
    "recompute": Sample("recompute", 0, 3000.0, 0),
    "reactive": Sample("reactive", 0, 100.0, WHOLE, from_arena=WHOLE),
    "hinted": Sample("hinted", 0, 51.0, WHOLE, brought_back=WHOLE, ready_ms=30.0),
}


def samples(rounds: int = 30) -> list[Sample]:
    """Valid samples whose times differ by round more than by arm, as on a busy machine."""
    rng = random.Random(5)
    made = []
    for number in range(rounds):
        slow = rng.uniform(1, 3)
        for arm in ARMS:
            made.append(dataclasses.replace(GOOD[arm], round=number, ttft_ms=GOOD[arm].ttft_ms * slow))
    return made


def test_percentile() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([1, 2, 3, 4], 1.0) == 4
    assert percentile([], 0.5) != percentile([], 0.5)


def test_pairing_takes_out_what_both_arms_share() -> None:
    rng = random.Random(3)
    pairs = [(1.02 * slow, slow) for slow in (rng.uniform(1, 3) for _ in range(40))]
    made = compare(("a", "b"), pairs, seed=1)
    assert made.p50_ratio == pytest.approx(1.02)
    assert made.ci95 == pytest.approx((1.02, 1.02))
    assert made.significant()
    assert compare(("a", "b"), pairs, seed=1) == made


def test_interval_is_wide_where_pairs_disagree() -> None:
    rng = random.Random(4)
    pairs = [(rng.uniform(1, 3), rng.uniform(1, 3)) for _ in range(40)]
    low, high = compare(("a", "b"), pairs, seed=1).ci95
    assert low < 1 < high
    assert high - low > 0.1


@pytest.mark.parametrize("arm", ARMS)
def test_good_samples_are_valid(arm: str) -> None:
    assert problem(GOOD[arm], PLAN) is None


@pytest.mark.parametrize(
    ("arm", "change", "word"),
    [
        ("recompute", {"cached_tokens": 32}, "cached"),
        ("resident", {"cached_tokens": WHOLE - 32}, "cached"),
        ("resident", {"from_arena": 32}, "load"),
        ("reactive", {"from_arena": 0}, "not evicted"),
        ("hinted", {"brought_back": 0}, "not evicted"),
        ("hinted", {"from_arena": 64}, "still had to load"),
    ],
)
def test_samples_that_are_not_what_they_say(arm: str, change: dict[str, int], word: str) -> None:
    said = problem(dataclasses.replace(GOOD[arm], **change), PLAN)  # type: ignore[arg-type]
    assert said is not None
    assert word in said


def test_summary_has_the_contract_and_survives_json(tmp_path: Path) -> None:
    made = samples()
    content = report.summary(made, report.comparisons(made, seed=1), {"seed": 1, "command": "python -m demo"})
    report.write(tmp_path, content, report.chart(made, "a & b"))
    read = json.loads((tmp_path / "demo.json").read_text())
    assert list(read["arms"]) == list(ARMS)
    for arm in ARMS:
        times = read["arms"][arm]["ttft_ms"]
        assert times["samples"] == len(times["values"]) == 30
        assert times["p50"] <= times["p95"]
    assert read["arms"]["hinted"]["cached_tokens"] == WHOLE
    assert read["arms"]["recompute"]["cached_tokens"] == 0
    assert read["valid"] is True
    assert all(bar["met"] for bar in read["bars"])
    assert {"machine", "commit", "seed", "command"} <= read.keys()
    ElementTree.parse(tmp_path / "demo.svg")


def test_on_a_gpu_only_the_bar_that_every_machine_has_is_judged() -> None:
    made = report.comparisons(samples(), seed=1)
    assert [bar.name for bar in report.bars(made, cuda=True)] == [bar.name for bar in report.bars(made)][:1]
    assert "recompute ÷ hinted, P50" not in report.table(samples(), made, cuda=True)


def test_the_gpu_workload_fits_into_its_pool() -> None:
    plan = Plan(prompt_tokens=GPU.prompt_tokens, block_size=GPU.block_size)
    config = configuration(GPU, GPU.model, plan, token_bytes=128 << 10)
    assert config.cuda is not None
    assert plan.prompt_tokens < config.max_model_len <= (config.gpu_blocks - 1) * config.block_size
    assert config.cuda.pool_bytes == config.gpu_blocks * config.block_size * (128 << 10)
    assert "--enforce-eager" not in config.cuda.flags()


def test_too_few_valid_samples_make_the_run_invalid() -> None:
    made = [
        dataclasses.replace(each, problem="it was not evicted") if each.arm == "hinted" and each.round == 3 else each
        for each in samples()
    ]
    reasons = report.reasons(made)
    assert len(reasons) == 1
    assert "hinted: 29" in reasons[0]
    assert "not evicted" in reasons[0]


def test_nothing_measured_is_said_and_not_hidden(tmp_path: Path) -> None:
    content = report.summary([], report.comparisons([], seed=1), {})
    report.write(tmp_path, content, report.chart([], ""))
    assert json.loads((tmp_path / "demo.json").read_text())["valid"] is False
    assert "NOT met" in report.table([], report.comparisons([], seed=1))
