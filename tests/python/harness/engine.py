"""vLLM's engine loop around its real scheduler and the real connector, in this process, with the model of ``model``.

What is vLLM's own: ``Scheduler`` or ``AsyncScheduler``, the KV cache manager and its pool, block hashing, the order in
which a model runner calls the worker's connector. What stands in for vLLM: the loop of ``EngineCore.step`` and
``step_with_batch_queue``, and the part of the model runner that keeps requests' tokens and block tables.
"""

from __future__ import annotations

import os

# Read when vLLM is imported, and only here: servers that other tests start would inherit it. The model runner that the
# harness plays is the first one.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import dataclasses
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from harness.model import TOKEN_BYTES, Pool, Truth
from harness.worker import LAYER, Worker, WorkerProcess
from support.process import wait_until
from support.servers import greenroom_transfer_config, model_folder

TOKENS_MAX = 1 << 15
READY_S = 20
SETTLE_S = 20.0
"""Not a number of steps: one that only waits for the sidecar takes no time."""
BATCHES_AHEAD = 2
"""With the asynchronous scheduler a batch is scheduled while the one before it is out, as in vLLM."""


FirstKey = tuple[int, bytes]
"""Weights, and the hash of a block. Weights 0 are those in the model's files, with which every engine starts."""


class WrongBytes(AssertionError):
    """A request reads KV that is not the one of its tokens."""


class ReserveTaken(AssertionError):
    """A fetch took blocks that requests need (invariant 3)."""


class CheckedHooks:
    """The native hooks, with an eye on what a plan takes from the pool."""

    def __init__(self, hooks: Any, needed: Callable[[], int]) -> None:
        """``needed``: see ``Engine.needed_blocks``."""
        self._hooks = hooks
        self._needed = needed
        self.starved: list[str] = []
        """Running requests that this step could not give a block."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)

    def plan(self, pool: Any, reserve: int, handed_out: int, activity: str) -> bytes | None:
        """After a fetch as many blocks are free as requests need."""
        taken = 0

        def take(count: int) -> list[int] | None:
            nonlocal taken
            blocks: list[int] | None = type(pool).take(pool, count)
            taken += len(blocks or ())
            return blocks

        pool.take = take
        plan: bytes | None = self._hooks.plan(pool, reserve, handed_out, activity)
        if taken and pool.free() < self._needed():
            raise ReserveTaken(
                f"a fetch of {taken} blocks leaves {pool.free()} free, and requests need {self._needed()}"
            )
        if taken and self.starved:
            raise ReserveTaken(
                f"a fetch of {taken} blocks while {self.starved} wait for blocks in the middle of a turn"
            )
        return plan


@dataclass(frozen=True)
class EngineOptions:
    """Size and kind of an engine."""

    blocks: int = 64
    """Of the pool, vLLM's null block included."""
    block_tokens: int = 16
    running_max: int = 4
    step_tokens: int = 64
    asynchronous: bool = False
    ranks: int = 1
    processes: bool = False
    """Whether each worker has a process of its own. It can be killed then."""
    greenroom: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    """``kv_connector_extra_config``, besides the socket."""


@dataclass
class Runner:
    """What a model runner keeps of one request."""

    tokens: list[int]
    prompt: int
    blocks: list[int]
    weights: int


@dataclass
class Answer:
    """A request that has ended."""

    request: str
    tokens: list[int]
    """Those that were generated."""
    reason: str


