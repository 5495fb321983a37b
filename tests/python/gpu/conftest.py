"""Two servers on one GPU, plain vLLM and vLLM with Greenroom, started at once and shared by all tests of this folder.

They want `GPU_PYTHON` to name a Python with vLLM for CUDA and with Greenroom, and a GPU. Without one they are skipped,
or fail if `REQUIRE_GPU` is set. What they measure goes into the file that `GPU_RESULTS` names.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.report import commit, machine
from gpu import moves, sizes, swaps
from gpu.pair import Pair, Record
from real_vllm.rigs import PATIENT
from support import nvidia, rest
from support.flood import prompt
from support.paths import ROOT
from support.servers import Rig, Sidecar, VllmServer, greenroom_transfer_config, vllm_version

_PAIR = pytest.StashKey[Pair]()


def why_not() -> str | None:
    """Why these tests cannot run here; None if they can."""
    if not os.environ.get("GPU_PYTHON"):
        return "GPU_PYTHON does not name a Python that has vLLM for CUDA"
    if not nvidia.is_present() and not os.environ.get(sizes.ON_CPU):
        return f"there is no GPU: {nvidia.CONTROL_DEVICE} does not exist"
    return None


@pytest.fixture(scope="session")
def results() -> Path:
    return Path(os.environ.get("GPU_RESULTS") or ROOT / "target" / "gpu-vllm.json")


@pytest.fixture(scope="session")
def record(results: Path, request: pytest.FixtureRequest) -> Record:
    """Adds figures to the results and prints them. The file is complete after each: a run may be cut off."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    kept: dict[str, Any] = {}

    def add(**figures: Any) -> None:
        kept.update(figures)
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        with capture.global_and_fixture_disabled():
            print(f"\n  {json.dumps(figures, ensure_ascii=False)}", flush=True)

    return add


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest, record: Record) -> Iterator[Pair]:
    reason = why_not()
    if reason is not None:
        (pytest.fail if os.environ.get("REQUIRE_GPU") else pytest.skip)(reason)
    here = sizes.here()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        plain = VllmServer(here.config, name="gpu-plain")
        stack.push(plain.__exit__)
        plain.launch()
        sidecar = stack.enter_context(Sidecar(here.memory, name="gpu-sidecar"))
        transfer = greenroom_transfer_config(here.config.connector, socket=str(sidecar.socket), **PATIENT)
        vllm = VllmServer(here.config, transfer, "gpu-greenroom")
        stack.push(vllm.__exit__)
        vllm.launch()
        made = Pair(plain, Rig(vllm, sidecar), here)
        request.config.stash[_PAIR] = made
        for server in (vllm, plain):
            server.wait_ready()
        record(
            device=nvidia.description(),
            commit=commit(),
            machine=machine(),
            command=shlex.join(["pytest", *sys.argv[1:]]),
            vllm=vllm_version(here.config.version),
            start_s=round(time.monotonic() - began, 1),
            model=here.config.model,
            pool_blocks=here.config.gpu_blocks,
            block_size=here.config.block_size,
            arena=here.memory,
        )
        yield made
    assert not [*vllm.wrongly_said(), *plain.wrongly_said()]


@pytest.fixture
def groups(pair: Pair) -> Iterator[swaps.Groups]:
    """Two groups of sessions, each nearly as large as the pool, that wait for tools. All are in the arena.

    Afterwards nobody waits: sessions that are expected back would be brought back beside the next test.
    """
    made = tuple([f"{group}-{number}" for number in range(pair.sizes.group_sessions)] for group in ("these", "those"))
    for session in (*made[0], *made[1]):
        tokens = prompt(session, pair.sizes.group_tokens)
        known = pair.rig.sidecar.session(session)
        if known is None or known["blocks"]["host"] < pair.sizes.blocks_of(len(tokens)):
            pair.rig.vllm.ask(moves.ask(session, tokens, 2))
            moves.wait_saved(pair.rig, session, pair.sizes.blocks_of(len(tokens)))
    for group in made:
        swaps.send_waiting(pair.rig.sidecar.url, group)
    yield made[0], made[1]
    with contextlib.suppress(OSError):
        for session in (*made[0], *made[1]):
            rest.raw("DELETE", f"{pair.rig.sidecar.url}/v1/sessions/{session}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the ends of the server logs."""
    report = yield
    if report.failed and "pair" in getattr(item, "fixturenames", ()) and _PAIR in item.config.stash:
        report.sections.append(("server logs", item.config.stash[_PAIR].log_tails()))
    return report
