"""Blocks saved from vLLM's KV memory and loaded into other blocks, in every layout of it. Needs vLLM, but no engine.

vLLM's own functions plan, allocate and view the memory here; Greenroom sees what a worker would hand to it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run it in .venv or .venv-026")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, UniformTypeKVCacheSpecs

from greenroom.vllm import compat

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # before 0.33
    from vllm.v1.core import kv_cache_utils as planning

named_layouts = pytest.mark.skipif(not compat.has_layouts(), reason="this vLLM has no named layouts, 0.32 does")
layouts_of_026 = pytest.mark.skipif(compat.has_layouts(), reason="this vLLM plans its KV memory otherwise than 0.26")
pytestmark = pytest.mark.vllm

SIZES = {"L": 3, "B": 5, "H": 2, "N": 32, "C": 2 * 8}
"""Layers, blocks, heads, tokens, and keys and values. No two layouts have the same strides in these."""

BLOCKS = SIZES["B"]
SPEC = FullAttentionSpec(block_size=SIZES["N"], num_kv_heads=SIZES["H"], head_size=8, dtype=torch.float32)
WIDE = replace(SPEC, num_kv_heads=3 * SIZES["H"])
ITEM = SPEC.dtype.itemsize
PAGE = SPEC.page_size_bytes
PADDED = replace(SPEC, page_size_padded=PAGE + 256)

UNIFORM = {str(layer): SPEC for layer in range(SIZES["L"])}
MIXED = {"0": SPEC, "1": WIDE, "2": SPEC, "3": WIDE}

MOVES = [(1, 3), (0, BLOCKS - 1), (BLOCKS - 1, 0)]
"""Blocks that are saved, and those that they are loaded into."""


@dataclass
class Memory:
    """KV memory as vLLM made it, and as Greenroom sees it."""

    plan: Any
    views: list[Any]
    """One for each layer, with the blocks as their first dimension."""
    regions: list[compat.Region]

    def base(self) -> int:
        return int(self.views[0].untyped_storage().data_ptr())

    def rank_bytes(self) -> int:
        config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
        return compat.check_geometry(config, self.plan).rank_bytes

    def save(self, block: int) -> bytes:
        return b"".join(ctypes.string_at(base + block * stride, size) for base, stride, size in self.regions)

    def load(self, block: int, saved: bytes) -> None:
        for base, stride, size in self.regions:
            ctypes.memmove(base + block * stride, saved[:size], size)
            saved = saved[size:]

    def allocations(self) -> dict[int, int]:
        storages = [view.untyped_storage() for view in self.views]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}


def check(memory: Memory) -> None:
    """Moves blocks; every element of every block must be where it belongs afterwards, and nowhere else."""
    # A wrong region must fail here, not write into other memory.
    for base, stride, size in memory.regions:
        last = base + (BLOCKS - 1) * stride + size
        assert any(start <= base and last <= start + length for start, length in memory.allocations().items())
    expected, number = [], 0
    for view in memory.views:
        assert view.shape[0] == BLOCKS
        view.copy_(torch.arange(number, number + view.numel()).view(view.shape))
        number += view.numel()
        expected.append(view.clone())
    assert number < 1 << 24, "a float has a value of its own for each element"
    assert intact(memory, expected), "no two elements are the same memory"
    for source, target in MOVES:
        saved = memory.save(source)
        assert len(saved) == memory.rank_bytes()
        memory.load(target, saved)
        for values in expected:
            values[target] = values[source]
        assert intact(memory, expected), f"block {source} into block {target}"


def intact(memory: Memory, expected: list[Any]) -> bool:
    return all(torch.equal(view, values) for view, values in zip(memory.views, expected, strict=True))


def settings(layout: Any = None) -> Any:
    """Those of vLLM that its planning of KV memory reads."""
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        prefix_cache_retention_interval=None,
        num_gpu_blocks_override=BLOCKS,
    )
    attention = SimpleNamespace(hisparse_config=None)
    return SimpleNamespace(cache_config=cache, attention_config=attention, kv_transfer_config=None)


def plan(layers: Mapping[str, Any], layout: Any = None) -> Any:
    """What vLLM plans for a model of these layers: its ``KVCacheConfig``."""
    available = BLOCKS * sum(spec.page_size_bytes for spec in layers.values())
    return planning.get_kv_cache_config_from_groups(settings(layout), [group(layers)], available)


def group(layers: Mapping[str, Any]) -> Any:
    specs = list(layers.values())
    alike = all(spec == specs[0] for spec in specs)
    return KVCacheGroupSpec(list(layers), specs[0] if alike else UniformTypeKVCacheSpecs.from_specs(dict(layers)))


def by_blocks(view: Any, dim: int = 0) -> Any:
    """Kernels may divide the blocks into smaller ones of their own."""
    count = view.shape[dim]
    return (view if count == BLOCKS else view.unflatten(dim, (BLOCKS, count // BLOCKS))).movedim(dim, 0)


# 0.32: layouts have names


LAYOUTS = ["LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]
WHOLE_PAGES = [name for name in LAYOUTS if {"L", "B"} == set(name[:2])]
"""The layouts in which a layer's part of a block is in one piece: vLLM refuses the others for the cases below."""


def named(name: str, layers: Mapping[str, Any], kernel_tokens: int | None = None) -> Memory:
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    layout = KVCacheLayout[name]
    made = plan(layers, layout)
    views = allocate_kv_cache(made, torch.device("cpu"), layout, [kernel_tokens or SIZES["N"]])
    regions, _ = compat.kv_regions(views, made)
    return Memory(made, [by_blocks(views[layer]) for layer in layers], regions)


@named_layouts
def test_these_are_all_layouts() -> None:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    assert set(KVCacheLayout.__members__) == set(LAYOUTS)


