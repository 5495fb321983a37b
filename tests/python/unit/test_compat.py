"""The compatibility layer against vLLM's own classes. Needs vLLM installed, but no engine."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run it in .venv or .venv-026")

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from greenroom import ConfigError
from greenroom.vllm import compat, namespace
from greenroom.vllm.settings import Settings

pytestmark = pytest.mark.vllm

TOKENS = 16
kv_cache_utils.init_none_hash(sha256)
HASHER = kv_cache_utils.get_request_block_hasher(TOKENS, sha256)


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def request(tokens: int, *, request_id: str = "r", computed: int = 0, status: str = "WAITING", **extra: Any) -> Request:
    params = SamplingParams(max_tokens=8, extra_args=extra or None)
    made = Request(
        request_id=request_id,
        prompt_token_ids=[token % 251 for token in range(tokens)],
        sampling_params=params,
        pooling_params=None,
        block_hasher=HASHER,
    )
    made.num_computed_tokens = computed
    made.status = RequestStatus[status]
    return made


# The pool


@pytest.fixture
def blocks() -> BlockPool:
    return BlockPool(num_gpu_blocks=9, enable_caching=True, hash_block_size=TOKENS)


@pytest.fixture
def pool(blocks: BlockPool) -> compat.GpuPool:
    return compat.GpuPool(blocks, TOKENS, None)


def cached(pool: compat.GpuPool, hashes: Sequence[int]) -> list[int]:
    """Takes blocks, publishes them as a chain, frees them as vLLM does: the suffix first."""
    taken = pool.take(len(hashes))
    assert taken is not None
    pool.publish(
        [(block, name(one), position) for position, (block, one) in enumerate(zip(taken, hashes, strict=True))]
    )
    pool.release(taken[::-1])
    return taken


def test_the_null_block_is_never_counted_or_handed_out(pool: compat.GpuPool) -> None:
    assert (pool.total(), pool.free()) == (8, 8)
    taken = pool.take(8)
    assert taken is not None
    assert sorted(taken) == list(range(1, 9))
    assert pool.free() == 0


def test_taking_more_than_is_free_changes_nothing(pool: compat.GpuPool) -> None:
    before = pool.free_list(8)
    assert pool.take(9) is None
    assert (pool.free(), pool.free_list(8)) == (8, before)


def test_published_blocks_are_hits_for_vllm_itself(pool: compat.GpuPool, blocks: BlockPool) -> None:
    taken = cached(pool, [1, 2, 3])
    assert pool.lookup([name(1), name(2), name(3), name(4)]) == [*taken, None]
    for position, one in enumerate([1, 2, 3]):
        (found,) = blocks.get_cached_block(kv_cache_utils.BlockHash(name(one)), [0])
        assert found.block_id == taken[position]
        # Counted from the start of the prompt.
        assert found.block_hash_num_tokens == (position + 1) * TOKENS


def test_evicted_blocks_cache_nothing_and_are_handed_out_next(pool: compat.GpuPool, blocks: BlockPool) -> None:
    cached(pool, [1, 2])
    (mine,) = cached(pool, [3])
    cached(pool, [4, 5])
    pool.evict([mine])
    assert pool.lookup([name(one) for one in range(1, 6)]).index(None) == 2
    assert (pool.free(), blocks.get_num_free_blocks()) == (8, 8)
    assert pool.take(1) == [mine]


def test_a_hash_that_is_cached_is_not_published_again(pool: compat.GpuPool, blocks: BlockPool) -> None:
    (first,) = cached(pool, [1])
    second = pool.take(1)
    assert second is not None
    assert second[0] != first
    pool.publish([(second[0], name(1), 0)])
    assert pool.lookup([name(1)]) == [first]
    assert pool.uses(second) == [(None, True)]
    pool.release(second)
    assert len(blocks.cached_block_hash_to_block) == 1


def test_of_duplicates_each_keeps_its_hash_until_it_is_evicted(pool: compat.GpuPool, blocks: BlockPool) -> None:
    """vLLM itself caches one hash twice when two requests compute it at the same time."""
    taken = pool.take(2)
    assert taken is not None
    for block in taken:
        blocks._insert_block_hash(name(1) + compat.GROUP, blocks.blocks[block], num_tokens=TOKENS)
    assert pool.uses(taken) == [(name(1), True)] * 2
    found = pool.lookup([name(1)])[0]
    assert found in taken
    pool.release([found])
    assert pool.take(pool.free()) is not None
    assert pool.lookup([name(1)]) == [taken[1 - taken.index(found)]]


def test_release_makes_the_first_one_the_next_victim(pool: compat.GpuPool) -> None:
    chain = cached(pool, [1, 2, 3])
    empty = pool.total() - 3
    assert pool.free_list(pool.total()) == [None] * empty + [name(3), name(2), name(1)]
    assert len(pool.take(empty) or []) == empty
    assert pool.take(1) == [chain[2]]
    assert pool.lookup([name(1), name(2), name(3)]) == [chain[0], chain[1], None]


def test_the_free_list_says_what_take_hands_out(pool: compat.GpuPool) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    held: list[int] = []
    for step in range(200):
        if held and chance.random() < 0.5:
            chance.shuffle(held)
            pool.release([held.pop() for _ in range(chance.randint(1, len(held)))])
        count = chance.randint(0, pool.free())
        expected = pool.free_list(count)
        before = pool.lookup([one for one in expected if one])
        taken = pool.take(count)
        assert taken is not None
        assert [block for block, one in zip(taken, expected, strict=True) if one] == before
        pool.publish([(block, name(1000 * step + block), 0) for block in taken if chance.random() < 0.7])
        held += taken
        assert pool.free() == pool.total() - len(held)


def test_a_reference_keeps_a_block_and_its_end_leaves_it_cached(pool: compat.GpuPool) -> None:
    chain = cached(pool, [1, 2])
    pool.reference(chain)
    assert pool.uses(chain) == [(name(1), True), (name(2), True)]
    assert len(pool.take(pool.free()) or []) == 6
    assert pool.lookup([name(1), name(2)]) == chain
    pool.release(chain[::-1])
    assert pool.uses(chain) == [(name(1), False), (name(2), False)]


def test_a_hold_moves_blocks_to_the_safe_end_and_counts_them_as_free(pool: compat.GpuPool) -> None:
    """The hold of the hooks: reference and release in reverse."""
    first, second = cached(pool, [1, 2]), cached(pool, [3, 4])
    pool.reference(first)
    pool.release(first[::-1])
    assert pool.free() == pool.total()
    assert pool.free_list(8)[-4:] == [name(4), name(3), name(2), name(1)]
    assert pool.uses(first + second) == [(name(one), False) for one in (1, 2, 3, 4)]


def test_another_hash_granularity_is_refused(blocks: BlockPool) -> None:
    with pytest.raises(ConfigError, match="hashes 16 tokens"):
        compat.GpuPool(blocks, 32, None)


def test_events_announce_what_comes_back() -> None:
    events = compat.BlockEvents(TOKENS)
    pool = compat.GpuPool(BlockPool(9, True, TOKENS, enable_kv_cache_events=True), TOKENS, events)
    seen = request(2 * TOKENS + 3)
    events.remember(seen, 2)
    taken = pool.take(3)
    assert taken is not None
    hashes = [*seen.block_hashes, name(9)]
    pool.publish(
        [(block, bytes(one), position) for position, (block, one) in enumerate(zip(taken, hashes, strict=True))]
    )
    first, second, unknown = events.take()
    assert (first.parent_block_hash, first.token_ids) == (None, list(range(TOKENS)))
    assert second.parent_block_hash == first.block_hashes[0]
    assert second.token_ids == list(range(TOKENS, 2 * TOKENS))
    assert unknown.token_ids == []
    assert events.take() == []


def test_remembered_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "EVENT_BLOCKS_MAX", 3)
    events = compat.BlockEvents(TOKENS)
    events.remember(request(5 * TOKENS), 5)
    assert len(events._known) == 3


# Requests


@pytest.mark.parametrize(
    ("request_id", "named", "session", "expected"),
    [
        ("chatcmpl-1", {"session_id": "a"}, "b", "a"),
        ("chatcmpl-1", {"other": 1}, "b", "b"),
        ("chatcmpl-1", {"session_id": ""}, "b", "b"),
        ("chatcmpl-1", {"session_id": 7}, None, None),
        ("chatcmpl-1", ["session_id"], None, None),
        ("chatcmpl-1", None, None, None),
        ("chatcmpl-batchagent:job-7:turn:12-9f8e7d6c", None, None, "job-7"),
        ("batchagent:a:b:turn:0", None, None, "a:b"),
        ("batchagent:job:turn:x", None, None, None),
        ("batchagent:job:turn:1", None, "b", "b"),
    ],
)
def test_identity(request_id: str, named: object, session: str | None, expected: str | None) -> None:
    one = request(20, request_id=request_id)
    one.kv_transfer_params = named  # type: ignore[assignment]
    one.session_id = session
    assert compat.identity(one) == expected


def test_identity_of_a_request_without_session_id() -> None:
    """0.26 has no such attribute."""
    bare = SimpleNamespace(kv_transfer_params=None, request_id="chatcmpl-1")
    assert compat.identity(bare) is None
    assert compat.hints_json(bare) is None


def test_hints_are_forwarded_as_they_came() -> None:
    hints = pytest.importorskip("vllm.v1.kv_hints", reason="this vLLM has no kv_hints")
    action = hints.KvHintAction(action_id="1", action_type="kv.pin", action_version="1.0", payload={"ttl_ms": 5})
    one = request(20)
    one.kv_hints = hints.KvHintsEnvelope(protocol_version="1.0", message_id="m", actions=[action])
    text = compat.hints_json(one)
    assert text is not None
    assert json.loads(text) == {
        "protocol_version": "1.0",
        "message_id": "m",
        "actions": [
            {"action_id": "1", "action_type": "kv.pin", "action_version": "1.0", "payload": {"ttl_ms": 5}},
        ],
    }


@pytest.mark.parametrize(
    ("tokens", "computed", "blocks"), [(40, 0, 0), (40, 15, 0), (40, 32, 2), (40, 39, 2), (33, 48, 2), (32, 32, 2)]
)
def test_finished_blocks_are_full_and_computed(tokens: int, computed: int, blocks: int) -> None:
    one = request(tokens, computed=computed)
    assert compat.finished_hashes(one, TOKENS) == one.block_hashes[:blocks]


def survey(*requests: Request, scheduled: dict[str, int] | None = None, ahead: int = 0) -> compat.Survey:
    return compat.survey([compat.Turn(one, TOKENS) for one in requests], scheduled or {}, TOKENS, ahead)


@pytest.mark.parametrize(
    ("tokens", "computed", "step", "ahead", "reserve"),
    [
        # Prefill in chunks: what is left of the prompt, and the first decode block.
        (64, 0, 32, 0, 5 - 2),
        (64, 32, 32, 0, 5 - 4),
        (63, 32, 31, 0, 4 - 4),
        # Decode: a block is needed when the next token opens one.
        (64, 63, 1, 0, 1),
        (65, 64, 1, 0, 0),
        (80, 79, 1, 0, 1),
        # Not scheduled in this step: its next token may open a block.
        (64, 63, 0, 0, 1),
        # Speculation: drafts and their lookahead.
        (60, 59, 1, 4, 1),
        (60, 59, 5, 4, 1),
        (70, 69, 1, 40, 2),
    ],
)
def test_reserve_of_a_running_request(tokens: int, computed: int, step: int, ahead: int, reserve: int) -> None:
    one = request(tokens, computed=computed, status="RUNNING")
    found = survey(one, scheduled={"r": step} if step else {}, ahead=ahead)
    assert found.reserve_blocks == reserve
    assert (found.running, found.waiting) == (1, 0)
    assert found.handed_out == -(-(computed + step) // TOKENS) - -(-computed // TOKENS)


def test_reserve_adds_up_over_running_loading_and_waiting_requests() -> None:
    running = request(64, request_id="a", computed=32, status="RUNNING")
    loading = request(100, request_id="b", computed=96, status="WAITING_FOR_REMOTE_KVS")
    waiting = request(100, request_id="c")
    loaded = request(100, request_id="d", computed=96)
    preempted = request(50, request_id="e", status="PREEMPTED")
    found = survey(running, loading, waiting, loaded, preempted, scheduled={"a": 16})
    assert found.reserve_blocks == (5 - 3) + (7 - 6) + 7 + (7 - 6) + 4
    assert (found.running, found.waiting) == (2, 3)
    # Those that hold blocks.
    assert (found.holders, found.missing) == (3, (5 - 3) + (7 - 6) + (7 - 6))
    # Eight tokens more: 72 take no block beyond the fifth, 108 none beyond the seventh.
    assert found.growth == 0
    assert survey(request(75, computed=74, status="RUNNING")).growth == 6 - 5


def test_requests_that_are_given_blocks_are_among_their_holders() -> None:
    holders = compat.Holders(seats=4, block_tokens=TOKENS)
    joining = compat.Turn(request(75), TOKENS)
    for turn, blocks in ((compat.Turn(request(64), TOKENS), 2), (compat.Turn(request(75), TOKENS), 5)):
        holders.add(turn, blocks)
    assert holders.beside(joining, 9) == (2, 4, 5 - 2, (6 - 5) + (6 - 5), 9)
    holders.count_anew(survey(request(64, computed=64, status="RUNNING")))
    assert holders.beside(joining, 9) == (1, 4, 1, 6 - 5, 9)


def test_a_finished_request_needs_nothing() -> None:
    assert survey(request(64, status="FINISHED_ABORTED")) == compat.Survey()


def test_blocks_are_reported_full_once_and_only_when_computed() -> None:
    one = request(70, status="RUNNING")
    turn = compat.Turn(one, TOKENS)

    def filled() -> list[tuple[int, int]]:
        return [(start, end) for _, start, end in compat.survey([turn], {"r": 16}, TOKENS, 0).filled]

    # The step that computes them is not over.
    assert filled() == []
    one.num_computed_tokens = 40
    assert filled() == [(0, 2)]
    assert filled() == []
    one.num_computed_tokens = 70
    assert filled() == [(2, 4)]
    # Drafts that are not accepted yet are computed and are not tokens.
    one.num_computed_tokens = 90
    assert filled() == []


@pytest.mark.parametrize("status", ["WAITING", "WAITING_FOR_REMOTE_KVS", "PREEMPTED", "FINISHED_STOPPED"])
def test_only_running_requests_have_full_blocks(status: str) -> None:
    assert survey(request(64, computed=48, status=status)).filled == []


def test_a_preempted_request_fills_its_blocks_anew() -> None:
    one = request(70, computed=64, status="RUNNING")
    turn = compat.Turn(one, TOKENS)
    assert len(compat.survey([turn], {}, TOKENS, 0).filled) == 1
    one.status, one.num_computed_tokens = RequestStatus.PREEMPTED, 0
    compat.survey([turn], {}, TOKENS, 0)
    one.status, one.num_computed_tokens = RequestStatus.RUNNING, 32
    assert [(start, end) for _, start, end in compat.survey([turn], {}, TOKENS, 0).filled] == [(0, 2)]


# Refusals


def config(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "tensor_parallel_size": 2,
        "decode_context_parallel_size": 1,
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256",
        "kv_role": "kv_both",
    } | changes
    shared = SimpleNamespace(**values)
    return SimpleNamespace(parallel_config=shared, cache_config=shared, kv_transfer_config=shared)


def test_a_supported_engine_is_accepted() -> None:
    for version in ("0.26.0", "0.26.0+cpu", "0.32.0", "0.32.1", "0.32.0+cpu"):
        compat.check_config(config(), Settings(), version)
    compat.check_config(config(prefix_caching_hash_algo="sha256_cbor"), Settings(), "0.32.0")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"enable_prefix_caching": False}, "prefix caching"),
        ({"kv_role": "kv_consumer"}, "kv_both"),
        ({"kv_role": "kv_producer"}, "kv_both"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"data_parallel_size": 2}, "data parallel"),
        ({"decode_context_parallel_size": 2}, "decode context"),
        ({"prefill_context_parallel_size": 2}, "prefill context"),
        ({"prefix_caching_hash_algo": "xxhash"}, "sha256"),
        ({"prefix_caching_hash_algo": "xxhash_cbor"}, "sha256"),
    ],
)
def test_what_does_not_work_is_refused_in_a_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        compat.check_config(config(**changes), Settings(force=True), "0.32.0")
    assert raised.value.code == "unsupported"


@pytest.mark.parametrize(
    "version", ["0.26.1", "0.31.0", "0.33.0", "0.34.0", "0.3.2", "0.320.0", "1.0.0", "0.27.0.dev1+cpu"]
)
def test_an_unknown_release_wants_force(version: str) -> None:
    with pytest.raises(ConfigError, match="force"):
        compat.check_config(config(), Settings(), version)
    compat.check_config(config(), Settings(force=True), version)


def spec(kind: type = FullAttentionSpec, **extra: Any) -> Any:
    return kind(block_size=TOKENS, num_kv_heads=2, head_size=8, dtype=torch.float32, **extra)


def groups(*specs: Any, tensors: Sequence[Any] = (), blocks: int = 4) -> Any:
    made = [SimpleNamespace(kv_cache_spec=one, layer_names=["0"]) for one in specs]
    return SimpleNamespace(kv_cache_groups=made, kv_cache_tensors=tensors, num_blocks=blocks)


def test_several_groups_and_other_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 KV cache groups"):
        compat.check_geometry(config(), groups(spec(), spec()))
    with pytest.raises(ConfigError, match="SlidingWindowSpec"):
        compat.check_geometry(config(), groups(spec(SlidingWindowSpec, sliding_window=32)))


# KV memory


def current(layers: list[str], layer_stride: int, block_stride: int, offset: int = 0, size: int = 0) -> Any:
    """A KV tensor's description as 0.32 gives it."""
    return SimpleNamespace(
        layers=layers, layer_stride=layer_stride, block_stride=block_stride, offset=offset, size=size
    )


