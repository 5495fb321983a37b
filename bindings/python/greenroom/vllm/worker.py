"""The worker's half of the connector: vLLM's calls, put to the native mover.

One step is: ``begin`` before anything computes; ``collect`` before vLLM asks what was loaded and what failed. What the
step writes is saved beside the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from greenroom._native import Mover
from greenroom.vllm import compat
from greenroom.vllm.messages import StepMetadata, WorkerReports
from greenroom.vllm.settings import EngineConfig, KvMemory


class WorkerSide:
    """Lives in a process of vLLM's worker, one per rank."""

    def __init__(self, config: Any, kv_cache_config: Any, engine: EngineConfig) -> None:
        self._rank = compat.rank(config)
        self._kv_cache_config = kv_cache_config
        self._engine = engine
        self._device: Any = None
        self._mover: Mover | None = None
        self._reports: list[bytes] = []
        self._invalid: set[int] = set()

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """The KV cache exists now."""
        self._start(*compat.kv_regions(kv_caches, self._kv_cache_config), kv_caches)

    def register_cross_layers(self, kv_cache: Any) -> None:
        """The KV cache exists now, all layers in one tensor."""
        self._start(*compat.cross_layer_regions(kv_cache, self._kv_cache_config), kv_cache)

    def _start(self, regions: list[compat.Region], device: Any, memory: object) -> None:
        self._device = device
        self._mover = Mover(self._engine, self._rank, KvMemory(compat.cuda_number(device), regions, memory))

    def begin(self, meta: StepMetadata) -> None:
        """Ends what must end before the step's blocks are written; starts copies."""
        if self._mover is not None:
            self._mover.step(meta.plan, compat.compute_stream(self._device))

    def collect(self) -> None:
        """Takes stock of copies that have ended; the answers of this step are from here."""
        if self._mover is None:
            return
        report = self._mover.report()
        if report is not None:
            self._reports.append(report)
        self._invalid |= self._mover.invalid_blocks()

    def take_invalid(self) -> set[int]:
        """Blocks that a request was to load and that hold nothing of use."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_reports(self) -> WorkerReports | None:
        """For the scheduler's half."""
        reports, self._reports = self._reports, []
        return WorkerReports(reports) if reports else None

    def close(self) -> None:
        """Waits for running copies."""
        if self._mover is not None:
            self._mover.close()
            self._mover = None
