"""The scheduler's half of the connector: vLLM's calls, put to the native hooks.

Translates and nothing else. What vLLM's objects mean is in ``compat``; what to do is decided in Rust.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

from greenroom._native import SchedulerHooks
from greenroom.vllm import compat, namespace
from greenroom.vllm.figures import GreenroomStats
from greenroom.vllm.messages import StepMetadata, WorkerReports
from greenroom.vllm.settings import EngineConfig, Settings

POLL_S = 2.0
"""How long an engine that cannot be woken keeps stepping after a turn has ended or a hint has come."""

_log = logging.getLogger("vllm.greenroom")


class SchedulerSide:
    """Lives in vLLM's EngineCore process, on its scheduler's thread."""

    def __init__(self, config: Any, kv_cache_config: Any, settings: Settings, engine: EngineConfig) -> None:
        self._config = config
        self._kv_cache_config = kv_cache_config
        self._layout = compat.layout_name(config, kv_cache_config, settings)
        self._weights = namespace.weights(config)
        self._block_tokens = engine.block_tokens
        self._ahead = compat.tokens_ahead(config)
        self._turns: dict[str, compat.Turn] = {}
        self._around = compat.engine_of_caller()
        self._poll_until = 0.0
        self._figures: dict[str, int] = {}
        self._events = compat.BlockEvents(engine.block_tokens) if compat.wants_events(config) else None
        self._pool: compat.GpuPool | None = None
        self._holders = compat.Holders(compat.seats(config), engine.block_tokens)
        compat.use_recompute_policy(config)
        self._hooks = SchedulerHooks(engine, self._around.wake)
        if self._around.must_poll:
            _log.warning("Greenroom: vLLM's queue was not found; an idle engine notices hints for %.0f s only", POLL_S)

    def bind_pool(self, pool: Any) -> None:
        """vLLM's block pool, once it exists."""
        self._pool = compat.GpuPool(pool, self._block_tokens, self._events)

    # Requests

    def request_enqueued(self, request: Any) -> None:
        """The lookup is sent ahead of the first scheduling attempt."""
        if not self._hooks.has_namespace():
            made_of = namespace.material(self._config, self._kv_cache_config, self._layout, self._weights)
            self._hooks.open_namespace(made_of)
        self._turns[request.request_id] = compat.Turn(request, self._block_tokens)
        self._hooks.turn_started(request.request_id, compat.identity(request), b"".join(request.block_hashes))
        hints = compat.hints_json(request)
        if hints is not None:
            self._hooks.hints(hints)
            self._poll()

    def match(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond the computed ones can be loaded; at least one of the prompt is always computed."""
        turn = self._turns.get(request.request_id)
        if turn is None or computed_tokens % self._block_tokens or request.skip_reading_prefix_cache:
            return 0, False
        assert self._pool is not None
        turn.local = computed_tokens // self._block_tokens
        useful = (request.num_tokens - 1) // self._block_tokens
        holders = self._holders.beside(turn, self._pool.free())
        blocks = self._hooks.match_prefix(request.request_id, turn.local, useful, holders)
        if blocks is None:
            return None, False
        return blocks * self._block_tokens, blocks > 0

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """vLLM has allocated the request's blocks; those after its own hit are loaded."""
        turn = self._turns.get(request.request_id)
        if turn is None:
            return
        external: list[int] = []
        (numbers,) = blocks.get_block_ids()
        self._holders.add(turn, len(numbers))
        if external_tokens > 0:
            external = numbers[turn.local : turn.local + external_tokens // self._block_tokens]
        self._hooks.swap_in(request.request_id, external)

    def request_finished(self, request: Any) -> None:
        """Its blocks are about to be freed."""
        if self._turns.pop(request.request_id, None) is None:
            return
        hashes = compat.finished_hashes(request, self._block_tokens)
        if self._events is not None:
            self._events.remember(request, len(hashes))
        self._hooks.turn_ended(request.request_id, b"".join(hashes))
        self._poll()

    # Steps

    def build_meta(self, output: Any) -> StepMetadata:
        """What the workers do in this step."""
        assert self._pool is not None, "vLLM binds its pool before the first step"
        survey = compat.survey(self._turns.values(), output.num_scheduled_tokens, self._block_tokens, self._ahead)
        for turn, start, end in survey.filled:
            request = turn.request
            self._hooks.blocks_filled(request.request_id, end, b"".join(request.block_hashes[start:end]))
        self._holders.count_anew(survey)
        plan = self._hooks.plan(self._pool, survey.reserve_blocks, survey.handed_out, self._activity(survey))
        return StepMetadata(plan=plan or b"")

    def _activity(self, survey: compat.Survey) -> Literal["busy", "idle", "paused"]:
        if self._around.paused():
            return "paused"
        return "busy" if survey.running + survey.waiting else "idle"

    def take_output(self, output: Any) -> None:
        """The workers' reports: loads that have ended are handed on to vLLM."""
        reports = output.kv_connector_worker_meta
        if not isinstance(reports, WorkerReports):
            return
        assert self._pool is not None
        loaded = {request for report in reports.reports for request in self._hooks.copies_done(self._pool, report)}
        if loaded:
            output.finished_recving = (output.finished_recving or set()) | loaded

    def has_pending_work(self) -> bool:
        """Whether vLLM must keep stepping although it has no request to run."""
        polls = self._around.must_poll and time.monotonic() < self._poll_until
        return polls or self._hooks.pending(self._around.paused())

    def holds_blocks(self) -> bool:
        """Whether blocks become free by waiting a step."""
        return self._hooks.holds_references()

    def reset(self) -> None:
        """Old KV never answers new weights."""
        self._hooks.reset()

    # What others see

    def stats(self) -> GreenroomStats | None:
        """What changed since the last call."""
        figures = self._hooks.figures()
        stats = GreenroomStats.between(self._figures, figures)
        self._figures = figures
        return stats

    def take_events(self) -> list[Any]:
        """KV events for blocks that were brought back: vLLM's pool announces its own only."""
        return self._events.take() if self._events is not None else []

    def close(self) -> None:
        """Ends the connection to the sidecar."""
        self._hooks.close()

    def _poll(self) -> None:
        self._poll_until = time.monotonic() + POLL_S