def old(names: list[str], size: int, offset: int = 0, block_stride: int = 0) -> Any:
    """The same as 0.26 gives it."""
    return SimpleNamespace(shared_by=names, size=size, offset=offset, block_stride=block_stride)


def test_layer_outermost_memory_has_a_region_for_each_layer() -> None:
    blocks, page = 4, 32
    raw = torch.zeros(3 * blocks * page, dtype=torch.int8)
    views = {str(layer): raw[layer * blocks * page :][: blocks * page].view(blocks, page) for layer in range(3)}
    entries = [current(["0", "1", "2"], blocks * page, page, size=raw.numel())]
    layout = groups(spec(), tensors=entries, blocks=blocks)
    regions, device = compat.kv_regions(views, layout)
    assert device.type == "cpu"
    assert regions == [(views[str(layer)].data_ptr(), page, page) for layer in range(3)]
    assert compat.check_geometry(config(), layout).rank_bytes == sum(size for _, _, size in regions)


def test_block_outermost_memory_is_one_region_whoever_describes_it() -> None:
    blocks, page = 4, 32
    raw = torch.zeros(blocks * 3 * page, dtype=torch.int8)
    view = raw.view(blocks, 3, page)
    entries = [
        current(["0", "1"], page, 3 * page, size=raw.numel()),
        current(["2"], page, 3 * page, offset=2 * page, size=raw.numel()),
    ]
    layout = groups(spec(), tensors=entries, blocks=blocks)
    regions, _ = compat.kv_regions({str(layer): view[:, layer] for layer in range(3)}, layout)
    assert regions == [(raw.data_ptr(), 3 * page, 3 * page)]
    assert compat.check_geometry(config(), layout).rank_bytes == 3 * page


