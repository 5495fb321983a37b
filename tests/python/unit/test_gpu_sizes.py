"""The sizes of the GPU tests, which nobody sees fail before a GPU is lent."""

from __future__ import annotations

import pytest
from gpu.moves import FLOOD_AGENTS, FLOOD_SPARE
from gpu.sizes import CPU, GPU, Sizes

from support import nvidia


@pytest.mark.parametrize("sizes", [CPU, GPU], ids=["cpu", "gpu"])
def test_two_groups_do_not_fit_and_everything_else_does(sizes: Sizes) -> None:
    block, pool = sizes.config.block_size, sizes.pool() - 1
    group = sizes.group_sessions * sizes.blocks_of(sizes.group_tokens)
    assert 2 * group > 1.2 * pool, "both groups stay in the pool: nothing would be swapped"
    assert group < 0.9 * pool
    assert sizes.config.max_model_len <= pool * block, "vLLM does not start"
    each = (pool - FLOOD_AGENTS * FLOOD_SPARE) // FLOOD_AGENTS * block
    assert sizes.flood_answer_tokens < each <= sizes.config.max_model_len
    assert sizes.agent_tokens + 2 * sizes.answer_tokens + 100 < min(sizes.group_tokens, sizes.config.max_model_len)


def test_nvidia_smi_that_is_not_there_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert nvidia.ask("--query-gpu=name") == []
    assert nvidia.memory_mib({1}) is None
    assert nvidia.description() == "unknown"


def test_memory_is_that_of_the_processes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "ask", lambda query: [["11", "500"], ["12", "20"], ["13", "7"]])
    assert nvidia.memory_mib({11, 13}) == 507
    monkeypatch.setattr(nvidia, "ask", lambda query: [["11", "[N/A]"]])
    assert nvidia.memory_mib({11}) is None
