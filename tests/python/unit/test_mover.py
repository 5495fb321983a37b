"""A worker's copies where CUDA is asked for: what is said without a GPU, and that the native module finds a driver."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from greenroom import ConfigError
from greenroom._native import Mover
from greenroom.vllm.settings import EngineConfig, KvMemory

BLOCK = 4096
BLOCKS = 4
ROOT = Path(__file__).parents[3]
BUILT = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
STAND_IN = BUILT / "debug" / "deps" / "libstand_in_driver.so"


def engine(folder: Path) -> EngineConfig:
    return EngineConfig(
        socket=str(folder / "nobody.sock"),
        engine_id="e",
        rank_bytes=BLOCK,
        ranks=1,
        block_tokens=16,
        gpu_blocks=BLOCKS,
        lookup_wait_ms=50,
        gpu_hold_ratio=0.3,
        prefetch=True,
    )


def memory(address: int) -> KvMemory:
    return KvMemory(cuda_device=0, regions=[(address, BLOCK, BLOCK)], owner=None)


def test_without_cuda_there_is_one_sentence(tmp_path: Path) -> None:
    """On a machine with a GPU the address is what is wrong."""
    with pytest.raises(ConfigError) as refused:
        Mover(engine(tmp_path), 0, memory(1 << 20))
    assert refused.value.code == "cuda"
    assert refused.value.message.startswith("CUDA cannot be used: ")


def test_a_driver_is_found_and_let_go(tmp_path: Path) -> None:
    if not STAND_IN.exists():
        pytest.skip(f"{STAND_IN} is not there: cargo builds it with the Rust tests")
    (tmp_path / "libcuda.so.1").symlink_to(STAND_IN)
    # The loader reads the variable when a process starts.
    child = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == "streams 4, then 0\n"


def _child(folder: Path) -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.stand_in_alloc.restype = ctypes.c_uint64
    driver.stand_in_get.restype = ctypes.c_int64
    mover = Mover(engine(folder), 0, memory(driver.stand_in_alloc(ctypes.c_size_t(BLOCK * BLOCKS))))
    before = driver.stand_in_get(b"streams")
    mover.step(b"", 0)
    mover.close()
    print(f"streams {before}, then {driver.stand_in_get(b'streams')}")


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