def test_a_description_that_does_not_fit_the_memory_is_refused() -> None:
    raw = torch.zeros(100, dtype=torch.int8)
    with pytest.raises(ConfigError, match="100 bytes"):
        compat.kv_regions({"0": raw}, groups(spec(), tensors=[current(["0"], 128, 32)], blocks=4))
    with pytest.raises(ConfigError, match="no KV cache"):
        compat.kv_regions({}, groups(spec(), tensors=[current(["0"], 128, 32)], blocks=4))


def test_the_tensors_of_026() -> None:
    blocks = 4
    plain = torch.zeros(blocks, 2, TOKENS, 4)
    split = torch.zeros(2, blocks, TOKENS, 8)
    entries = [old(["0", "shared"], plain.nbytes), old(["1"], split.nbytes)]
    layout = groups(spec(), tensors=entries, blocks=blocks)
    regions, _ = compat.kv_regions({"0": plain, "shared": plain, "1": split}, layout)
    page, half = plain.nbytes // blocks, split.nbytes // 2 // blocks
    assert regions == [
        (plain.data_ptr(), page, page),
        (split[0].data_ptr(), half, half),
        (split[1].data_ptr(), half, half),
    ]
    assert compat.check_geometry(config(), layout).rank_bytes == page + 2 * half


