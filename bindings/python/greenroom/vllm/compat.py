"""Everything Greenroom knows of vLLM's insides. No other file of this package imports vLLM or torch at run time.

Tested with vLLM 0.26.0 and 0.32; other releases need ``"force": true``. Of 0.33 only the Python sources are tested
(`make check-harness-next`); what is used here is in them as in 0.32. What differs between the two:

* 0.26 has no ``Request.session_id`` and no ``kv_hints``; its KV tensors carry ``shared_by`` instead of ``layers`` and
  ``layer_stride``; a block-outermost layout is asked for with ``prefer_cross_layer_blocks``.
* 0.26 derives the hash seed from chance unless ``PYTHONHASHSEED`` is set: KV then does not outlive the engine.

Nothing here decides anything: it reads vLLM's state, or changes it in the way vLLM itself does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import vllm
from prometheus_client import Counter, Gauge
from vllm.distributed.kv_events import BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.request import RequestStatus

from greenroom._native import GROWTH_BLOCKS
from greenroom.errors import ConfigError
from greenroom.vllm.settings import Settings

__all__ = [
    "SUPPORTED",
    "VERSION",
    "BlockEvents",
    "Engine",
    "Geometry",
    "GpuPool",
    "Holders",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorWorkerMetadata",
    "Region",
    "Survey",
    "Turn",
    "check_config",
    "check_geometry",
    "compute_stream",
    "cross_layer_regions",
    "cuda_number",
    "device_type",
    "engine_of_caller",
    "finished_hashes",
    "hash_seed",
    "hash_seed_is_random",
    "hints_json",
    "identity",
    "kv_regions",
    "layout_name",
    "prometheus_kinds",
    "rank",
    "required_layout",
    "seats",
    "survey",
    "tokens_ahead",
    "use_recompute_policy",
    "wants_cross_layers",
    "wants_events",
]

VERSION: str = vllm.__version__
SUPPORTED = ("0.26.0", "0.32")
"""Releases, or series of them, that the tests run on."""

GROUP = kv_cache_utils.make_block_hash_with_group_id(kv_cache_utils.BlockHash(b""), 0)
"""What vLLM appends to a block hash inside the pool: the number of the only KV cache group."""

HASH_BYTES = 32
EVENT_BLOCKS_MAX = 1 << 16
"""Blocks whose tokens are remembered for KV events; the oldest are forgotten."""

_BATCHAGENT_ID = re.compile(r"batchagent:(.+?):turn:\d+")

_log = logging.getLogger("vllm.greenroom")


# What Greenroom works with


def check_config(config: Any, settings: Settings, version: str = VERSION) -> None:
    """Refuses what Greenroom does not work with yet.

    Raises:
        ConfigError: one sentence that says what is wrong and what to do.
    """
    parallel, transfer, cache = config.parallel_config, config.kv_transfer_config, config.cache_config
    known = any(version == one or version.startswith(f"{one}.") for one in _with_local_versions(version))
    refusals = {
        f"vLLM {version} is not one of the releases Greenroom is tested with ({', '.join(SUPPORTED)}): "
        'add "force": true to kv_connector_extra_config to use it all the same': not known and not settings.force,
        "prefix caching is off and Greenroom hands KV to vLLM through it: remove --no-enable-prefix-caching": (
            not cache.enable_prefix_caching
        ),
        f"kv_role is {transfer.kv_role} and Greenroom both saves and loads: set it to kv_both": (
            transfer.kv_role != "kv_both"
        ),
        "pipeline parallelism is not supported by Greenroom yet: set --pipeline-parallel-size 1": (
            parallel.pipeline_parallel_size > 1
        ),
        "data parallelism is not supported by Greenroom yet (a session may move to another rank): "
        "set --data-parallel-size 1 and run one server per replica": parallel.data_parallel_size > 1,
        "decode context parallelism is not supported by Greenroom yet: set --decode-context-parallel-size 1": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
        ),
        "prefill context parallelism is not supported by Greenroom yet: set --prefill-context-parallel-size 1": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        f"the block hash {cache.prefix_caching_hash_algo} has 16 bytes and a secret seed, Greenroom needs the 32 of "
        "sha256: set --prefix-caching-hash-algo sha256": str(cache.prefix_caching_hash_algo).startswith("xxhash"),
    }
    for sentence, applies in refusals.items():
        if applies:
            raise ConfigError("unsupported", sentence)


def _with_local_versions(version: str) -> tuple[str, ...]:
    """The supported releases, each also with this version's local part (``0.32.0+cpu``)."""
    _, plus, local = version.partition("+")
    return SUPPORTED + tuple(f"{one}{plus}{local}" for one in SUPPORTED) if plus else SUPPORTED


