"""A sidecar that does not answer, under the patience that users have: `lookup_wait_ms` is left at its default."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator

import pytest

from real_vllm import steps
from real_vllm.rigs import PLAIN, STOCK
from support.engines import Engines
from support.process import Process, wait_until
from support.servers import Rig

AGENTS = 3
BLOCKS = 20
WHOLE = BLOCKS * steps.BLOCK
COUNTED_S = 10
RESUMED_S = 60


@pytest.fixture
def rig(engines: Engines) -> Rig:
    return engines.both(PLAIN, STOCK)[1]


@pytest.fixture
def sidecar(rig: Rig) -> Iterator[Process]:
    """Goes on whatever happens in between."""
    assert rig.sidecar.process is not None
    yield rig.sidecar.process
    rig.sidecar.process.signal(signal.SIGCONT)


def timeouts(rig: Rig) -> float:
    return rig.vllm.metrics().sum("vllm:greenroom_timeouts_total")


def test_a_stopped_sidecar_is_a_miss(engines: Engines, rig: Rig, sidecar: Process) -> None:
    asks = [steps.agent(f"stopped-{number}", BLOCKS) for number in range(AGENTS)]
    expected = steps.right(engines, *asks)
    for ask in asks:
        steps.first_turn(rig, ask)
    steps.evict(rig, "only-the-sidecar-has-them")
    before = timeouts(rig)
    sidecar.signal(signal.SIGSTOP)
    answers = [rig.vllm.ask(ask) for ask in asks]
    sidecar.signal(signal.SIGCONT)
    assert [answer.tokens for answer in answers] == expected
    assert [answer.cached_tokens for answer in answers] == [0] * AGENTS
    wait_until("the count of timeouts", lambda: timeouts(rig) - before >= AGENTS, COUNTED_S)

    floods = itertools.count()

    def hits() -> bool:
        steps.evict(rig, f"again-{next(floods)}")
        return rig.vllm.ask(asks[0]).cached_tokens == WHOLE

    # More than once: a busy machine may use up the default patience, too.
    wait_until("hits", hits, RESUMED_S, poll_s=0)
    assert rig.vllm.ask(asks[0]).tokens == expected[0]
