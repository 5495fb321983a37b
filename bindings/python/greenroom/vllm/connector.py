"""``GreenroomConnector``, the class that vLLM drives.

vLLM builds one for its scheduler and one for each worker, from the same configuration; both may live in one process.
Each method hands over to the half it belongs to. Nothing here waits, retries or decides; ``embedded`` starts a private
sidecar before vLLM serves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from greenroom.vllm import compat
from greenroom.vllm.compat import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from greenroom.vllm.embedded import EmbeddedSidecar
from greenroom.vllm.figures import GreenroomPromMetrics, GreenroomStats
from greenroom.vllm.messages import StepMetadata, WorkerReports
from greenroom.vllm.scheduler import SchedulerSide
from greenroom.vllm.settings import EngineConfig, Settings
from greenroom.vllm.worker import WorkerSide


class GreenroomConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Keeps KV in the sidecar's host memory and brings it back; see the package's documentation."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = _settings(vllm_config)
        compat.check_config(vllm_config, settings)
        geometry = compat.check_geometry(vllm_config, kv_cache_config)
        engine_id = vllm_config.kv_transfer_config.engine_id
        self._sidecar = None if settings.socket else EmbeddedSidecar(engine_id, settings)
        engine = EngineConfig(
            socket=settings.socket or str(self._sidecar.socket),  # type: ignore[union-attr]
            engine_id=engine_id,
            rank_bytes=geometry.rank_bytes,
            ranks=geometry.ranks,
            block_tokens=geometry.block_tokens,
            gpu_blocks=geometry.gpu_blocks,
            lookup_wait_ms=settings.lookup_wait_ms,
            gpu_hold_ratio=settings.gpu_hold_ratio,
            prefetch=settings.prefetch,
            copy_method=settings.copy_method,
            copy_sub_batch_kib=settings.copy_sub_batch_kib,
        )
        self._scheduler_side: SchedulerSide | None = None
        self._worker_side: WorkerSide | None = None
        self._prefers_cross_layers = compat.wants_cross_layers(settings)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler_side = SchedulerSide(vllm_config, kv_cache_config, settings, engine)
        else:
            self._worker_side = WorkerSide(vllm_config, kv_cache_config, engine)

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self._scheduler_side is not None, "a call for the scheduler's connector"
        return self._scheduler_side

    @property
    def _worker(self) -> WorkerSide:
        assert self._worker_side is not None, "a call for a worker's connector"
        return self._worker_side

    # Both halves

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a later miss, not a lost answer."""
        return False

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """0.26's word for a block-outermost layout."""
        return self._prefers_cross_layers

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """A wish: vLLM keeps its own layout, with a warning, where the attention backend cannot follow."""
        return compat.required_layout(_settings(vllm_config))

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> GreenroomStats:
        """Figures out of the data that vLLM carried to its front end."""
        return GreenroomStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> GreenroomPromMetrics:
        """The figures in vLLM's own ``/metrics``."""
        return GreenroomPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_kv_connector_stats(self) -> GreenroomStats | None:
        """What changed since the last step."""
        return self._scheduler_side.stats() if self._scheduler_side is not None else None

    def shutdown(self) -> None:
        """Ends copies and connections, and the embedded sidecar where this process started it."""
        if self._scheduler_side is not None:
            self._scheduler_side.close()
        if self._worker_side is not None:
            self._worker_side.close()
        if self._sidecar is not None:
            self._sidecar.close()

    # The scheduler's half

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Before the first step."""
        self._scheduler.bind_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """A request was enqueued."""
        self._scheduler.request_enqueued(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded; None: ask again."""
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its blocks."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Once per step."""
        return self._scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers reported."""
        self._scheduler.take_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """vLLM may free the blocks at once: what is unsaved is found again by its hash, or fenced."""
        self._scheduler.request_finished(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether to keep stepping."""
        return self._scheduler.has_pending_work()

    def has_pending_block_frees(self) -> bool:
        """Whether to wait instead of preempting."""
        return self._scheduler.holds_blocks()

    def take_events(self) -> Iterable[Any]:
        """KV events of blocks that came back."""
        return self._scheduler.take_events()

    def reset_cache(self) -> bool:
        """Weights were changed, or the engine goes to sleep."""
        self._scheduler.reset()
        return True

    # The worker's half

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Before any CUDA graph is captured."""
        self._worker.register(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        """In place of ``register_kv_caches``, on 0.26 with ``prefer_cross_layer_blocks``."""
        self._worker.register_cross_layers(kv_cache)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """vLLM calls it first in every step, with or without a forward pass."""
        assert isinstance(kv_connector_metadata, StepMetadata)
        self._worker.begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads have been started already."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No layer waits: requests start when their whole load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole."""

    def wait_for_save(self) -> None:
        """No step waits: its blocks are saved beside the next one."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """vLLM's first question after a step; the scheduler's half turns reports into finished loads."""
        self._worker.collect()
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks to recompute."""
        return self._worker.take_invalid()

    def build_connector_worker_meta(self) -> WorkerReports | None:
        """This rank's report."""
        return self._worker.take_reports()


def _settings(vllm_config: Any) -> Settings:
    return Settings.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