@dataclass(frozen=True)
class Geometry:
    """How an engine's KV is cut into blocks."""

    rank_bytes: int
    """Bytes of one block on one rank, all layers."""
    ranks: int
    block_tokens: int
    gpu_blocks: int


def check_geometry(config: Any, kv_cache_config: Any) -> Geometry:
    """The sizes of this engine's blocks.

    Raises:
        ConfigError: the model's KV cache is not of a kind that Greenroom can save.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            "unsupported",
            f"this model has {len(groups)} KV cache groups and Greenroom supports one: full-attention models, "
            "or hybrid ones with --disable-hybrid-kv-cache-manager where vLLM can unify them",
        )
    spec = groups[0].kv_cache_spec
    specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    for one in specs:
        if not isinstance(one, FullAttentionSpec):
            raise ConfigError(
                "unsupported",
                f"this model's KV cache is of kind {type(one).__name__} and Greenroom supports full attention",
            )
    return Geometry(
        rank_bytes=_rank_bytes(kv_cache_config),
        ranks=config.parallel_config.tensor_parallel_size,
        block_tokens=spec.block_size,
        gpu_blocks=kv_cache_config.num_blocks,
    )


def _rank_bytes(kv_cache_config: Any) -> int:
    tensors, blocks = kv_cache_config.kv_cache_tensors, kv_cache_config.num_blocks
    if _is_current(tensors[0]):
        # One allocation for all: each entry names its whole size.
        return int(tensors[0].size // blocks)
    if tensors[0].block_stride:
        return int(tensors[0].block_stride)
    return int(sum(tensor.size for tensor in tensors) // blocks)


def _is_current(tensor: Any) -> bool:
    """Whether a KV tensor's description is that of 0.32 and later."""
    return hasattr(tensor, "layers")


def required_layout(settings: Settings) -> str | None:
    """The KV layout to ask vLLM for: block-outermost where copies gain from it, else no wish."""
    if settings.layout != "auto" or not current_platform.is_cuda() or not has_layouts():
        return None
    return "BLNHC"


def wants_cross_layers(settings: Settings) -> bool:
    """The same wish in the terms of 0.26."""
    return settings.layout == "auto" and current_platform.is_cuda() and not has_layouts()


def has_layouts() -> bool:
    """Whether this vLLM knows layouts by their axes (0.32 and later)."""
    return hasattr(kv_cache_utils, "resolve_none_hash_seed")


def layout_name(config: Any, kv_cache_config: Any, settings: Settings) -> str:
    """Names the layout of the KV cache, for the namespace: equal names mean equal bytes in a slot."""
    if has_layouts():
        return str(kv_cache_config.kv_cache_layout or config.cache_config.kv_cache_layout)
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    return f"{backend}/{os.environ.get('VLLM_KV_CACHE_LAYOUT')}/{wants_cross_layers(settings)}"


def tokens_ahead(config: Any) -> int:
    """Tokens and slots that one decode step may need besides its own token: drafts, and the drafter's lookahead."""
    drafts = config.num_speculative_tokens
    return int(drafts) + int(getattr(config, "num_lookahead_tokens", drafts))


def wants_events(config: Any) -> bool:
    """Whether vLLM publishes KV events."""
    events = config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def prometheus_kinds() -> tuple[Any, Any]:
    """The counter and gauge classes under which vLLM lists its own."""
    return Counter, Gauge


def use_recompute_policy(config: Any) -> None:
    """Makes vLLM recompute what could not be loaded instead of failing the request. Read after the constructor."""
    transfer = config.kv_transfer_config
    if transfer.kv_load_failure_policy != "recompute":
        _log.info("Greenroom: kv_load_failure_policy set to recompute, so that a lost block is a cache miss")
        transfer.kv_load_failure_policy = "recompute"


# Names and hashes