def test_the_packed_and_the_cross_layer_tensors_of_026() -> None:
    blocks, page = 4, 32
    raw = torch.zeros(blocks * 2 * page, dtype=torch.int8)
    packed = [old(["0"], raw.numel(), 0, 2 * page), old(["1"], raw.numel(), page, 2 * page)]
    layout = groups(spec(), tensors=packed, blocks=blocks)
    assert compat.kv_regions({"0": raw, "1": raw}, layout)[0] == [(raw.data_ptr(), 2 * page, 2 * page)]
    assert compat.check_geometry(config(), layout).rank_bytes == 2 * page
    across = torch.zeros(blocks, 2, page, dtype=torch.int8)
    assert compat.cross_layer_regions(across, layout)[0] == [(across.data_ptr(), 2 * page, 2 * page)]
    with pytest.raises(ConfigError, match="block-outermost"):
        compat.cross_layer_regions(torch.zeros(2, blocks, page, dtype=torch.int8), layout)


def test_cuda_devices_have_the_number_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.cuda_number(torch.device("cpu")) is None
    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert compat.cuda_number(second) == 1
    # What other makers' builds of torch call cuda is not CUDA.
    monkeypatch.setattr(torch.version, "cuda", None)
    for other in (second, torch.device("meta")):
        with pytest.raises(ConfigError, match="CPUs and CUDA"):
            compat.cuda_number(other)


