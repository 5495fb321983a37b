"""Sessions that wait cost nothing, and stand in nobody's way."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from real_vllm import steps
from real_vllm.rigs import PATIENT, STOCK
from support.completions import Ask
from support.engines import Engines
from support.process import Process, wait_until
from support.rest import raw
from support.servers import Rig

SESSIONS = 50
FITTING, BEYOND = 4, 20
"""Blocks of each session: all of them fit into the pool; they need more than twice of it."""
MEASURED_S = 10.0
ENGINE_SHARE_MAX = 0.03
"""Of one core: EngineCore and worker together."""
SIDECAR_SHARE_MAX = 0.02
PAUSED_S = 2.0
"""More than an engine takes to tell of a copy."""
STOP_S = 60
RESET_S = 30


@pytest.fixture
def rig(engines: Engines) -> Rig:
    return engines.greenroom(STOCK, **PATIENT)


def wait_for_tools(rig: Rig, blocks: int) -> list[Ask]:
    """So many sessions have had a turn of so many blocks and wait for a tool. Returns when nothing moves any more."""
    asks = [steps.agent(f"waiting-{blocks}-{number}", blocks, max_tokens=2) for number in range(SESSIONS)]
    for ask in asks:
        steps.first_turn(rig, ask)
        rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_start", {"tool": "bash"})
    wait_copied(rig)
    return asks


def wait_copied(rig: Rig) -> None:
    steps.wait_quiet("the end of copies", lambda: copied(rig))


def copied(rig: Rig) -> float:
    """Bytes, both ways. The engine reports them at most once a second, and when it has something to report."""
    return rig.sidecar.metrics().sum("greenroom_copy_bytes_total")


@pytest.fixture
def waiting(request: pytest.FixtureRequest, rig: Rig) -> Iterator[list[Ask]]:
    """50 sessions wait for tools; with the parameter left out they exceed the pool."""
    asks = wait_for_tools(rig, getattr(request, "param", BEYOND))
    yield asks
    assert rig.sidecar.process is not None
    for ask in asks if rig.sidecar.process.running() else ():
        raw("DELETE", f"{rig.sidecar.url}/v1/sessions/{ask.session}")


def cpu_s(process: Process | None, *titles: str) -> float:
    """Processor time so far of the processes with one of these words in their title; of all without any."""
    assert process is not None
    members = [one for one in process.members() if not titles or any(title in one.title for title in titles)]
    assert len(members) >= max(len(titles), 1), [one.title for one in process.members()]
    return sum(one.cpu_s for one in members)


@pytest.mark.parametrize("waiting", [FITTING, BEYOND], ids=["all-fit", "beyond-the-pool"], indirect=True)
def test_waiting_sessions_cost_no_processor_time(
    rig: Rig, waiting: list[Ask], capsys: pytest.CaptureFixture[str]
) -> None:
    before = copied(rig)
    start = (cpu_s(rig.vllm.process, "EngineCore", "Worker"), cpu_s(rig.sidecar.process), time.monotonic())
    # This is the measurement itself, not a wait for anything.
    time.sleep(MEASURED_S)
    seconds = time.monotonic() - start[2]
    engine = (cpu_s(rig.vllm.process, "EngineCore", "Worker") - start[0]) / seconds
    sidecar = (cpu_s(rig.sidecar.process) - start[1]) / seconds
    with capsys.disabled():
        print(f"\n  {len(waiting)} sessions wait: engine and worker {engine:.1%}, sidecar {sidecar:.1%} of a core")
    assert copied(rig) == before, "something was copied: that is not what was to be measured"
    assert sum(rig.sidecar.get("/v1/status")["sessions"].values()) >= SESSIONS
    assert engine <= ENGINE_SHARE_MAX
    assert sidecar <= SIDECAR_SHARE_MAX


def is_evicted(rig: Rig, session: str) -> bool:
    """Whether it is in the arena and has nothing on the GPU."""
    known = rig.sidecar.session(session)
    return known is not None and (known["state"], known["blocks"]["gpu"]) == ("host", 0)


def test_pause_and_resume_while_sessions_wait(rig: Rig, waiting: list[Ask]) -> None:
    for mode in ("abort", "wait", "keep"):
        wait_copied(rig)
        ask = next(ask for ask in waiting if is_evicted(rig, str(ask.session)))
        session = str(ask.session)
        rig.vllm.pause(mode, clear_cache=False)
        # A paused engine starts nothing; the hint is not lost.
        before = copied(rig)
        rig.sidecar.post(f"/v1/sessions/{session}/tool_end", {})
        # Nothing tells that an engine has let a hint lie: this is the time that it has to do otherwise.
        time.sleep(PAUSED_S)
        assert (copied(rig), is_evicted(rig, session)) == (before, True), mode
        rig.vllm.resume()
        steps.wait_back(rig, session, BEYOND)
        loaded = rig.vllm.loaded()
        answer = rig.vllm.ask(ask, timeout_s=60)
        assert (len(answer.tokens), answer.cached_tokens) == (ask.max_tokens, BEYOND * steps.BLOCK)
        assert rig.vllm.loaded() == loaded
        rig.sidecar.post(f"/v1/sessions/{session}/tool_start", {"tool": "bash"})
    # Without being told otherwise vLLM pauses for new weights: nothing of before is an answer to anything.
    rig.vllm.pause()
    rig.vllm.resume()
    assert rig.vllm.ask(waiting[0], timeout_s=60).cached_tokens == 0


def reset(rig: Rig, external: bool = False) -> None:
    """vLLM refuses while any block is referenced, as by a copy for some milliseconds: its user asks again."""
    wait_until("vLLM's consent to a reset", lambda: rig.vllm.reset_prefix_cache(reset_external=external), RESET_S)


def test_what_was_reset_is_never_answered_with(rig: Rig, waiting: list[Ask]) -> None:
    steps.evict(rig, "before-reset")
    reset(rig, external=True)
    for ask in waiting[:5]:
        rig.sidecar.post(f"/v1/sessions/{ask.session}/tool_end", {})
    answers = [rig.vllm.ask(ask, timeout_s=60) for ask in waiting]
    assert [answer.cached_tokens for answer in answers] == [0] * SESSIONS
    # From here on everything is as before.
    steps.wait_saved(rig, str(waiting[0].session), len(waiting[0].prompt) // steps.BLOCK)
    steps.evict(rig, "after-reset")
    assert rig.vllm.ask(waiting[0]).cached_tokens == len(waiting[0].prompt) // steps.BLOCK * steps.BLOCK


def test_reset_of_the_gpu_alone_keeps_the_arena(rig: Rig, waiting: list[Ask]) -> None:
    reset(rig)
    assert rig.vllm.ask(waiting[0]).cached_tokens == len(waiting[0].prompt) // steps.BLOCK * steps.BLOCK


def test_sigterm_ends_both_while_sessions_wait(rig: Rig, waiting: list[Ask]) -> None:
    """Last: the next test that wants this engine starts it anew."""
    assert len(waiting) == SESSIONS
    assert rig.vllm.stop(STOP_S) == 0
    wait_until("the engine's leave", lambda: not rig.sidecar.get("/v1/status")["engines"], 10)
    assert rig.sidecar.stop() == 0