def identity(request: Any) -> str | None:
    """The session that a request names itself, if it does."""
    params = request.kv_transfer_params
    named = params.get("session_id") if isinstance(params, Mapping) else None
    for candidate in (named, getattr(request, "session_id", None)):
        if isinstance(candidate, str) and candidate:
            return candidate
    found = _BATCHAGENT_ID.search(request.request_id)
    return found.group(1) if found else None


def hints_json(request: Any) -> str | None:
    """The hint envelope that a request carries (0.32 and later), as JSON."""
    envelope = getattr(request, "kv_hints", None)
    if envelope is None:
        return None
    fields = ("action_id", "action_type", "action_version", "payload")
    return json.dumps(
        {
            "protocol_version": envelope.protocol_version,
            "message_id": envelope.message_id,
            "actions": [{field: getattr(action, field) for field in fields} for action in envelope.actions],
        }
    )


def hash_seed() -> str:
    """The hash that every chain starts from, as hex. Known from the engine's first request on."""
    return bytes(kv_cache_utils.NONE_HASH).hex()


def hash_seed_is_random() -> bool:
    """Whether the seed is another one at every engine start."""
    return not has_layouts() and not os.environ.get("PYTHONHASHSEED")


def device_type() -> str:
    """``cpu``, ``cuda``, …"""
    return str(current_platform.device_type)


# The block pool


class BlockEvents:
    """What vLLM's KV events need to say of a block that Greenroom publishes: its tokens and its parent.

    Only used when KV events are on. A block of a session that this engine start has not seen is announced without
    tokens.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._known: dict[bytes, tuple[bytes | None, list[int], Any]] = {}
        self._pending: list[Any] = []

    def remember(self, request: Any, blocks: int) -> None:
        """Keeps a request's first blocks, so that they can be announced when they come back."""
        parent: bytes | None = None
        for position, block_hash in enumerate(request.block_hashes[:blocks]):
            start = position * self._block_tokens
            tokens = list(request.all_token_ids[start : start + self._block_tokens])
            self._known.pop(block_hash, None)
            self._known[block_hash] = (parent, tokens, request.lora_request)
            parent = block_hash
        while len(self._known) > EVENT_BLOCKS_MAX:
            del self._known[next(iter(self._known))]

    def stored(self, block_hash: bytes) -> None:
        """A block is on the GPU again."""
        parent, tokens, lora = self._known.get(block_hash, (None, [], None))
        external = kv_cache_utils.maybe_convert_block_hash
        self._pending.append(
            BlockStored(
                block_hashes=[external(block_hash)],
                parent_block_hash=None if parent is None else external(parent),
                token_ids=tokens,
                block_size=self._block_tokens,
                lora_id=lora.adapter_id if lora else None,
                medium="GPU",
                lora_name=lora.name if lora else None,
                group_idx=0,
            )
        )

    def take(self) -> list[Any]:
        """The events since the last call."""
        events, self._pending = self._pending, []
        return events