@named_layouts
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_moves_whole_and_alone(name: str) -> None:
    check(named(name, UNIFORM))


@named_layouts
@pytest.mark.parametrize("name", LAYOUTS)
def test_regions_are_those_of_the_plain_strides(name: str) -> None:
    """A layout's name lists its axes from the outermost to the innermost. Those outside the blocks' make regions."""
    memory = named(name, UNIFORM)
    strides = {axis: math.prod(SIZES[inner] for inner in name[name.index(axis) + 1 :]) for axis in name}
    for layer, view in enumerate(memory.views):
        assert view.stride() == tuple(strides[axis] for axis in "BHNC")
        assert view.data_ptr() == memory.base() + layer * strides["L"] * ITEM
    stride = strides["B"] * ITEM
    count = math.prod(SIZES[axis] for axis in name[: name.index("B")])
    assert memory.regions == [(memory.base() + number * BLOCKS * stride, stride, stride) for number in range(count)]


@named_layouts
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_of_one_layer_and_one_head(name: str) -> None:
    check(named(name, {"0": replace(SPEC, num_kv_heads=1)}))


@named_layouts
@pytest.mark.parametrize("name", WHOLE_PAGES)
def test_layers_of_different_sizes(name: str) -> None:
    check(named(name, MIXED))


@named_layouts
@pytest.mark.parametrize("name", WHOLE_PAGES)
def test_padded_pages(name: str) -> None:
    check(named(name, dict.fromkeys(UNIFORM, PADDED)))


@named_layouts
@pytest.mark.parametrize("name", WHOLE_PAGES)
def test_aligned_blocks(name: str) -> None:
    """Alignment leaves a gap after each layer's part of a block, or after the block."""
    aligned = {layer: replace(spec, block_stride_alignment=3 * 1024) for layer, spec in MIXED.items()}
    memory = named(name, aligned)
    assert memory.rank_bytes() > sum(spec.page_size_bytes for spec in MIXED.values())
    check(memory)


@named_layouts
@pytest.mark.parametrize("name", [name for name in WHOLE_PAGES if name.startswith("L")])
def test_blocks_that_kernels_divide(name: str) -> None:
    check(named(name, UNIFORM, kernel_tokens=SIZES["N"] // 4))


# 0.26: the backend says how a layer is laid out, the connector whether all layers share a tensor


@pytest.fixture(params=["NHD", "HND"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A CUDA backend, with either order of its axes inside a block."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.utils import set_kv_cache_layout

    set_kv_cache_layout(request.param)
    yield FlashAttentionBackend
    set_kv_cache_layout(None)


def unnamed(made: Any, layers: Mapping[str, Any], backend: Any, *, tokens: int = SIZES["N"], dim: int = 0) -> Memory:
    from vllm.v1.worker.gpu import attn_utils
    from vllm.v1.worker.utils import AttentionGroup

    raw = attn_utils._allocate_kv_cache(made, {}, torch.device("cpu"))
    groups = [AttentionGroup(backend, [layer], spec, 0) for layer, spec in layers.items()]
    views = attn_utils._reshape_kv_cache(groups, raw, "auto", [tokens], {}, made)
    regions, _ = compat.kv_regions(views, made)
    return Memory(made, [by_blocks(views[layer], dim) for layer in layers], regions)


@layouts_of_026
@pytest.mark.parametrize("layers", [UNIFORM, MIXED, dict.fromkeys(UNIFORM, PADDED)], ids=["alike", "mixed", "padded"])
def test_026_a_tensor_for_each_layer(backend: Any, layers: Mapping[str, Any]) -> None:
    memory = unnamed(plan(layers), layers, backend)
    assert len(memory.regions) == len(layers)
    check(memory)


@layouts_of_026
def test_026_blocks_that_kernels_divide(backend: Any) -> None:
    check(unnamed(plan(UNIFORM), UNIFORM, backend, tokens=SIZES["N"] // 2))


@layouts_of_026
def test_026_keys_before_values() -> None:
    """ROCm's order. Greenroom does not run there; the order could come to other devices."""
    from vllm.v1.attention.backends.rocm_attn import RocmAttentionBackend

    memory = unnamed(plan(UNIFORM), UNIFORM, RocmAttentionBackend, dim=1)
    assert len(memory.regions) == 2 * len(UNIFORM)
    check(memory)


@layouts_of_026
@pytest.mark.parametrize("layers", [UNIFORM, MIXED], ids=["alike", "mixed"])
def test_026_packed_blocks(backend: Any, layers: Mapping[str, Any]) -> None:
    """vLLM packs the layers of several groups only; the memory of one is the same."""
    made = plan(layers)
    available = sum(tensor.size for tensor in made.kv_cache_tensors)
    blocks, tensors = planning._get_kv_cache_config_packed(settings(), made.kv_cache_groups, available)
    assert blocks == BLOCKS
    memory = unnamed(replace(made, kv_cache_tensors=tensors), layers, backend)
    assert len(memory.regions) == 1
    check(memory)


@layouts_of_026
@pytest.mark.parametrize("tokens", [SIZES["N"], SIZES["N"] // 2])
def test_026_one_tensor_across_layers(backend: Any, tokens: int) -> None:
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
    from vllm.v1.worker.utils import AttentionGroup

    made = plan(UNIFORM)
    groups = [[AttentionGroup(backend, list(UNIFORM), SPEC, 0)]]
    views, across, _ = KVConnectorModelRunnerMixin.allocate_uniform_kv_caches(
        made, groups, "auto", torch.device("cpu"), [tokens]
    )
    regions, _ = compat.cross_layer_regions(across, made)
    assert len(regions) == 1
    check(Memory(made, [by_blocks(views[layer]) for layer in UNIFORM], regions))