# The engine around the connector


def test_without_an_engine_there_is_nothing_to_wake() -> None:
    engine = compat.engine_of_caller()
    engine.wake()
    assert not engine.must_poll
    assert not engine.paused()


def test_the_engine_is_found_on_the_stack_and_woken() -> None:
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    put: list[Any] = []

    class Builds:
        def build(self) -> compat.Engine:
            return compat.engine_of_caller()

    class Schedules(Builds, Scheduler):  # type: ignore[misc]
        def __init__(self) -> None:
            self._pause_state = PauseState.UNPAUSED

    def around(kind: type, **attributes: Any) -> compat.Engine:
        scheduler = Schedules()

        class Core(kind):  # type: ignore[misc]
            def __init__(self) -> None:
                self.__dict__.update(attributes)
                self.found = scheduler.build()

            def __del__(self) -> None:
                pass

        found: compat.Engine = Core().found
        for state in PauseState:
            scheduler._pause_state = state
            assert found.paused() == (state != PauseState.UNPAUSED)
        return found

    queue = SimpleNamespace(put_nowait=put.append)
    engine = around(EngineCoreProc, input_queue=queue)
    engine.wake()
    assert [kind.name for kind, _ in put] == ["WAKEUP"]
    assert not engine.must_poll
    # A loop whose queue has another name must be polled; an engine without a loop of its own must not.
    assert around(EngineCoreProc).must_poll
    assert not around(EngineCore).must_poll