class GpuPool:
    """vLLM's ``BlockPool`` in the terms of the hooks: blocks by number, hashes of 32 bytes, no vLLM object.

    Called by the native module, only from within a hook and so on the scheduler's thread.
    """

    def __init__(self, pool: Any, block_tokens: int, events: BlockEvents | None) -> None:
        if pool.hash_block_size != block_tokens:
            raise ConfigError(
                "unsupported",
                f"vLLM hashes {pool.hash_block_size} tokens at a time and a block has {block_tokens}: Greenroom needs "
                "the two to be equal",
            )
        self._pool = pool
        self._block_tokens = block_tokens
        self._events = events

    def total(self) -> int:
        """Blocks there are, without vLLM's null block."""
        return int(self._pool.num_gpu_blocks) - 1

    def free(self) -> int:
        """Blocks on the free list, cached ones included."""
        return int(self._pool.get_num_free_blocks())

    def lookup(self, hashes: Sequence[bytes]) -> list[int | None]:
        """The cached block of each hash; of several, the one that vLLM itself would use."""
        find = self._pool.cached_block_hash_to_block.get_one_block
        found = [find(one + GROUP) for one in hashes]
        return [None if block is None else block.block_id for block in found]

    def uses(self, blocks: Sequence[int]) -> list[tuple[bytes | None, bool]]:
        """Hash, and whether anybody references it, of each block."""
        table = self._pool.blocks
        return [(_bare(table[one].block_hash), table[one].ref_cnt > 0) for one in blocks]

    def free_list(self, count: int) -> list[bytes | None]:
        """The hashes of the blocks that are handed out next, in that order."""
        queue = self._pool.free_block_queue
        block = queue.fake_free_list_head.next_free_block
        hashes: list[bytes | None] = []
        while len(hashes) < count and block is not queue.fake_free_list_tail:
            hashes.append(_bare(block.block_hash))
            block = block.next_free_block
        return hashes

    def take(self, count: int) -> list[int] | None:
        """Takes blocks from the head of the free list, with one reference each; None if there are too few."""
        if count > self.free():
            return None
        return [block.block_id for block in self._pool.get_new_blocks(count)]

    def reference(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each."""
        self._pool.touch([self._pool.blocks[one] for one in blocks])

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each; of those that become free, the first is evicted first."""
        self._pool.free_blocks([self._pool.blocks[one] for one in blocks])

    def evict(self, blocks: Sequence[int]) -> None:
        """Takes unreferenced blocks out of the prefix cache; what caches nothing is handed out next."""
        self._pool.evict_blocks(set(blocks))
        self.reference(blocks)
        self.release(blocks)

    def publish(self, entries: Sequence[tuple[int, bytes, int]]) -> None:
        """Makes (block, hash, position) ordinary entries of the prefix cache; a hash that is there is left alone."""
        for number, block_hash, position in entries:
            key = block_hash + GROUP
            if self._pool.cached_block_hash_to_block.get_one_block(key) is not None:
                continue
            block = self._pool.blocks[number]
            assert block.block_hash is None, "a block that was taken has no hash"
            # Counted from the first token of the prompt, as vLLM does.
            self._pool._insert_block_hash(key, block, num_tokens=(position + 1) * self._block_tokens)
            if self._events is not None:
                self._events.stored(block_hash)


def _bare(key: bytes | None) -> bytes | None:
    return None if key is None else bytes(key[:HASH_BYTES])


# What the scheduler has to do


class Turn:
    """A request, from the time it is enqueued until it ends."""

    __slots__ = ("filled", "local", "longest", "request")

    def __init__(self, request: Any, block_tokens: int) -> None:
        self.request = request
        self.longest = _blocks(request.num_prompt_tokens + request.max_tokens, block_tokens)
        """Blocks of all the tokens that it may have in the end."""
        self.filled = 0
        """Full blocks that the hooks know of."""
        self.local = 0
        """Blocks that the GPU had when the request was last matched."""


@dataclass
class Survey:
    """The scheduler's load, as one step leaves it."""

    reserve_blocks: int = 0
    """Blocks that must stay free: see ``survey``."""
    missing: int = 0
    """Those of them that requests need which hold blocks."""
    growth: int = 0
    """Blocks beyond the reserve by which those requests are taken to grow: see ``GROWTH_BLOCKS``."""
    holders: int = 0
    """These requests: those that run, load or have been loaded."""
    waiting: int = 0
    running: int = 0
    """Loading ones, too."""
    handed_out: int = 0
    """Blocks that this step took from the pool."""
    filled: list[tuple[Turn, int, int]] = field(default_factory=list)
    """Turns with blocks that are full and computed, and their range of positions."""


def survey(turns: Iterable[Turn], scheduled: Mapping[str, int], block_tokens: int, ahead: int) -> Survey:
    """Counts what vLLM's requests still need. Called in ``build_connector_meta``, before vLLM counts the step's tokens.

    The reserve is the sum of, each rounded up to blocks and less what this step has allocated already:
    for a running or loading request its whole known sequence, the tokens of the step that follows and the ``ahead``
    slots that a drafter writes to; for a waiting one its whole sequence and a token, for vLLM starts it only then.

    A block is full when ``min(num_computed_tokens, num_tokens)`` covers it: what the steps before this one have
    computed or launched. Requests whose blocks are still being loaded, or that wait, have none.
    """
    running, loading, size = RequestStatus.RUNNING, RequestStatus.WAITING_FOR_REMOTE_KVS, block_tokens
    result = Survey()
    for turn in turns:
        request = turn.request
        status, tokens, computed = request.status, request.num_tokens, request.num_computed_tokens
        if status is running:
            after = computed + scheduled.get(request.request_id, 0)
            # Rounded up, in line: this loop runs for every request in every step.
            has = -(-after // size)
            known = -(-((tokens if tokens > after else after) + 1 + ahead) // size)
            result.running += 1
            result.handed_out += has + -computed // size
            if known > has:
                result.missing += known - has
            if turn.longest > known:
                result.growth += min(turn.longest - known, GROWTH_BLOCKS)
            full = (computed if computed < tokens else tokens) // size
            if full > turn.filled:
                full = min(full, len(request.block_hashes))
                if full > turn.filled:
                    result.filled.append((turn, turn.filled, full))
                    turn.filled = full
        elif status is loading:
            result.running += 1
            known = _blocks(tokens + 1 + ahead, size)
            result.missing += max(0, known - _blocks(computed, size))
            result.growth += _growth(turn, known)
        elif not RequestStatus.is_finished(status):
            result.waiting += 1
            if computed == 0:
                # A preempted request is among these: what it had computed is gone and will fill anew.
                turn.filled = 0
                result.reserve_blocks += _blocks(tokens + 1, size)
            else:
                known = _blocks(tokens + 1, size)
                result.holders += 1
                result.missing += known - _blocks(computed, size)
                result.growth += _growth(turn, known)
    result.reserve_blocks += result.missing
    result.holders += result.running
    return result


@dataclass
class Holders:
    """The requests that hold blocks while vLLM schedules: those of the last survey, and those added since."""

    seats: int
    """Most that may run at a time."""
    block_tokens: int
    count: int = 0
    missing: int = 0
    """Blocks that they still need for the tokens they have."""
    growth: int = 0
    """Blocks beyond those by which they are taken to grow."""

    def count_anew(self, survey: Survey) -> None:
        """What a step leaves."""
        self.count, self.missing, self.growth = survey.holders, survey.missing, survey.growth

    def add(self, turn: Turn, blocks: int) -> None:
        """A request has been given its blocks. One whose load has just ended is counted twice until the next survey."""
        known = self._known(turn)
        self.count += 1
        self.missing += max(0, known - blocks)
        self.growth += _growth(turn, known)

    def beside(self, turn: Turn, free: int) -> tuple[int, int, int, int, int]:
        """What ``match_prefix`` wants to know for a request that may join them; ``free`` blocks are left."""
        growth = self.growth + _growth(turn, self._known(turn))
        return self.count, self.seats, self.missing, growth, free

    def _known(self, turn: Turn) -> int:
        return _blocks(turn.request.num_tokens + 1, self.block_tokens)


def seats(config: Any) -> int:
    """Most requests that may run at a time."""
    return int(config.scheduler_config.max_num_seqs)


def _blocks(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


def _growth(turn: Turn, known: int) -> int:
    """Blocks beyond those of its known tokens: as many as it may come to need, ``GROWTH_BLOCKS`` at most."""
    return min(max(0, turn.longest - known), GROWTH_BLOCKS)


def finished_hashes(request: Any, block_tokens: int) -> list[bytes]:
    """The hashes of every full block that a request leaves behind."""
    if request.num_computed_tokens == 0:
        return []
    full = min(request.num_computed_tokens, request.num_tokens) // block_tokens
    return list(request.block_hashes[:full])


# The engine around the connector


class Engine:
    """vLLM's scheduler and engine loop around the connector, as far as they were found."""

    def __init__(self, scheduler: Any | None, core: Any | None) -> None:
        self._scheduler = scheduler
        self._queue = getattr(core, "input_queue", None)
        self.must_poll = self._queue is None and hasattr(core, "run_busy_loop")
        """Whether there is a loop that sleeps and that ``wake`` does not reach."""

    def wake(self) -> None:
        """Makes an idle engine step. Safe on any thread."""
        if self._queue is not None:
            self._queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def paused(self) -> bool:
        """Whether the engine is paused or asleep: then nothing may be started."""
        state = getattr(self._scheduler, "pause_state", None)
        return state is not None and state.name != "UNPAUSED"


def engine_of_caller() -> Engine:
    """Finds the engine that is being built, in the frames of this call.

    vLLM hands a connector neither its scheduler nor the queue that its loop sleeps on, and both are on the stack when
    the connector is constructed. Either may be missing: a scheduler that is driven by hand, an engine in its caller's
    own thread, which sleeps on nothing.
    """
    # Only the scheduler's process comes here, and it has both modules loaded.
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.engine.core import EngineCore

    scheduler = core = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if scheduler is None and isinstance(owner, SchedulerInterface):
            scheduler = owner
        if core is None and isinstance(owner, EngineCore):
            core = owner
        frame = frame.f_back
    return Engine(scheduler, core)


def rank(config: Any) -> int:
    """This worker's tensor-parallel rank."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return int(parallel_state.get_tensor_model_parallel_rank())
    return int(config.parallel_config.rank)


def compute_stream(device: Any) -> int:
    """The handle of the stream that the forward pass runs on; 0 on a CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def cuda_number(device: Any) -> int | None:
    """The number of a CUDA device, as its driver counts too; None for host memory.

    Raises:
        ConfigError: it is neither of the two.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        raise ConfigError("unsupported", f"Greenroom copies on CPUs and CUDA devices and the KV cache is on {device}")
    return int(torch.cuda.current_device() if device.index is None else device.index)


# KV memory

Region = tuple[int, int, int]
"""(address of block 0, bytes from one block to the next, bytes of a block)."""


def kv_regions(kv_caches: Mapping[str, Any], kv_cache_config: Any) -> tuple[list[Region], Any]:
    """The memory of the KV cache, as regions in which every block has its fixed place, and the device it is on.

    The per-layer views are not looked at, but for where 0.26 puts its blocks: the raw storage and vLLM's own
    description of it are. Tensors that share an allocation yield their region once.

    Raises:
        ConfigError: the memory is not laid out as its description says.
    """
    blocks = kv_cache_config.num_blocks
    regions: dict[int, Region] = {}
    device = None
    for entry in kv_cache_config.kv_cache_tensors:
        names = entry.layers if _is_current(entry) else entry.shared_by
        cache = next((kv_caches[name] for name in names if name in kv_caches), None)
        if cache is None:
            continue
        cache = cache[0] if isinstance(cache, (list, tuple)) else cache
        device = cache.device
        for region in (_regions if _is_current(entry) else _regions_026)(entry, cache, blocks):
            regions.setdefault(region[0], region)
    if device is None:
        raise ConfigError("unsupported", "vLLM registered no KV cache that Greenroom could save")
    return list(regions.values()), device


def _regions(entry: Any, cache: Any, blocks: int) -> list[Region]:
    storage = cache.untyped_storage()
    stride, span = int(entry.block_stride), blocks * int(entry.block_stride)
    if entry.layer_stride >= span:
        # One region per layer, or per layer and head where heads are outside blocks.
        start, length = int(entry.offset), len(entry.layers) * int(entry.layer_stride)
    else:
        # A block holds all layers.
        start, length = 0, span
    if length % span or storage.nbytes() < start + length:
        raise ConfigError(
            "unsupported",
            f"{storage.nbytes()} bytes of KV cache do not hold {length} bytes from {start} in spans of {span}",
        )
    first = storage.data_ptr() + start
    return [(first + position * span, stride, stride) for position in range(length // span)]


def _regions_026(entry: Any, cache: Any, blocks: int) -> list[Region]:
    storage = cache.untyped_storage()
    base, nbytes = storage.data_ptr(), storage.nbytes()
    if entry.block_stride:
        return [(base, int(entry.block_stride), int(entry.block_stride))]
    page = nbytes // blocks
    outer = [
        (cache.stride(dim) * cache.element_size(), cache.shape[dim])
        for dim in range(cache.ndim)
        if cache.shape[dim] > 1 and cache.stride(dim) * cache.element_size() > page
    ]
    if len(outer) > 1 or nbytes % blocks:
        raise ConfigError(
            "unsupported", f"a KV cache of shape {tuple(cache.shape)} has no place of its own for each block"
        )
    segment, count = outer[0] if outer else (nbytes, 1)
    stride = segment // blocks
    return [(base + position * segment, stride, stride) for position in range(count)]


def cross_layer_regions(cache: Any, kv_cache_config: Any) -> tuple[list[Region], Any]:
    """The same for 0.26's one tensor of all layers, whose outermost dimension is that of the blocks.

    Raises:
        ConfigError: it is not.
    """
    blocks, nbytes = kv_cache_config.num_blocks, cache.untyped_storage().nbytes()
    stride = nbytes // blocks
    if nbytes % blocks or any(cache.stride(dim) * cache.element_size() > stride for dim in range(cache.ndim)):
        raise ConfigError("unsupported", f"a KV cache of shape {tuple(cache.shape)} is not block-outermost")
    return [(cache.untyped_storage().data_ptr(), stride, stride)], cache.device