def vllm_config(options: EngineOptions, socket: Path | None) -> VllmConfig:
    """As the server would make it from its flags."""
    transfer = None
    if options.greenroom:
        assert socket is not None, "an engine with Greenroom needs a sidecar's socket"
        transfer = KVTransferConfig(
            # Forced, for the harness also meets a release before the servers' tests can run on it.
            **greenroom_transfer_config(socket=str(socket), force=True, **options.extra),
            engine_id=f"harness-{uuid.uuid4()}",
        )
    config = EngineArgs(
        model=str(model_folder("tiny")),
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=options.block_tokens,
        max_model_len=TOKENS_MAX,
        max_num_seqs=options.running_max,
        max_num_batched_tokens=options.step_tokens,
        async_scheduling=options.asynchronous,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        tensor_parallel_size=options.ranks,
        distributed_executor_backend="mp" if options.ranks > 1 else None,
        disable_log_stats=True,
        kv_transfer_config=transfer,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = options.blocks
    # What may be longer than the pool is refused by the front end, which is not here.
    config.model_config.max_model_len = min(TOKENS_MAX, (options.blocks - 1) * options.block_tokens)
    return config


class Engine:
    """One engine. ``step`` does what one round of vLLM's busy loop does."""

    def __init__(
        self, options: EngineOptions, socket: Path | None = None, first_digests: dict[FirstKey, bytes] | None = None
    ) -> None:
        """``first_digests``: of the engines before this one."""
        self.options = options
        self.config = vllm_config(options, socket)
        self.weights = 0
        self.pool = Pool(options.blocks, options.block_tokens, options.ranks)
        self.truths: dict[str, Truth] = {}
        """By session, so that a turn computes what is new in it only."""
        self.first_digests = {} if first_digests is None else first_digests
        self.answers: list[Answer] = []
        self.preemptions = 0
        self.steps = 0
        self._kv = self._kv_cache_config()
        hash_fn = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(options.block_tokens, hash_fn)
        kind = AsyncScheduler if options.asynchronous else Scheduler
        self.scheduler = kind(
            vllm_config=self.config,
            kv_cache_config=self._kv,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=options.block_tokens,
            log_stats=False,
        )
        self.workers = [self._worker(rank) for rank in range(options.ranks)] if options.greenroom else []
        self._aggregator = KVOutputAggregator(options.ranks)
        if self.scheduler.connector is not None:
            self._watch_connector(self.scheduler.connector)
        self._runners: dict[str, Runner] = {}
        self._outputs: dict[str, list[int]] = {}
        self._sessions: dict[str, str] = {}
        self._batches: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def _kv_cache_config(self) -> KVCacheConfig:
        options = self.options
        spec = FullAttentionSpec(
            block_size=options.block_tokens,
            num_kv_heads=1,
            head_size=TOKEN_BYTES // 8 // options.ranks,
            dtype=torch.float32,
        )
        page = spec.page_size_bytes
        assert page * options.ranks == options.block_tokens * TOKEN_BYTES, "an entry is one token's K and V"
        size = page * options.blocks
        tensor = KVCacheTensor(size=size, layers=[LAYER], layer_stride=size, block_stride=page)
        return KVCacheConfig(
            num_blocks=options.blocks,
            kv_cache_tensors=[tensor],
            kv_cache_groups=[KVCacheGroupSpec([LAYER], spec)],
            hash_block_size=options.block_tokens,
        )

    def _watch_connector(self, connector: Any) -> None:
        side, build = connector._scheduler_side, connector.build_connector_meta
        scheduled: Mapping[str, int] = {}
        side._hooks = checked = CheckedHooks(side._hooks, lambda: self.needed_blocks(scheduled))

        def build_meta(output: SchedulerOutput) -> Any:
            nonlocal scheduled
            scheduled = output.num_scheduled_tokens
            # A step ahead of its outputs also leaves out what has nothing to compute yet.
            if not self.options.asynchronous and output.total_num_scheduled_tokens < self.options.step_tokens:
                running = [one.request_id for one in self.scheduler.running]
                checked.starved = [one for one in running if one not in output.num_scheduled_tokens]
            return build(output)

        connector.build_connector_meta = build_meta

    def _worker(self, rank: int) -> Worker | WorkerProcess:
        shard = self.pool.shards[rank]
        if self.options.processes:
            return WorkerProcess(self.config, self._kv, rank, shard)
        return Worker(self.config, self._kv, rank, shard.entries)

    def set_fault(self, name: str, actions: str) -> None:
        """A fault point of the workers: see ``faults``."""
        for worker in self.workers if self.options.processes else self.workers[:1]:
            worker.set_fault(name, actions)

    def figures(self) -> dict[str, int]:
        """What the connector's hooks have counted."""
        assert self.scheduler.connector is not None
        counted: dict[str, int] = self.scheduler.connector._scheduler_side._hooks.figures()
        return counted

    def until_ready(self) -> None:
        """The first request opens the namespace; then the sidecar is connected and its arena mapped."""
        self.add("first", [0], 1, "first")

        def ready() -> bool:
            self.idle_step()
            return bool(self.figures()["ready"]) and not self.alive()

        wait_until("the engine is connected", ready, READY_S, poll_s=0.001)
        self.answers.clear()

    def idle_step(self) -> None:
        """A step even without work, with an empty batch if there is none: the connector takes in what has arrived."""
        self.drain()
        scheduled = self.scheduler.schedule()
        self._batches.append((scheduled, self._execute(scheduled)))
        self.drain()

    def close(self) -> None:
        """Ends both halves of the connector."""
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.close()
        self.pool.close()

    def kill_scheduler(self) -> None:
        """As `kill -9` of EngineCore: its connection ends and nothing is said. Its workers go on with their copies."""
        self.scheduler.shutdown()

    def kill_workers(self) -> None:
        """`kill -9` of every worker process, in the middle of whatever they do."""
        for worker in self.workers:
            assert isinstance(worker, WorkerProcess), "only a process can be killed"
            worker.kill()

    # Requests

    def add(self, request_id: str, tokens: Sequence[int], answer: int, session: str) -> None:
        """A request of ``session`` that asks for ``answer`` tokens."""
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0),
            pooling_params=None,
            block_hasher=self._hasher,
            session_id=session,
        )
        self._outputs[request_id] = []
        self._sessions[request_id] = session
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        """The client hangs up."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self._ended(request_id, "abort")

    def is_free(self, request_id: str) -> bool:
        """Whether a request may have this id: vLLM has forgotten the one before, which a load may delay, and no batch
        with it is out."""
        out = any(request_id in scheduled.num_scheduled_tokens for scheduled, _ in self._batches)
        return not out and request_id not in self.scheduler.requests

    def alive(self) -> list[str]:
        """Requests that have not ended."""
        return list(self._outputs)

    def _ended(self, request_id: str, reason: str) -> None:
        tokens = self._outputs.pop(request_id)
        self.answers.append(Answer(request_id, tokens, reason))

    # Steps

    def has_work(self) -> bool:
        """Whether vLLM's busy loop would go on."""
        return bool(self._batches) or self.scheduler.has_requests()

    def batches_out(self) -> int:
        """Batches whose output has not been taken in."""
        return len(self._batches)

    def step(self) -> bool:
        """One round; false if there was nothing to do."""
        if not self.has_work():
            return False
        self.steps += 1
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.preemptions += len(scheduled.preempted_req_ids or ())
            self._batches.append((scheduled, self._execute(scheduled)))
            ahead = BATCHES_AHEAD if self.options.asynchronous else 1
            if len(self._batches) < ahead and (scheduled.total_num_scheduled_tokens or self.scheduler.has_requests()):
                return True
        self._take_output()
        return True

    def drain(self) -> None:
        """Takes in every batch that is out."""
        while self._batches:
            self._take_output()

    def _take_output(self) -> None:
        scheduled, output = self._batches.popleft()
        for outputs in self.scheduler.update_from_output(scheduled, output).values():
            for one in outputs.outputs:
                if one.request_id not in self._outputs:
                    continue
                self._outputs[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self._ended(one.request_id, str(one.finish_reason))

    # The model runner

    def _execute(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        self._update_requests(scheduled)
        for worker in self.workers:
            worker.begin(scheduled)
        output = self._forward(scheduled)
        if not self.workers:
            return output
        outputs: list[ModelRunnerOutput | None] = [
            dataclasses.replace(output, kv_connector_output=worker.end()) for worker in reversed(self.workers)
        ]
        return self._aggregator.aggregate(outputs)

    def _update_requests(self, scheduled: SchedulerOutput) -> None:
        for request_id in scheduled.finished_req_ids:
            self._runners.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            (blocks,) = new.block_ids
            tokens = list(new.prefill_token_ids or new.prompt_token_ids or ())
            self._runners[new.req_id] = Runner(tokens, len(new.prompt_token_ids or ()), list(blocks), self.weights)
        cached = scheduled.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            runner = self._runners[request_id]
            blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                # Tokens of steps whose output was dropped at the preemption are not the request's.
                del runner.tokens[runner.prompt + cached.num_output_tokens[index] :]
                runner.blocks = []
            if blocks is not None:
                runner.blocks += blocks[0]

    def _forward(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        requests = list(scheduled.num_scheduled_tokens)
        sampled = [
            self._forward_one(request, starts[request], scheduled.num_scheduled_tokens[request]) for request in requests
        ]
        return ModelRunnerOutput(
            req_ids=requests,
            req_id_to_index={request: index for index, request in enumerate(requests)},
            sampled_token_ids=sampled,
        )

    def _forward_one(self, request: str, start: int, count: int) -> list[int]:
        runner = self._runners[request]
        end = start + count
        truth = self._truth(request).of(runner.tokens[:end])
        self._check(request, runner, truth[:start])
        token = self.pool.compute(runner.blocks, start, runner.tokens[start:end], self.weights)
        self._check(request, runner, truth)
        self._remember(request, runner, end)
        if end < len(runner.tokens):
            return []
        runner.tokens.append(token)
        return [token]

    def _truth(self, request: str) -> Truth:
        session = self._sessions[request]
        truth = self.truths.get(session)
        if truth is None or truth.weights != self.weights:
            truth = self.truths[session] = Truth(self.weights)
        return truth

    def _check(self, request: str, runner: Runner, truth: Any) -> None:
        found = self.pool.sequence(runner.blocks, len(truth))
        if np.array_equal(found, truth):
            return
        (wrong,) = np.nonzero((found != truth).any(axis=1))
        size = self.options.block_tokens
        blocks = sorted({int(position) // size for position in wrong})
        raise WrongBytes(
            f"step {self.steps}: request {request} of session {self._sessions[request]} has wrong KV in "
            f"{len(blocks)} of {-(-len(truth) // size)} blocks, at positions {blocks[:8]} "
            f"(GPU blocks {[runner.blocks[block] for block in blocks[:8]]})"
        )

    def _remember(self, request: str, runner: Runner, end: int) -> None:
        """The first bytes of each block that is now full: whoever reads the hash later must find them."""
        known = self.scheduler.requests.get(request)
        if known is None:
            return
        for position, block_hash in enumerate(known.block_hashes[: end // self.options.block_tokens]):
            if (self.weights, block_hash) not in self.first_digests:
                self.first_digests[self.weights, block_hash] = self.pool.digest(runner.blocks[position])

    # What must hold

    def needed_blocks(self, scheduled: Mapping[str, int]) -> int:
        """Blocks that the requests still need for the tokens they have and one more, by vLLM's own books.

        ``scheduled``: tokens of the step that is being put together, whose blocks they hold already.
        """
        manager, size, needed = self.scheduler.kv_cache_manager, self.options.block_tokens, 0
        for request in self.scheduler.requests.values():
            if request.is_finished():
                continue
            (held,) = manager.get_block_ids(request.request_id)
            computed = request.num_computed_tokens + scheduled.get(request.request_id, 0)
            tokens = max(request.num_tokens, computed) + 1
            needed += max(0, -(-tokens // size) - len(held))
        return needed

    def check_pool(self) -> None:
        """Every block that vLLM's prefix cache knows holds the first bytes of its hash, and each is free or referenced.

        Also while a batch is out: what it computes is there when it is begun, only its output comes later.
        """
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        idle = sum(block.ref_cnt == 0 and not block.is_null for block in blocks)
        assert idle == self.free_blocks(), (
            f"step {self.steps}: {idle} blocks idle, {self.free_blocks()} on the free list"
        )
        for block in blocks:
            if block.block_hash is None:
                continue
            bare = bytes(block.block_hash[:32])
            first = self.first_digests.get((self.weights, bare))
            if first is not None and first != self.pool.digest(block.block_id):
                raise WrongBytes(f"step {self.steps}: GPU block {block.block_id} is cached and holds other bytes")

    def free_blocks(self) -> int:
        """Blocks on vLLM's free list."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    # Resets

    def reset(self, weights: bool) -> bool:
        """vLLM's reset of its caches; ``weights``: because the weights have been changed. False: ask again."""
        self.drain()
        try:
            done = self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=weights)
        except RuntimeError:
            # Its way to say that blocks are referenced, by a load or another copy; its client is told so.
            return False
        if done and weights:
            self.weights = 1 + max((weights for weights, _ in self.first_digests), default=0)
        return bool(done)

    def run(self) -> bool:
        """Steps until there is nothing to do; false if that takes more than ``SETTLE_S``."""
        deadline = time.monotonic() + SETTLE_S
        while self.step():
            if time.monotonic() > deadline:
                return False
        return True