# The namespace


def model_config(path: Any, **changes: Any) -> Any:
    hf_config = SimpleNamespace(to_json_string=lambda use_diff: changes.get("rope", "{}"), _commit_hash="c0ffee")
    model = SimpleNamespace(
        model=str(path),
        revision=changes.get("revision"),
        hf_config=hf_config,
        hf_overrides={},
        max_model_len=128,
        dtype="bfloat16",
        quantization=changes.get("quantization"),
    )
    cache = SimpleNamespace(
        cache_dtype=changes.get("cache_dtype", "auto"), prefix_caching_hash_algo=changes.get("algo", "sha256")
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=cache,
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=changes.get("ranks", 1)),
        speculative_config=changes.get("speculative"),
        lora_config=changes.get("lora"),
    )


def test_a_namespace_is_stable_and_all_that_changes_kv_changes_it(tmp_path: Any) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    layout = groups(spec())

    def material(layout_name: str = "LBHNC", kv: Any = layout, path: Any = tmp_path, **changes: Any) -> bytes:
        config = model_config(path, **changes)
        return namespace.material(config, kv, layout_name, namespace.weights(config))

    same = material()
    assert material() == same
    variants = {
        material("BLNHC"),
        material(rope='{"rope_theta": 1}'),
        material(revision="r2"),
        material(quantization="awq"),
        material(cache_dtype="fp8"),
        material(algo="sha256_cbor"),
        material(ranks=2),
        material(speculative=SimpleNamespace(method="eagle", model="draft")),
        material(path="org/model"),
        material(kv=groups(spec(FullAttentionSpec, sliding_window=8))),
    }
    weights.write_bytes(b"12345")
    variants.add(material())
    assert len(variants) == 11
    assert same not in variants


def test_other_weights_of_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    before, loaded = weights.stat(), namespace.weights(model_config(tmp_path))
    # The kernel's clock for files ticks every few milliseconds.
    while weights.stat().st_ctime_ns == before.st_ctime_ns:
        weights.write_bytes(b"5678")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert namespace.weights(model_config(tmp_path)) != loaded


def test_lora_engines_never_share(tmp_path: Any) -> None:
    lora = model_config(tmp_path, lora=SimpleNamespace())
    layout = groups(spec())
    assert namespace.material(lora, layout, "x", []) != namespace.material(lora, layout, "x", [])
