"""Order, seed and audit of the tests on real servers."""

from __future__ import annotations

import os
import random

import pytest

from real_vllm.audit import Follower
from real_vllm.rigs import AUDIT_LOG

ORDER = (
    "test_audit",
    "test_026",
    "test_plain_servers",
    "test_answers",
    "test_pressure",
    "test_campaign",
    "test_lora",
    "test_speculation",
    "test_quantised",
    "test_two_ranks",
    "test_demo_arms",
    "test_idle",
    "test_stopped",
    "test_embedded",
)
"""Tests of one engine follow each other, and those that kill it come last: that saves starts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [index for index, item in enumerate(items) if item.nodeid.partition("::")[0].find("real_vllm/") >= 0]
    ordered = sorted((items[index] for index in here), key=lambda item: ORDER.index(item.path.stem))
    for index, item in zip(here, ordered, strict=True):
        items[index] = item


@pytest.fixture(scope="session")
def witness() -> Follower:
    """What has become of the audited engines' copies; to be asked for before the first of them starts."""
    AUDIT_LOG.unlink(missing_ok=True)
    return Follower(AUDIT_LOG)


@pytest.fixture
def seed(capsys: pytest.CaptureFixture[str]) -> int:
    """Another one in every run, printed; `GREENROOM_SEED` replays one."""
    chosen = int(os.environ.get("GREENROOM_SEED") or random.randrange(1 << 32))
    with capsys.disabled():
        print(f"\n  GREENROOM_SEED={chosen}", flush=True)
    return chosen
